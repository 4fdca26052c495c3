"""Draws the example media and the thumbnails of `workflows/`: `python -m tests.comfyui.draw_media`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .build_workflows import GRAPHS, WORKFLOWS

RED, GREEN, BLUE, YELLOW = (200, 38, 40), (92, 160, 52), (52, 96, 176), (232, 190, 48)
WALL, WOOD, SHADOW = (226, 222, 210), (158, 112, 72), (112, 78, 50)
SCALE = 4  # everything is drawn larger and shrunk, for smooth edges


def table(size: int) -> Image.Image:
    """An empty table before a wall, `size` pixels square."""
    picture = Image.new("RGB", (size, size), WALL)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, size * 0.6, size, size), fill=WOOD)
    for row in (0.7, 0.82, 0.94):
        draw.line((0, size * row, size, size * row), fill=SHADOW, width=max(size // 200, 1))
    return picture


def shade(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture with a soft shadow on the table."""
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=150)
    mask = mask.filter(ImageFilter.GaussianBlur(picture.width / 40))
    return Image.composite(Image.new("RGB", picture.size, SHADOW), picture, mask)


def apple(picture: Image.Image, x: float, colour: tuple[int, int, int] = RED) -> Image.Image:
    """The picture with an apple standing at x, a fraction of the width."""
    s = picture.width
    picture = shade(picture, (s * (x - 0.2), s * 0.72, s * (x + 0.24), s * 0.84))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((s * (x - 0.19), s * 0.4, s * (x + 0.19), s * 0.78), fill=colour)
    draw.line((s * x, s * 0.43, s * (x + 0.03), s * 0.32), fill=(84, 56, 36), width=s // 45)
    draw.ellipse((s * (x + 0.03), s * 0.31, s * (x + 0.15), s * 0.38), fill=(78, 140, 60))
    light = tuple(min(channel + 60, 255) for channel in colour)
    draw.ellipse((s * (x - 0.12), s * 0.46, s * (x - 0.05), s * 0.55), fill=light)
    return picture


def cup(picture: Image.Image, x: float) -> Image.Image:
    """The picture with a blue cup standing at x, a fraction of the width."""
    s = picture.width
    picture = shade(picture, (s * (x - 0.2), s * 0.72, s * (x + 0.28), s * 0.84))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((s * (x + 0.08), s * 0.47, s * (x + 0.28), s * 0.67), outline=BLUE, width=s // 24)
    draw.rounded_rectangle((s * (x - 0.17), s * 0.4, s * (x + 0.17), s * 0.78), s * 0.06, fill=BLUE)
    draw.ellipse((s * (x - 0.17), s * 0.36, s * (x + 0.17), s * 0.45), fill=(30, 58, 112))
    return picture


def ball(width: int, height: int, progress: float, colour: tuple[int, int, int] = RED) -> Image.Image:
    """A ball that rolls from the left to the right while progress goes from 0 to 1, `width` by `height` pixels."""
    picture = Image.new("RGB", (width * SCALE, height * SCALE), WALL)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, height * SCALE * 0.75, width * SCALE, height * SCALE), fill=WOOD)
    radius = min(width, height) * SCALE * 0.2
    x, y = radius + progress * (width * SCALE - 2 * radius), height * SCALE * 0.75 - radius
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def write_clip(path: Path, frames: list[Image.Image], fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())


def thumbnails() -> dict[str, Image.Image]:
    """A drawing, 400 x 400, of what each workflow does: what goes in on the left, what comes out on the right."""
    size = 400 * SCALE
    red, green, blue = apple(table(size), 0.5), apple(table(size), 0.5, GREEN), cup(table(size), 0.5)
    both = cup(apple(table(size), 0.27), 0.68)
    rolling, yellow = ball(198, 400, 0.3), ball(198, 400, 0.3, YELLOW)
    question, words = lettering("?", size), lettering("Aa", size)
    return {
        "text_to_image": halves(words, red),
        "text_to_video": halves(words, rolling),
        "image_to_video": halves(red, rolling),
        "image_edit": halves(red, green),
        "video_edit": halves(rolling, yellow),
        "two_reference_edit": rows(halves(red, blue), both),
        "ask_image": halves(red, question),
        "ask_video": halves(rolling, question),
        "understand_then_edit": halves(stacked(red, question), green),
        "ksampler": rows(halves(words, noise(size)), red),
        "inpaint": halves(masked(red), apple(table(size), 0.5, YELLOW)),
        "describe_and_regenerate": halves(stacked(red, words), apple(table(size), 0.45, RED)),
        "image_to_video_from_generated": halves(stacked(words, ball(400, 400, 0.1)), rolling),
        "batch_of_four": rows(halves(red, blue), halves(green, apple(table(size), 0.5, YELLOW))),
    }


def noise(size: int) -> Image.Image:
    """Coarse coloured noise, `size` pixels square."""
    grains = np.random.default_rng(0).integers(40, 230, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize((size, size), Image.Resampling.NEAREST)


def masked(picture: Image.Image) -> Image.Image:
    """The picture with a veil over its middle."""
    mask = Image.new("L", picture.size, 0)
    w, h = picture.size
    ImageDraw.Draw(mask).rectangle((w * 0.29, h * 0.29, w * 0.71, h * 0.8), fill=190)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture, mask)


def lettering(text: str, size: int) -> Image.Image:
    picture = Image.new("RGB", (size, size), (38, 42, 52))
    draw = ImageDraw.Draw(picture)
    draw.text((size / 2, size / 2), text, fill=WALL, anchor="mm", font_size=size // 3)
    return picture


def middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The centre of the picture, of the aspect ratio and at the size wanted."""
    scale = max(width / picture.width, height / picture.height)
    w, h = width / scale, height / scale
    x, y = (picture.width - w) / 2, (picture.height - h) / 2
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))


def halves(left: Image.Image, right: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (400, 400), "white")
    picture.paste(middle(left, 198, 400), (0, 0))
    picture.paste(middle(right, 198, 400), (202, 0))
    return picture


def rows(top: Image.Image, bottom: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (400, 400), "white")
    picture.paste(middle(top, 400, 198), (0, 0))
    picture.paste(middle(bottom, 400, 198), (0, 202))
    return picture


def stacked(top: Image.Image, bottom: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (198, 400), "white")
    picture.paste(middle(top, 198, 198), (0, 0))
    picture.paste(middle(bottom, 198, 198), (0, 202))
    return picture


def main() -> None:
    media = WORKFLOWS / "media"
    media.mkdir(parents=True, exist_ok=True)
    for name, draw in (("example.png", apple), ("lance_example_2.png", cup)):
        picture = draw(table(256 * SCALE), 0.5)
        picture.resize((256, 256), Image.Resampling.LANCZOS).save(media / name, optimize=True)
    write_clip(media / "lance_example.mp4", [ball(96, 64, frame / 16) for frame in range(17)], fps=12)
    drawn = thumbnails()
    for graph in GRAPHS:
        drawn[graph.__name__].save(WORKFLOWS / f"{graph.__name__}.jpg", quality=85)


if __name__ == "__main__":
    main()
