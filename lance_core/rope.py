"""Rotary embedding over three axes (time, height, width), as Qwen2.5-VL has it (arXiv 2502.13923, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, rounded: bool, device=None) -> Tensor:
    """`theta ** (-2i / dim)`, `[dim / 2]` float32.

    rounded: as bf16 holds them. The official model converts these together with its weights, so whatever it
    computed in bf16, published results included, was computed with the rounded ones.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / theta**exponents
    return frequencies.to(torch.bfloat16).float() if rounded else frequencies


def rotary_table(
    positions: Tensor, sections: Sequence[int], theta: float, rounded: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `rotate`, each `[L, 1, hd]` float32 with values that `dtype` can hold.

    positions `[3, L]` (time, height, width); sections: how many frequencies follow each axis, `sum * 2 == hd`.
    """
    half = sum(sections)
    frequencies = inverse_frequencies(2 * half, theta, rounded, positions.device)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections)).to(positions.device)
    angles = positions.to(torch.float32)[axis].T * frequencies  # [L, hd / 2]
    cos, sin = angles.cos().to(dtype).float(), angles.sin().to(dtype).float()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + hd/2) of x `[B, L, heads, hd]`, in float32; the result has x's dtype.

    Rolling x by half a head and giving the sines their signs beforehand saves splitting and joining x.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
