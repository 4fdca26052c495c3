"""A checkpoint written again with quantised weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import POSITION_TABLE
from .packing import PARTS, packed_entries
from .quantized import MARKER, STORED_FORMATS, check_format, marker, quantizable, quantize
from .rewriting import Entries, NewTensors, Rewritten, converted, kept_type, rewrite_checkpoint
from .storage import STORED_TYPES, Stored, fill


def quantize_checkpoint(source: str | Path, folder: str | Path, format: str, *, overwrite: bool = False) -> Rewritten:
    """`rewrite_checkpoint` with the decoder's projections quantised, and without the position table, a computed one.

    Raises LanceError for an unknown format too.
    """
    check_format(format, STORED_FORMATS)

    def rewrite(tensors: Mapping[str, Stored]) -> tuple[Entries, NewTensors]:
        needed = {name: stored for name, stored in tensors.items() if name != POSITION_TABLE}
        return rewritten_entries(needed, format), rewritten(needed, format)

    return rewrite_checkpoint(source, folder, rewrite, overwrite)


def rewritten_entries(tensors: Mapping[str, Stored], format: str) -> Entries:
    """Types and shapes of what is written in place of stored tensors."""
    layers = {name.removesuffix(".weight"): format for name in tensors if quantizable(name)}
    packed = packed_entries({name: stored.shape for name, stored in tensors.items()}, layers)
    markers = {layer + MARKER: ("U8", tuple(marker(format).shape)) for layer in layers}
    kept = {name: (kept_type(stored), stored.shape) for name, stored in tensors.items() if not quantizable(name)}
    return kept | packed | markers


def rewritten(tensors: Mapping[str, Stored], format: str) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """The same tensors, each as consecutive pieces that are used before the next tensor is asked for."""
    for name, stored in tensors.items():
        if quantizable(name):
            dense = torch.empty(stored.shape)
            fill([(dense, stored)])
            packed = quantize(dense, format, f"{stored.file}: the tensor '{stored.name}'")
            layer = name.removesuffix(".weight")
            yield from ((f"{layer}.{part}", [tensor]) for part, tensor in zip(PARTS, packed))
            yield layer + MARKER, [marker(format)]
        else:
            dtype = STORED_TYPES[kept_type(stored)]
            yield name, converted(stored, dtype)
