"""The order of conditionings in a batch, which core puts together of as many as the memory has room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OF_BRANCHES = (
    "cond_or_uncond",
    "uuids",
)  # transformer_options with one value for each branch of a batch


def reordered(x: Tensor, order: Sequence[int]) -> Tensor:
    """A batch `[n * B, ...]` with its n branches in another order."""
    if len(order) == 1:
        return x
    parts = x.chunk(len(order))
    return torch.cat([parts[index] for index in order])


def options_of(options: dict[str, Any], branches: Sequence[int]) -> dict[str, Any]:
    """transformer_options that speak of these branches of a batch, in this order."""
    own = {key: [options[key][index] for index in branches] for key in OF_BRANCHES if key in options}
    return {**options, **own}
