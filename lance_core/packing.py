"""Quantised weights in files: which layers are, in what format, and what their tensors have to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from .errors import LanceError
from .quantized import FORMATS, MARKER, empty_packed, format_of, quantizable, stored_as
from .storage import FILE_TYPES, Stored, pieces, reading

MARKER_SIZE = 4096  # bytes; ours have a few dozen
PARTS = ("weight", "weight_scale")
REQUANTIZE = "quantise the checkpoint again with `python -m lance_core quantize`"
TYPE_NAMES = {dtype: name for name, dtype in FILE_TYPES.items()}


def stored_formats(language: Mapping[str, Stored]) -> dict[str, str]:
    """The format of each layer that a file holds quantised, by the layer's name.

    Raises LanceError for a format that is unknown.
    """
    formats = {}
    for name, stored in language.items():
        layer = name.removesuffix(MARKER)
        if layer != name and quantizable(f"{layer}.weight"):
            text = _marker_text(stored)
            if (format := format_of(text)) is None:
                raise LanceError(
                    f"{stored.file}: the layer '{layer}' is quantised in a way that Lance does not know"
                    f" ({text[:80].decode(errors='replace')!r}); {REQUANTIZE}."
                )
            formats[layer] = format
    return formats


def _marker_text(stored: Stored) -> bytes:
    if stored.dtype != "U8" or len(stored.shape) != 1 or not 0 < stored.shape[0] <= MARKER_SIZE:
        return b""
    with reading(stored.file) as file:
        (piece,) = pieces(file, stored)
    return piece.numpy().tobytes()


def packed_entries(
    shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, stored types and shapes of the tensors of quantised layers, but for their markers.

    shapes: of the dense weights by name; formats: by layer.
    """
    entries = {}
    for layer, format in formats.items():
        for part, tensor in zip(PARTS, empty_packed(format, shapes[f"{layer}.weight"])):
            entries[f"{layer}.{part}"] = TYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    return entries


def whole_scales(language: Mapping[str, Stored], formats: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the scales of fp8 layers that ComfyUI has saved, which are one for a whole weight, by name."""
    scales = [f"{layer}.weight_scale" for layer, format in formats.items() if format == "fp8"]
    return {name: language[name].shape for name in scales if name in language and prod(language[name].shape) == 1}


def chosen_formats(weights: str, language: Iterable[str], stored: Mapping[str, str], file: object) -> dict[str, str]:
    """The format of each layer that is to be quantised in the loaded model.

    weights: "auto" (as stored) or one of `FORMATS`; language: names of the decoder's tensors; stored: of
    `stored_formats`. Raises LanceError for an unknown format, and where the file holds another.
    """
    if weights == "auto":
        return dict(stored)
    if weights not in FORMATS:
        raise LanceError(f"weights is {weights!r}; use auto, {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    if others := set(stored.values()) - {stored_as(weights)}:
        raise LanceError(
            f"{file} holds {min(others)} weights, which cannot become {weights}; leave weights at auto, or load the"
            " checkpoint that they were made from."
        )
    return {name.removesuffix(".weight"): weights for name in language if quantizable(name)}
