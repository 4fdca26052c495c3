"""Draws the thumbnails of `workflows/` with what the built-in model makes of them: python -m tests.comfyui.draw_media.

Each shows what goes into the workflow, pictures and words, and then what comes out of it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lance_core.media import read_media, to_bytes
from lance_core.world.example import example

from .build_workflows import GRAPHS, WORKFLOWS
from .conftest import server_in
from .server import ComfyServer, Run, find_comfyui
from .workflow_graph import Graph

SIDE, MARGIN = 400, 14
GROUND, ASKED, ANSWERED = (38, 42, 52), (226, 222, 210), (140, 210, 150)
FONT_SIZES = range(26, 10, -2)
MOST_TEXT = 0.45  # of the height
WORDS = ("prompt", "question", "instruction")  # inputs that hold them

Line = tuple[str, tuple[int, int, int]]  # words and their colour


def pictures_in(graph: Graph) -> Iterator[Image.Image]:
    for node in graph.nodes:
        if node.type == "LanceExample":
            frames, _ = example(node.value("seed"), node.value("frames"))
            yield from moments(frames)


def pictures_out(server: ComfyServer, run: Run) -> Iterator[Image.Image]:
    for path in server.output_files(run):
        yield from moments(read_media(path)[0])


def moments(frames: Tensor) -> list[Image.Image]:
    """A picture, or beginning, middle and end of a clip `[F, H, W, 3]`."""
    shown = frames if len(frames) == 1 else frames[[0, len(frames) // 2, -1]]
    return [Image.fromarray(to_bytes(frame).numpy()) for frame in shown]


def words(graph: Graph, run: Run) -> list[Line]:
    """What is typed, and what is answered."""
    typed = [node.values[name] for node in graph.nodes for name in WORDS if name in node.values]
    answers = [text for outputs in run.history["outputs"].values() for text in outputs.get("text", [])]
    return [*((text, ASKED) for text in typed if isinstance(text, str)), *((text, ANSWERED) for text in answers)]


def card(pictures: list[Image.Image], lines: list[Line]) -> Image.Image:
    """All pictures, as large as there is room for, above the words."""
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    top = SIDE - written(ImageDraw.Draw(image), lines) - MARGIN
    columns, side = best_grid(len(pictures), SIDE - MARGIN, top - MARGIN)
    rows = math.ceil(len(pictures) / columns)
    left, above = (SIDE - columns * side) // 2, (top - rows * side) // 2
    for i, picture in enumerate(pictures):
        inner = side - MARGIN
        place = left + i % columns * side + MARGIN // 2, above + i // columns * side + MARGIN // 2
        image.paste(picture.convert("RGB").resize((inner, inner), Image.Resampling.BICUBIC), place)
    return image


def best_grid(count: int, width: int, height: int) -> tuple[int, int]:
    """Columns, and the side of a square, with which so many squares are largest."""
    sides = {columns: min(width // columns, height // math.ceil(count / columns)) for columns in range(1, count + 1)}
    columns = max(sides, key=sides.get)
    return columns, sides[columns]


def written(draw: ImageDraw.ImageDraw, lines: list[Line]) -> int:
    """Writes at the bottom of a card, in the largest letters that fit, and returns the height."""
    for size in FONT_SIZES:
        font = ImageFont.load_default(size)
        wrapped = [(part, colour) for text, colour in lines for part in wrap(draw, text, font)]
        height = round(1.3 * size) * len(wrapped) + MARGIN
        if height <= MOST_TEXT * SIDE:
            break
    for i, (text, colour) in enumerate(wrapped):
        draw.text((MARGIN, SIDE - height + round(1.3 * size) * i), text, fill=colour, font=font)
    return height


def wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines that are no wider than the card."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= SIDE - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, server_in(Path(folder), find_comfyui()) as server:
        for build in GRAPHS:
            graph = build()
            run = server.run(graph.api())
            pictures = [*pictures_in(graph), *pictures_out(server, run)]
            card(pictures, words(graph, run)).save(WORKFLOWS / f"{build.__name__}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
