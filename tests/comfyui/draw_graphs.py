"""Photographs the workflows in the editor when they have run, as docs/*.jpg: `python -m tests.comfyui.draw_graphs`."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from .conftest import ROOT, server_in
from .server import find_comfyui
from .test_browser import FLAGS, NAMES, READY, WATCH, find_browser, load, run, wait_for_end

MARGIN = 20  # pixels around the nodes
WIDTH = 1600
FRAME = """() => {
    const boxes = [...app.graph._groups.map(group => group._bounding),
                   ...app.graph.nodes.map(node => node.getBounding())];
    const left = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]));
    const right = Math.max(...boxes.map(box => box[0] + box[2]));
    const bottom = Math.max(...boxes.map(box => box[1] + box[3]));
    const view = app.canvas.ds;
    view.scale = Math.min((innerWidth - 160) / (right - left), (innerHeight - 200) / (bottom - top), 1);
    view.offset[0] = 100 / view.scale - left;
    view.offset[1] = 140 / view.scale - top;
    app.canvas.setDirty(true, true);
    return [100, 140, (right - left) * view.scale, (bottom - top) * view.scale];
}"""


def photograph(page: Page, name: str) -> Image.Image:
    load(page, name)
    run(page)
    if (end := wait_for_end(page)) != ["execution_success", ""]:
        raise RuntimeError(f"{name}: {end}")
    page.wait_for_timeout(1500)
    x, y, width, height = page.evaluate(FRAME)
    page.wait_for_timeout(700)
    clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return picture


def main() -> None:
    (ROOT / "docs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        with server_in(Path(folder), find_comfyui()) as server:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
            page = browser.new_page(viewport={"width": 2400, "height": 1100})
            page.goto(server.url)
            page.wait_for_function(READY, timeout=90_000)
            page.evaluate(WATCH)
            page.add_style_tag(content=".minimap-main-container, .graph-canvas-panel {visibility: hidden}")
            for name in NAMES:
                photograph(page, name).save(ROOT / "docs" / f"{name}.jpg", quality=85, optimize=True)
            browser.close()


if __name__ == "__main__":
    main()
