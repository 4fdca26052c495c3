"""Batches of pictures and clips of the small world for the VAE, which learns all that can be drawn in it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from .render import draw, draw_clip
from .scene import COLOURS, SHAPES, Vocabulary, random_clip, random_scene

EVERYTHING = Vocabulary(tuple(COLOURS), SHAPES)
PICTURES, CLIPS, FRAMES = 8, 1, 9  # in a batch of either kind, and in a clip
CLIPS_EVERY = 3  # batches


def vae_batches(seed: int, clips_every: int = CLIPS_EVERY) -> Iterator[Tensor]:
    """Endless batches `[B, F, H, W, 3]` in 0..1: pictures, and every so often clips; both splits, new kinds too."""
    random, index = Random(seed), 0
    while True:
        index += 1
        if index % clips_every:
            yield torch.stack([draw(random_scene(random, None, EVERYTHING)) for _ in range(PICTURES)])
        else:
            yield torch.stack([draw_clip(random_clip(random, None, EVERYTHING), FRAMES) for _ in range(CLIPS)])
