"""Pictures and clips of the small world, drawn anti-aliased with Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .scene import BACKGROUNDS, CENTRES, COLOURS, SIZES, Clip, Scene, Thing

SIDE = 48  # pixels of a picture: each of the nine places is one cell of the latent
FINER = 4  # drawn so many times larger, then averaged

Point = tuple[float, float]  # x and y as shares of the side


def draw(scene: Scene, side: int = SIDE) -> Tensor:
    """A picture `[1, side, side, 3]` float32, 0..1."""
    return as_frames([_paint(scene.background, [(thing, centre(thing)) for thing in scene.things], side)])


def draw_clip(clip: Clip, frames: int = 9, side: int = SIDE) -> Tensor:
    """A clip `[frames, side, side, 3]` float32, 0..1; the mover leaves with the first frame, arrives with the last."""
    resting = [(thing, centre(thing)) for thing in clip.scene.without(clip.mover).things]
    begin, end = centre(clip.mover), _centre(clip.end)
    shares = [i / max(1, frames - 1) for i in range(frames)]
    ways = [tuple(a + (b - a) * share for a, b in zip(begin, end)) for share in shares]
    return as_frames([_paint(clip.scene.background, [*resting, (clip.mover, way)], side) for way in ways])


def as_frames(pictures: Iterable[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255


def centre(thing: Thing) -> Point:
    """Its middle, x and y as shares of the side."""
    return _centre(thing.place)


def _centre(place: tuple[int, int]) -> Point:
    return CENTRES[place[1]], CENTRES[place[0]]


@cache
def outline(shape: str) -> tuple[Point, ...]:
    """A shape of radius 1 around (0, 0) as a polygon, y downwards."""
    if shape == "square":
        return (-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)
    if shape == "triangle":
        return (0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)
    if shape == "star":
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return tuple((r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, (1.1, 0.45) * 5))
    turns = [2 * math.pi * i / 64 for i in range(64)]
    if shape == "heart":
        xs = [math.sin(t) ** 3 for t in turns]
        ys = [(5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t)) / 16 for t in turns]
        return tuple(zip(xs, ys))
    return tuple((math.cos(t), math.sin(t)) for t in turns)


def _paint(background: str, things: Sequence[tuple[Thing, Point]], side: int) -> Image.Image:
    image = Image.new("RGB", (side * FINER, side * FINER), BACKGROUNDS[background])
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in things:
        points = [((x + SIZES[thing.size] * a), (y + SIZES[thing.size] * b)) for a, b in outline(thing.shape)]
        pen.polygon([(a * side * FINER, b * side * FINER) for a, b in points], fill=COLOURS[thing.colour])
    return image.resize((side, side), Image.Resampling.BOX)
