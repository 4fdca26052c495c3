"""Photographs the graphs of the help pages in the editor, where they show something when they have run.

`python -m tests.comfyui.draw_help` writes web/docs/*/graph.jpg.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, Route, sync_playwright

from lance_core.world.render import SIDE

from .build_workflows import CLIP_FRAMES, PICTURE
from .conftest import ROOT, server_in
from .server import find_comfyui
from .test_browser import FLAGS, READY, WATCH, find_browser, run, wait_for_end

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
PROMPT = "A big red circle at the top left and a small blue square on the right, on a white background."
MOTION = "A big red circle moves right, starting on the left, on a white background."
STILL = {GENERATE: {"prompt": PROMPT}}
SOURCE = {"LanceExample": {"seed": PICTURE}}
SINKS = ("PreviewImage", "PreviewAny", "SaveVideo")


def before_generate(node: str) -> Graph:
    """A node that changes the MODEL on its way from Load Lance to Lance Generate."""
    links = ((*LOAD_TO, node, "model"), (node, "MODEL", GENERATE, "model"), *PAINTED)
    values = {"LanceLora": {"lora_name": "my_style.safetensors"}, **STILL}
    return Graph((("LoadLance",), (node,), (GENERATE,), *PAINT), links, values)


GRAPHS = {
    "LoadLance": Graph((("LoadLance",), (GENERATE,), *PAINT), ((*LOAD_TO, GENERATE, "model"), *PAINTED), STILL),
    "LanceGenerate": Graph((("LoadLance",), (GENERATE,), *PAINT), ((*LOAD_TO, GENERATE, "model"), *PAINTED), STILL),
    "LanceLora": before_generate("LanceLora"),
    "LanceGuidance": before_generate("LanceGuidance"),
    "LanceUnderstand": Graph(
        (("LoadLance", "LanceExample"), ("EncodeSemantic",), ("LanceUnderstand",), ("PreviewAny",)),
        (
            (*LOAD_TO, "EncodeSemantic", "model"),
            (*LOAD_TO, "LanceUnderstand", "model"),
            ("LanceExample", "IMAGE", "EncodeSemantic", "media"),
            ("EncodeSemantic", "semantic", "LanceUnderstand", "semantic"),
            ("LanceUnderstand", "answer", "PreviewAny", "source"),
        ),
        {**SOURCE, "LanceUnderstand": {"question": "What colour is the circle?"}},
    ),
    "EncodeLatent": Graph(
        (("LoadLance", "LanceExample"), ("EncodeLatent",), (GENERATE,)),
        (
            (*LOAD_TO, GENERATE, "model"),
            ("LoadLance", "VAE", "EncodeLatent", "vae"),
            ("LanceExample", "IMAGE", "EncodeLatent", "media"),
            ("EncodeLatent", "LATENT", GENERATE, "first_frame"),
        ),
        {**SOURCE, GENERATE: {"prompt": MOTION, "frames": CLIP_FRAMES}},
    ),
    "LanceEdit": Graph(
        (("LoadLance", "LanceExample"), ("EncodeSemantic", "EncodeLatent"), ("LanceEdit",), *PAINT),
        (
            (*LOAD_TO, "EncodeSemantic", "model"),
            (*LOAD_TO, "LanceEdit", "model"),
            ("LoadLance", "VAE", "EncodeLatent", "vae"),
            ("LanceExample", "IMAGE", "EncodeSemantic", "media"),
            ("LanceExample", "IMAGE", "EncodeLatent", "media"),
            ("EncodeSemantic", "semantic", "LanceEdit", "semantic"),
            ("EncodeLatent", "LATENT", "LanceEdit", "latent"),
            ("LanceEdit", "LATENT", "VAEDecode", "samples"),
            *SHOWN,
        ),
        {**SOURCE, "LanceEdit": {"instruction": "Make the circle blue."}},
    ),
    "DecodeVideo": Graph(
        (("LoadLance",), (GENERATE,), ("DecodeVideo",), ("SaveVideo",)),
        (
            (*LOAD_TO, GENERATE, "model"),
            ("LoadLance", "VAE", "DecodeVideo", "vae"),
            (GENERATE, "LATENT", "DecodeVideo", "latent"),
            ("DecodeVideo", "VIDEO", "SaveVideo", "video"),
        ),
        {GENERATE: {"prompt": MOTION, "frames": CLIP_FRAMES}},
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
            "LanceConditioning": {"prompt": PROMPT},
            "EmptyLatentImage": {"width": SIDE, "height": SIDE},
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
            "LanceConditioning": {"prompt": PROMPT},
            "EmptyLatentImage": {"width": SIDE, "height": SIDE},
            "CFGGuider": {"cfg": 4},
        },
    ),
}
GRAPHS["EncodeSemantic"] = GRAPHS["LanceExample"] = GRAPHS["LanceUnderstand"]


def on_another_machine(route: Route) -> None:
    """What Load Lance shows, with round figures for the machine."""
    machine = {"vram": None, "ram": [16 * 2**30, 8 * 2**30]}
    route.fulfill(json=route.fetch().json() | {"machine": machine})


def can_run(graph: Graph) -> bool:
    """Whether it shows something, and needs no file that is not there."""
    types = {type for column in graph.columns for type in column}
    return bool(types & {*SINKS}) and "LanceLora" not in types


def photograph(page: Page, graph: Graph, last: int) -> Image.Image:
    page.evaluate(BUILD, {"columns": graph.columns, "links": graph.links, "values": graph.values, "last": last})
    if can_run(graph):
        run(page)
        if (end := wait_for_end(page)) != ["execution_success", ""]:
            raise RuntimeError(f"{graph.columns}: {end}")
    page.wait_for_timeout(1000)
    x, y, width, height = page.evaluate(FRAME)
    page.wait_for_timeout(700)
    clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return picture


def draw(page: Page) -> None:
    page.route("**/lance/checkpoint*", on_another_machine)
    for i, (name, graph) in enumerate(GRAPHS.items()):
        photograph(page, graph, last=100 * i).save(DOCS / name / "graph.jpg", quality=80, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        with server_in(Path(folder), find_comfyui()) as server:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
            page = browser.new_page(viewport={"width": 2000, "height": 1300})
            page.goto(server.url)
            page.wait_for_function(READY, timeout=90_000)
            page.evaluate(WATCH)
            page.add_style_tag(content=".minimap-main-container, .graph-canvas-panel {visibility: hidden}")
            draw(page)
            browser.close()


if __name__ == "__main__":
    main()
