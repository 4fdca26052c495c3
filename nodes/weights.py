"""Tensors of a checkpoint's files as ComfyUI reads them: mapped, so that weights stay on disk until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.utils
import torch
from torch import Tensor

from ..lance_core.packing import stored_formats
from ..lance_core.quantized import MARKER, Packed, dequantize, nf4_pairs, quantizable
from ..lance_core.storage import STORED_TYPES, Stored, fill
from .quantized import STORED, Tensors, check_layout, made_on_device, make_room, offered


def reader(stored: Mapping[str, Stored]) -> Callable[[Stored, torch.dtype | None], Tensor]:
    """What gives a stored tensor: mapped, or, as the numbers of GGUF files have to be, computed in the dtype given."""
    paths = {entry.file for entry in stored.values() if entry.file.suffix != ".gguf"}
    files = {path: comfy.utils.load_torch_file(str(path), safe_load=True) for path in paths}

    def read(entry: Stored, dtype: torch.dtype | None = None) -> Tensor:
        if entry.file in files:
            return files[entry.file][entry.name]
        out = torch.empty(entry.shape, dtype=dtype)
        fill([(out, entry)])
        return out

    return read


def read_weights(stored: Mapping[str, Stored]) -> Tensors:
    """Tensors by the names that a network has for them, from whichever files hold them."""
    read = reader(stored)
    return {name: read(entry) for name, entry in stored.items()}


def stored_layout(language: Mapping[str, Stored]) -> str | None:
    """The layout that a quantised checkpoint is loaded in by itself; None for a dense one.

    For formats that ComfyUI does not compute with: the best in eight bits that it has.
    """
    formats = set(stored_formats(language).values())
    if formats or any(e.file.suffix == ".gguf" and e.dtype not in STORED_TYPES for e in language.values()):
        known = len(formats) == 1 and formats <= STORED.keys()
        return formats.pop() if known else next(filter(offered, ("int8", "fp8")))
    return None


def dense_shapes(language: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's weights, whichever way they are stored, without building it."""
    formats = stored_formats(language)
    halves = {f"{layer}.weight" for layer, format in formats.items() if format not in STORED}  # two weights in a byte
    others = {layer + end for layer in formats for end in (MARKER, ".weight_scale")}
    return {
        name: (entry.shape[0], 2 * entry.shape[1]) if name in halves else entry.shape
        for name, entry in language.items()
        if name not in others
    }


def read_decoder(
    language: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, layout: str | None
) -> Tensors:
    """The decoder's weights, those of the large layers in a layout if there is one, one by one.

    shapes: of the dense weights, by name. dtype: of those that files have in another form.
    """
    if layout:
        check_layout(layout)
    formats = stored_formats(language)
    read = reader(language)
    out: Tensors = {}
    if layout:
        make_room({name: shape for name, shape in shapes.items() if quantizable(name)})
    for name in shapes:
        layer, entry = name.removesuffix(".weight"), language[name]
        target = layout if quantizable(name) else None
        exact = torch.float32 if target else dtype
        if layer in formats:
            packed = Packed(read(entry), read(language[f"{layer}.weight_scale"]))
            if formats[layer] == target:
                out |= STORED[target](layer, packed)
                continue
            weight = dequantize(packed, formats[layer], shapes[name][1], exact, nf4_pairs(packed.weight.device))
        else:
            weight = read(entry, exact)
        out |= made_on_device(layer, weight, target) if target else {name: weight}
    return out
