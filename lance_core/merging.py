"""A checkpoint written again with LoRAs in its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Factors, read_low_rank
from .errors import LanceError
from .lora import module_weights
from .rewriting import Entries, NewTensors, Rewritten, converted, kept_type, rewrite_checkpoint
from .storage import STORED_TYPES, Stored, fill

Changes = Mapping[str, Sequence[Factors]]  # by tensor


def merge_checkpoint(
    source: str | Path, folder: str | Path, loras: Iterable[tuple[str | Path, float]], *, overwrite: bool = False
) -> Rewritten:
    """`rewrite_checkpoint` with LoRA files of these strengths in the weights, each in the dtype in which it is stored.

    Sums are computed in float32 and rounded once. Raises LanceError as `apply_loras` does too, and without a LoRA.
    """
    loras = list(loras)
    if not loras:
        raise LanceError("there is no LoRA to merge: name one with --lora FILE.")

    def rewrite(tensors: Mapping[str, Stored]) -> tuple[Entries, NewTensors]:
        changes = read_changes(loras, tensors)
        return {name: (kept_type(stored), stored.shape) for name, stored in tensors.items()}, merged(tensors, changes)

    return rewrite_checkpoint(source, folder, rewrite, overwrite)


def read_changes(loras: Iterable[tuple[str | Path, float]], tensors: Mapping[str, Stored]) -> Changes:
    weights = module_weights({name: stored.shape for name, stored in tensors.items()})
    changes: dict[str, list[Factors]] = {}
    for path, strength in loras:
        for module, factors in read_low_rank(path, strength, weights).items():
            changes.setdefault(f"{module}.weight", []).append(factors)
    return changes


def merged(tensors: Mapping[str, Stored], changes: Changes) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """The tensors with their changes, one by one."""
    for name, stored in tensors.items():
        dtype = STORED_TYPES[kept_type(stored)]
        if name in changes:
            weight = torch.empty(stored.shape)
            fill([(weight, stored)])
            for a, b in changes[name]:
                weight.view(len(weight), -1).addmm_(b, a)
            yield name, [weight.to(dtype)]
        else:
            yield name, converted(stored, dtype)
