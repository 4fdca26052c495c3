"""A picture or clip of the small world to try things with, and what it shows in words."""

from __future__ import annotations

from random import Random

from torch import Tensor

from ..checks import MAX_FRAMES, check_whole
from .render import draw, draw_clip
from .scene import random_clip, random_scene
from .words import caption, clip_caption


def example(seed: int, frames: int = 1) -> tuple[Tensor, str]:
    """Frames `[frames, 48, 48, 3]`, 0..1, and a caption; of the test set, so that nano has never seen the combination.

    frames: 1 for a picture, more for a clip in which one thing moves. Raises LanceError for numbers out of range.
    """
    check_whole("seed", seed, 0)
    check_whole("frames", frames, 1, MAX_FRAMES)
    random = Random(seed)
    if frames == 1:
        scene = random_scene(random, "test")
        return draw(scene), caption(scene, random)
    clip = random_clip(random, "test")
    return draw_clip(clip, frames), clip_caption(clip, random)
