"""What the stages refuse, in one sentence each."""

from __future__ import annotations

import math
import warnings
from numbers import Integral

import torch
from torch import Tensor

from .config import LATENT_CHANNELS, MAX_LATENT_FRAMES, MAX_LATENT_SIDE, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from .errors import LanceError, LanceWarning

MAX_FRAMES = TEMPORAL_COMPRESSION * (MAX_LATENT_FRAMES - 1) + 1


def check_whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    """A whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        limits = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise LanceError(f"{name} is {value!r}: give a whole number {limits}.")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """A finite number from `low` to `high`."""
    good = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not good:
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise LanceError(f"{name} is {value!r}: give a number {limits}.")


def check_seed(seed: int) -> None:
    """A whole number that torch's generators take and ComfyUI's widgets give."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise LanceError(f"seed is {seed!r}: give whole numbers from 0 to 2**64 - 1.")


def check_text(name: str, value: str) -> None:
    """Text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise LanceError(f"the {name} is {type(value).__name__}: give text.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise LanceError(
            f"the {name} holds bytes that could not be read as text: write it in UTF-8, with a UTF-8 locale."
        )


def check_frames(frames: Tensor) -> None:
    """Frames `[F, H, W, 3]`, floating point."""
    if not isinstance(frames, Tensor) or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise LanceError(f"the frames are {_shape(frames)}: give [F, H, W, 3] in 0..1.")
    if not frames.is_floating_point():
        raise LanceError(f"the frames are {frames.dtype}: give floating point values in 0..1, bytes divided by 255.")
    low, high = (float(limit) for limit in frames.aminmax())
    if not (-1 < low and high < 2):  # NaN too; a little beyond 0..1 comes from resizing and colour nodes
        raise LanceError(f"the frames' values are {low:g} to {high:g}: give 0..1.")


def check_latent(name: str, latent: Tensor) -> None:
    """A raw latent `[B, 48, T, h, w]` without NaN or infinity."""
    good = isinstance(latent, Tensor) and latent.ndim == 5 and latent.shape[1] == LATENT_CHANNELS
    if not good or 0 in latent.shape:
        raise LanceError(
            f"{name} is {_shape(latent)}: give [B, {LATENT_CHANNELS}, T, h, w] from EncodeLatent or a Wan 2.2 VAE."
        )
    if not torch.isfinite(latent).all():
        raise LanceError(f"{name} holds NaN or infinity: make it again, in bf16 or float32.")


def check_grid(t: int, h: int, w: int) -> None:
    """Refuses a latent that the position table does not cover; warns where it wraps as in the official code."""
    side = MAX_LATENT_SIDE
    size = f"{w * SPATIAL_COMPRESSION}x{h * SPATIAL_COMPRESSION}"
    if (h - 1) * side + w > side * side:
        raise LanceError(
            f"{size} pixels are too large: the model knows positions up to"
            f" {side * SPATIAL_COMPRESSION}x{side * SPATIAL_COMPRESSION}; make the picture smaller."
        )
    if t > MAX_LATENT_FRAMES:
        raise too_many(TEMPORAL_COMPRESSION * (t - 1) + 1)
    if w > side:
        warn(
            f"{size} is wider than {side * SPATIAL_COMPRESSION} pixels: positions at the right edge repeat those of"
            " the next row, as in the official model; narrower pictures are safer."
        )


def too_many(frames: int) -> LanceError:
    return LanceError(
        f"{frames} frames are too many: the model knows up to {MAX_FRAMES}, ten seconds; use a shorter clip."
    )


def warn(sentence: str) -> None:
    """Tells the caller of a stage something without stopping."""
    warnings.warn(sentence, LanceWarning, stacklevel=3)


def _shape(value: object) -> object:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
