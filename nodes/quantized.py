"""Weights in ComfyUI's own quantised layouts, with which its own layers compute.

A quantised layer `X` has, beside the tensors of its layout (`X.weight`, `X.weight_scale`, ...), its layout's name and
settings in `X.comfy_quant`, JSON as uint8. Files of `python -m lance_core quantize` and of ComfyUI's Model Save are so,
and what is made here on load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import comfy.model_management
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from ..lance_core.errors import LanceError
from ..lance_core.quantized import E4M3_MAX, MARKER, Packed, quantizable, quantize

LAYOUT = "layout"  # where a model's `quant_config`, which core asks whether there is any, names it
ROTATIONS = (256, 64, 16, 4)  # sizes of the groups of inputs that core's 4-bit layout rotates, best first

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A layout of core's: its name there, the first ComfyUI that has it, and the bytes of a weight."""

    name: str
    since: str
    size: Callable[[int, int], int]  # of `[rows, columns]`
    make: Callable[[str, Tensor], Tensors]  # of a layer's name and its dense weight


def int8(layer: str, packed: Packed) -> Tensors:
    """A weight of `lance_core.quantized` as core's layout has it: the same."""
    return {**parts(layer, packed), layer + MARKER: marker({"format": "int8_tensorwise"})}


def fp8(layer: str, packed: Packed) -> Tensors:
    """A weight of `lance_core.quantized` as core's layout has it: with one scale.

    The scales of rows are powers of two, so a row's values keep their digits under another one, but for those that
    then lie below e4m3's normal numbers: these are rounded to multiples of 2^-9 of the scale.
    """
    largest = (packed.weight.float().abs().amax(1, keepdim=True) * packed.weight_scale).max()
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX))).clamp_min(packed.weight_scale.min())
    weight = (packed.weight.float() * (packed.weight_scale / scale)).to(torch.float8_e4m3fn)
    settings = {"format": "float8_e4m3fn"}
    # Core gives float8 layers a float8 input without a scale: cut off at 448, and coarse below 2^-6. Norms give inputs
    # that fit; products of the MLP grow to thousands, and what attention averages is small.
    if layer.rpartition(".")[2].removesuffix("_moe_gen") in ("down_proj", "o_proj"):
        settings["full_precision_matrix_mult"] = True
    return {**parts(layer, Packed(weight, scale)), layer + MARKER: marker(settings)}


def w4a8(layer: str, weight: Tensor) -> Tensors:
    """Four bits in groups of 16, rotated, made and computed with by core, which rounds the inputs to eight bits."""
    rotation = next(size for size in ROTATIONS if weight.shape[1] % size == 0)
    made = QuantizedTensor.from_float(weight, "AsymW4A8Int8Layout", convrot_groupsize=rotation)
    settings = {"format": "asym_w4a8_int8", "group_size": made.params.group_size, "convrot_groupsize": rotation}
    return {**made.state_dict(f"{layer}.weight"), layer + MARKER: marker(settings)}


STORED = {"fp8": fp8, "int8": int8}  # formats of `lance_core.quantized` that core has as well
INTEGER_LAYOUTS = ("int8", "w4a8")
LAYOUTS = {
    "fp8": Layout("float8_e4m3fn", "0.16", lambda n, k: n * k + 4, lambda x, w: fp8(x, quantize(w, "fp8", x))),
    "int8": Layout("int8_tensorwise", "0.27", lambda n, k: n * (k + 4), lambda x, w: int8(x, quantize(w, "int8", x))),
    "w4a8": Layout("asym_w4a8_int8", "0.31", lambda n, k: n * (k // 2 + k // 16 + 4) + 64, w4a8),
}


def parts(layer: str, packed: Packed) -> Tensors:
    return {f"{layer}.{part}": tensor for part, tensor in packed._asdict().items()}


def marker(settings: Mapping[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def offered(layout: str) -> bool:
    """Whether this ComfyUI has the layout."""
    return LAYOUTS[layout].name in QUANT_ALGOS


def check_layout(layout: str) -> None:
    """Raises LanceError where this ComfyUI has no such layout."""
    if not offered(layout):
        raise LanceError(
            f"this ComfyUI has no {layout} weights, which came with version {LAYOUTS[layout].since}: update it, or"
            " choose another weight_dtype."
        )


def make_room(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Frees what `made_on_device` takes for the largest of these weights: it, its codes and what leads to them."""
    largest = max(prod(shape) for shape in shapes.values())
    management = comfy.model_management
    management.free_memory(4 * torch.float32.itemsize * largest, management.get_torch_device())


def made_on_device(layer: str, weight: Tensor, layout: str) -> Tensors:
    """What a layer has in place of a dense weight, made on the device that computes and put where the weight was."""
    management = comfy.model_management
    device = management.get_torch_device() if management.is_nvidia() else torch.device("cpu")
    made = LAYOUTS[layout].make(layer, management.cast_to_device(weight, device, torch.float32))
    return {name: management.cast_to_device(tensor, weight.device, None) for name, tensor in made.items()}


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, layout: str | None) -> int:
    """Bytes of weights of these shapes, those of the large layers in a layout and the others in dtype."""
    return sum(
        LAYOUTS[layout].size(*shape) if layout and quantizable(name) else prod(shape) * dtype.itemsize
        for name, shape in shapes.items()
    )
