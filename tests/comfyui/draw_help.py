"""Draws the graphs of the help pages in the editor: `python -m tests.comfyui.draw_help` writes web/docs/*/graph.jpg."""

from __future__ import annotations

import io
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from lance_core.checkpoint import official_shapes
from lance_core.config import LanceConfig, TextConfig, VisionConfig
from lance_core.vae import VAEConfig

from .conftest import ROOT, make_tiny, server_in
from .server import find_comfyui
from .test_browser import FLAGS, READY, find_browser

DOCS = ROOT / "web/docs"
WIDTH = 1000
MARGIN = 15  # pixels around the nodes
BUILD = """({columns, links, values, last}) => {
    app.graph.clear();
    app.graph.last_node_id = last;  // pictures and values of earlier nodes are kept under their ids
    const gap = [70, 70], made = {}, place = [0, 0];
    for (const types of columns) {
        place[1] = 0;
        let width = 0;
        for (const type of types) {
            const node = made[type] = LiteGraph.createNode(type);
            app.graph.add(node);
            for (const [name, value] of Object.entries(values[type] ?? {}))
                node.widgets.find(widget => widget.name === name).value = value;
            node.setSize(node.computeSize().map((side, i) => Math.max(side, [270, 0][i])));
            node.pos = [...place];
            place[1] += node.size[1] + (type === 'LoadLance' ? 60 : 0) + gap[1];
            width = Math.max(width, node.size[0]);
        }
        place[0] += width + gap[0];
    }
    for (const [from, output, to, input] of links) {
        const slot = made[from].outputs.findIndex(({name, type}) => name === output || type === output);
        made[from].connect(slot, made[to], made[to].inputs.findIndex(({name}) => name === input));
    }
}"""
FRAME = """() => {
    const boxes = app.graph.nodes.map(node => node.getBounding()), view = app.canvas.ds;
    const left = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]));
    const right = Math.max(...boxes.map(box => box[0] + box[2]));
    const bottom = Math.max(...boxes.map(box => box[1] + box[3]));
    view.scale = Math.min((innerWidth - 160) / (right - left), (innerHeight - 260) / (bottom - top), 1);
    view.offset = [100 / view.scale - left, 160 / view.scale - top];
    app.canvas.setDirty(true, true);
    return [100, 160, (right - left) * view.scale, (bottom - top) * view.scale];
}"""


@dataclass(frozen=True)
class Graph:
    columns: tuple[tuple[str, ...], ...]  # node types, from left to right and from top to bottom
    links: tuple[tuple[str, str, str, str], ...]  # node, output, node, input
    values: dict[str, dict[str, object]]  # of widgets, by node


LOAD_TO = ("LoadLance", "MODEL")
GENERATE = "LanceGenerate"
PAINT = (("VAEDecode", "PreviewImage"),)
SHOWN = (("LoadLance", "VAE", "VAEDecode", "vae"), ("VAEDecode", "IMAGE", "PreviewImage", "images"))
PAINTED = ((GENERATE, "LATENT", "VAEDecode", "samples"), *SHOWN)
FOX = {"LanceLora": {"lora_name": "my_style.safetensors"}, GENERATE: {"prompt": "A red fox in the snow, golden hour"}}
APPLE = {"LoadImage": {"image": "example.png"}}


def before_generate(node: str) -> Graph:
    """A node that changes the MODEL on its way from Load Lance to Lance Generate."""
    links = ((*LOAD_TO, node, "model"), (node, "MODEL", GENERATE, "model"), *PAINTED)
    return Graph((("LoadLance",), (node,), (GENERATE,), *PAINT), links, FOX)


GRAPHS = {
    "LoadLance": Graph((("LoadLance",), (GENERATE,), *PAINT), ((*LOAD_TO, GENERATE, "model"), *PAINTED), FOX),
    "LanceGenerate": Graph((("LoadLance",), (GENERATE,), *PAINT), ((*LOAD_TO, GENERATE, "model"), *PAINTED), FOX),
    "LanceLora": before_generate("LanceLora"),
    "LanceGuidance": before_generate("LanceGuidance"),
    "LanceUnderstand": Graph(
        (("LoadLance", "LoadImage"), ("EncodeSemantic",), ("LanceUnderstand",), ("PreviewAny",)),
        (
            (*LOAD_TO, "EncodeSemantic", "model"),
            (*LOAD_TO, "LanceUnderstand", "model"),
            ("LoadImage", "IMAGE", "EncodeSemantic", "media"),
            ("EncodeSemantic", "semantic", "LanceUnderstand", "semantic"),
            ("LanceUnderstand", "answer", "PreviewAny", "source"),
        ),
        {**APPLE, "LanceUnderstand": {"question": "What is on the table?"}},
    ),
    "EncodeLatent": Graph(
        (("LoadLance", "LoadImage"), ("EncodeLatent",), (GENERATE,)),
        (
            (*LOAD_TO, GENERATE, "model"),
            ("LoadLance", "VAE", "EncodeLatent", "vae"),
            ("LoadImage", "IMAGE", "EncodeLatent", "media"),
            ("EncodeLatent", "LATENT", GENERATE, "first_frame"),
        ),
        {**APPLE, "EncodeLatent": {"resolution": "video_480p"}, GENERATE: {"prompt": "The apple rolls", "frames": 49}},
    ),
    "LanceEdit": Graph(
        (("LoadLance", "LoadImage"), ("EncodeSemantic", "EncodeLatent"), ("LanceEdit",), *PAINT),
        (
            (*LOAD_TO, "EncodeSemantic", "model"),
            (*LOAD_TO, "LanceEdit", "model"),
            ("LoadLance", "VAE", "EncodeLatent", "vae"),
            ("LoadImage", "IMAGE", "EncodeSemantic", "media"),
            ("LoadImage", "IMAGE", "EncodeLatent", "media"),
            ("EncodeSemantic", "semantic", "LanceEdit", "semantic"),
            ("EncodeLatent", "LATENT", "LanceEdit", "latent"),
            ("LanceEdit", "LATENT", "VAEDecode", "samples"),
            *SHOWN,
        ),
        {**APPLE, "LanceEdit": {"instruction": "Make the apple green, keep the table"}},
    ),
    "DecodeVideo": Graph(
        (("LoadLance",), (GENERATE,), ("DecodeVideo",), ("SaveVideo",)),
        (
            (*LOAD_TO, GENERATE, "model"),
            ("LoadLance", "VAE", "DecodeVideo", "vae"),
            (GENERATE, "LATENT", "DecodeVideo", "latent"),
            ("DecodeVideo", "VIDEO", "SaveVideo", "video"),
        ),
        {GENERATE: {"prompt": "A red fox runs through the snow", "size": "video_480p", "frames": 49}},
    ),
    "LanceConditioning": Graph(
        (("LoadLance",), ("LanceConditioning", "EmptyLatentImage"), ("KSampler",), *PAINT),
        (
            (*LOAD_TO, "LanceConditioning", "model"),
            (*LOAD_TO, "KSampler", "model"),
            ("LanceConditioning", "positive", "KSampler", "positive"),
            ("LanceConditioning", "negative", "KSampler", "negative"),
            ("EmptyLatentImage", "LATENT", "KSampler", "latent_image"),
            ("KSampler", "LATENT", "VAEDecode", "samples"),
            *SHOWN,
        ),
        {
            "LanceConditioning": {"prompt": "A red fox in the snow, golden hour"},
            "EmptyLatentImage": {"width": 768, "height": 768},
            "KSampler": {"steps": 30, "cfg": 4, "scheduler": "simple"},
        },
    ),
    "LanceSigmas": Graph(
        (
            ("LoadLance",),
            ("LanceConditioning",),
            ("RandomNoise", "CFGGuider", "KSamplerSelect", "LanceSigmas", "EmptyLatentImage"),
            ("SamplerCustomAdvanced",),
        ),
        (
            (*LOAD_TO, "LanceConditioning", "model"),
            (*LOAD_TO, "CFGGuider", "model"),
            ("LanceConditioning", "positive", "CFGGuider", "positive"),
            ("LanceConditioning", "negative", "CFGGuider", "negative"),
            ("RandomNoise", "NOISE", "SamplerCustomAdvanced", "noise"),
            ("CFGGuider", "GUIDER", "SamplerCustomAdvanced", "guider"),
            ("KSamplerSelect", "SAMPLER", "SamplerCustomAdvanced", "sampler"),
            ("LanceSigmas", "SIGMAS", "SamplerCustomAdvanced", "sigmas"),
            ("EmptyLatentImage", "LATENT", "SamplerCustomAdvanced", "latent_image"),
        ),
        {
            "LanceConditioning": {"prompt": "A red fox in the snow, golden hour"},
            "EmptyLatentImage": {"width": 768, "height": 768},
            "CFGGuider": {"cfg": 4},
        },
    ),
}
GRAPHS["EncodeSemantic"] = GRAPHS["LanceUnderstand"]


def status_of_the_release() -> dict:
    """What Load Lance shows for the release on a machine that suits it."""
    parts = official_shapes(LanceConfig(TextConfig(), VisionConfig()), VAEConfig(), variant="image")
    sizes = [2 * sum(math.prod(shape) for shape in shapes.values()) for shapes in parts.values()]
    needs = {"dtype": "bf16", **dict(zip(("model", "vision", "vae"), sizes, strict=True))}
    machine = {"vram": [24 * 2**30, 22 * 2**30], "ram": [64 * 2**30, 50 * 2**30]}
    return {"offered": True, "missing": [], "problems": [], "needs": needs, "machine": machine}


def photograph(page: Page, graph: Graph, last: int) -> Image.Image:
    page.evaluate(BUILD, {"columns": graph.columns, "links": graph.links, "values": graph.values, "last": last})
    page.wait_for_timeout(1000)
    x, y, width, height = page.evaluate(FRAME)
    page.wait_for_timeout(700)
    clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return picture


def draw(page: Page) -> None:
    page.route("**/lance/checkpoint*", lambda route: route.fulfill(json=status_of_the_release()))
    for i, (name, graph) in enumerate(GRAPHS.items()):
        photograph(page, graph, last=100 * i).save(DOCS / name / "graph.jpg", quality=80, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        tiny = make_tiny(Path(folder, "tiny"))
        with server_in(Path(folder, "server"), find_comfyui(), tiny) as server:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
            page = browser.new_page(viewport={"width": 2000, "height": 1300})
            page.goto(server.url)
            page.wait_for_function(READY, timeout=90_000)
            page.add_style_tag(content=".minimap-main-container, .graph-canvas-panel {visibility: hidden}")
            draw(page)
            browser.close()


if __name__ == "__main__":
    main()
