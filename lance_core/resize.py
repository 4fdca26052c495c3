"""How pictures and clips are brought to the sizes Lance was trained on: bucket, crop, resize, crop.

A bucket is a size `(height, width)` of about `size` x `size` pixels and one of six aspect ratios, both sides
multiples of 16. Source: the official `data/video/transforms/bucket_resize.py` and `divisible_crop.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checks import check_number
from .config import RESOLUTIONS, Resolution
from .errors import LanceError
from .media import to_bytes

ASPECT_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))  # width : height
OFFICIAL_RATIOS = tuple(f"{width}:{height}" for width, height in ASPECT_RATIOS)
RATIOS = ("21:9", "16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16")
MIN_MEGAPIXELS = 0.01
BUCKET_STEP = 16  # pixels, for the VAE and the vision tower alike


NATIVE = "native"  # what nodes and the command line call: no resizing
RESOLUTION_CHOICES = ("auto", *RESOLUTIONS, NATIVE)


def resolution_of(choice: str) -> str | None:
    """The stages' `resolution` for one of `RESOLUTION_CHOICES`."""
    return None if choice == NATIVE else choice


def own_size(resolution: Resolution) -> tuple[int, int]:
    """Width and height in pixels of what a model that knows this resolution paints unless it is told otherwise."""
    height, width = _bucket(resolution.vae, *resolution.ratio)
    return width, height


def _bucket(size: int, width: int, height: int) -> tuple[int, int]:
    ratio = max(width, height) / min(width, height)
    short = BUCKET_STEP * round(size / math.sqrt(ratio) / BUCKET_STEP)
    long = BUCKET_STEP * round(short * ratio / BUCKET_STEP)
    return (short, long) if width >= height else (long, short)


def buckets(size: int) -> tuple[tuple[int, int], ...]:
    """The six buckets `(height, width)` of about `size` x `size` pixels, from the widest to the tallest.

    Raises LanceError where `size` is too small for the narrowest of them.
    """
    sizes = tuple(_bucket(size, width, height) for width, height in ASPECT_RATIOS)
    if min(min(sides) for sides in sizes) < BUCKET_STEP:
        raise LanceError(f"The resolution {size} is too small for a bucket of 21:9; use one of 24 pixels or more.")
    return sizes


def official_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Width and height in pixels of the VAE's bucket: of a name in `RESOLUTIONS` and one of `OFFICIAL_RATIOS`.

    Raises LanceError for other names.
    """
    _check_name("resolution", resolution, tuple(RESOLUTIONS))
    _check_name("aspect ratio", aspect_ratio, OFFICIAL_RATIOS)
    height, width = buckets(RESOLUTIONS[resolution].vae)[OFFICIAL_RATIOS.index(aspect_ratio)]
    return width, height


def size_of(aspect_ratio: str, megapixels: float) -> tuple[int, int]:
    """Width and height in pixels, multiples of 16, near one of `RATIOS` and so many million pixels.

    Raises LanceError for another ratio and for less than 0.01 megapixels. Sizes beyond the model's position table are
    refused where something is painted (`check_grid`).
    """
    _check_name("aspect ratio", aspect_ratio, RATIOS)
    check_number("megapixels", megapixels, MIN_MEGAPIXELS)
    ratio_width, ratio_height = map(int, aspect_ratio.split(":"))
    unit = math.sqrt(megapixels * 1e6 / (ratio_width * ratio_height))
    width, height = (BUCKET_STEP * round(unit * part / BUCKET_STEP) for part in (ratio_width, ratio_height))
    return width, height


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise LanceError(f"the {what} is {name!r}; give one of {', '.join(known)}.")


def nearest_bucket(height: int, width: int, size: int) -> tuple[int, int]:
    """The bucket `(height, width)` whose aspect ratio is nearest to that of a picture; the first of equals."""
    return min(buckets(size), key=lambda bucket: abs(width / height - bucket[1] / bucket[0]))


def crop_box(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred rectangle `(top, left, height, width)` of a picture that has the bucket's aspect ratio.

    A picture that has the ratio itself, up to rounding, keeps all its pixels or all but one row or column. (The
    official crop may place such a rectangle one pixel further at random; here it is always centred.)
    """
    ratio = bucket[1] / bucket[0]
    crop_height, crop_width = round(math.sqrt(height * width / ratio)), round(math.sqrt(height * width * ratio))
    if crop_height > height or crop_width > width:
        if width / height < ratio:
            crop_height, crop_width = round(width / ratio), width
        else:
            crop_height, crop_width = height, round(height * ratio)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _divisible_box(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """The largest centred rectangle `(top, left, height, width)` whose sides are multiples; halves round to even."""
    crop_height, crop_width = height - height % multiple, width - width % multiple
    return round((height - crop_height) / 2), round((width - crop_width) / 2), crop_height, crop_width


def _cut(frame: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = box
    return frame[top : top + height, left : left + width]


def fit(frames: Tensor, size: int, multiple: int) -> Tensor:
    """Crops and resizes frames to the bucket nearest to their aspect ratio, then crops them to a multiple.

    frames: `[F, H, W, 3]`, 0..1. size: the side of the square bucket in pixels, as in `RESOLUTIONS`. multiple: 16 for
    the VAE, 28 for the vision tower. Returns `[F, H', W', 3]`, float32, 0..1, on the device of `frames`. The resize
    is Pillow's bicubic on bytes, as in the official transforms. Raises LanceError where the frames are empty or the
    bucket is smaller than the multiple.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise LanceError(f"The frames have the shape {list(frames.shape)}; give them as [frames, height, width, 3].")
    height, width = frames.shape[1:3]
    bucket = nearest_bucket(height, width, size)
    if min(bucket) < multiple:
        raise LanceError(
            f"The resolution {size} gives {bucket[1]}x{bucket[0]} pixels for a picture of {width}x{height}, which is"
            f" less than one block of {multiple} pixels; choose a larger resolution."
        )
    source_box, final_box = crop_box(height, width, bucket), _divisible_box(*bucket, multiple)
    resized = [
        Image.fromarray(_cut(to_bytes(frame).cpu().numpy(), source_box)).resize(bucket[::-1], Image.Resampling.BICUBIC)
        for frame in frames
    ]
    pixels = np.stack([_cut(np.asarray(image), final_box) for image in resized])
    return torch.from_numpy(pixels).to(frames.device).float() / 255
