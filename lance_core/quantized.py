"""Quantised weights: the decoder's projections in 8 or 4 bits, everything else as it is.

| format | a weight | scales | bytes of a weight `[out, in]` |
|---|---|---|---|
| fp8 | e4m3 | float32 per row, a power of two | out * in + 4 * out |
| int8, int8-dynamic | -127..127 | float32 per row | out * in + 4 * out |
| int4 | 0..15, two in a byte | bfloat16 step and offset per 64 inputs | 36 * out * ceil(in / 64) |
| nf4 | one of 16 levels, two in a byte | bfloat16 per 64 inputs | 34 * out * ceil(in / 64) |

int8-dynamic is int8 whose inputs are rounded to 8 bits per token as well, where many tokens are computed at once.
Every scale is exact in bfloat16, so that a layer computes in bfloat16 or float32 from the same numbers. The levels of
nf4 are quantiles of the normal distribution (arXiv 2305.14314).
"""

from __future__ import annotations

import json
import re
from functools import cache
from math import ceil
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import LanceError

FORMATS = ("fp8", "int8", "int8-dynamic", "int4", "nf4")
STORED_FORMATS = ("fp8", "int8", "int4", "nf4")  # int8-dynamic is stored as int8
GROUP = 64  # inputs that share a scale in 4 bits
MARKER = ".comfy_quant"  # ComfyUI's: behind a layer's name, a tensor of bytes that spell out how it is quantised
MARKERS = {
    "fp8": {"format": "float8_e4m3fn"},
    "int8": {"format": "int8_tensorwise"},
    "int4": {"format": "lance_int4", "group_size": GROUP},
    "nf4": {"format": "lance_nf4", "group_size": GROUP},
}
PROJECTION = re.compile(
    r"language_model\.model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj(_moe_gen)?|mlp(_moe_gen)?\.(gate|up|down)_proj)\.weight"
)
BLOCK = 2**22  # weights that are quantised, and products of int8 that are scaled, at once
SMALLEST = 2.0**-126  # scale of a row of zeros: the smallest that no device rounds to zero
E4M3_MAX = 448.0
KERNEL_TOKENS = 4  # up to so many torch's int8 kernel on the CPU is faster than a matrix product
INT_MM_TOKENS = 17  # the fewest that torch._int_mm takes on CUDA (aten/src/ATen/native/cuda/Blas.cpp)


class Packed(NamedTuple):
    """A quantised weight, under the names of a layer's tensors."""

    weight: Tensor
    weight_scale: Tensor


def quantizable(name: str) -> bool:
    """Whether a tensor of the decoder, named as in the checkpoint, is quantised: the projections of both experts."""
    return PROJECTION.fullmatch(name) is not None


def check_format(format: str, formats: tuple[str, ...] = FORMATS) -> None:
    """Raises LanceError where that is no format."""
    if format not in formats:
        raise LanceError(f"{format!r} is not a format of weights; use {', '.join(formats[:-1])} or {formats[-1]}.")


def stored_as(format: str) -> str:
    """The format in files of a format of layers."""
    return "int8" if format == "int8-dynamic" else format


def empty_packed(format: str, shape: tuple[int, int], device: str | torch.device = "meta") -> Packed:
    """Memory for a weight `[out, in]` in that format, not yet filled."""
    rows, inputs = shape
    if format in ("int4", "nf4"):
        groups = ceil(inputs / GROUP)
        scales = (rows, groups, 2) if format == "int4" else (rows, groups)
        return Packed(
            torch.empty(rows, groups * GROUP // 2, dtype=torch.uint8, device=device),
            torch.empty(scales, dtype=torch.bfloat16, device=device),
        )
    dtype = torch.float8_e4m3fn if format == "fp8" else torch.int8
    return Packed(
        torch.empty(shape, dtype=dtype, device=device), torch.empty(rows, 1, dtype=torch.float32, device=device)
    )


def packed_bytes(format: str, shape: tuple[int, int]) -> int:
    """Bytes of a weight `[out, in]` in that format."""
    return sum(tensor.nbytes for tensor in empty_packed(format, shape))


def quantize(weight: Tensor, format: str, name: str = "the weight") -> Packed:
    """A weight `[out, in]` of any floating type in that format, on its device; on the meta device, its shapes.

    name: what to call the weight in an error. Raises LanceError for an unknown format, NaN and infinity.
    """
    check_format(format)
    packed = empty_packed(format, tuple(weight.shape), weight.device)
    if not weight.is_meta:
        pack(weight, format, packed, name)
    return packed


def pack(weight: Tensor, format: str, packed: Packed, name: str = "the weight") -> None:
    """As `quantize`, into memory of `empty_packed`; takes little more than that, a block of rows at a time."""
    code = {"fp8": _fp8, "int8": _int8, "int4": _int4, "nf4": _nf4}[stored_as(format)]
    blocks = [tensor.split(max(1, BLOCK // weight.shape[1])) for tensor in (weight, *packed)]
    for rows, codes, scales in zip(*blocks):
        if not torch.isfinite(rows).all():
            raise LanceError(f"{name} holds NaN or infinity and cannot be quantised; download or make it again.")
        for target, values in zip((codes, scales), code(rows.float())):
            target.copy_(values)


def _fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    mantissa, exponent = torch.frexp(rows.abs().amax(1, keepdim=True) / E4M3_MAX)
    exponent = exponent - (mantissa == 0.5).int()  # so that the scale is the least power of two that will do
    scale = torch.ldexp(torch.ones_like(mantissa), exponent).clamp_min(SMALLEST)
    return rows / scale, scale


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = _short(rows.abs().amax(1, keepdim=True) / 127).clamp_min(SMALLEST)
    return (rows / scale).round_().clamp_(-127, 127), scale


def _int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = _groups(rows)
    low, high = (limit[..., None] for limit in groups.aminmax(dim=-1))
    low, high = low.clamp_max(0), high.clamp_min(0)  # with 0 in reach the offset is at most 15 steps, and precise
    low, step = _short(low), _short(high / 15 - low / 15).clamp_min(SMALLEST)
    codes = ((groups - low) / step).round_().clamp_(0, 15)
    return _pairs(codes), torch.cat((step, low), dim=-1)


def _nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = _groups(rows)
    scale = _short(groups.abs().amax(-1, keepdim=True)).clamp_min(SMALLEST)
    levels = torch.tensor(nf4_levels(), device=rows.device)
    codes = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return _pairs(codes), scale[..., 0]


def _short(x: Tensor) -> Tensor:
    """The nearest number that is exact in bfloat16."""
    limit = torch.finfo(torch.bfloat16).max
    return x.clamp(-limit, limit).bfloat16().float()


def _groups(rows: Tensor) -> Tensor:
    """`[n, in]` -> `[n, groups, 64]`, the last group filled with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _pairs(codes: Tensor) -> Tensor:
    """Numbers below 16 `[n, groups, 64]`, two in a byte `[n, groups * 32]`: the first in the lower half."""
    first, second = rearrange(codes.to(torch.uint8), "n g (i two) -> two n (g i)", two=2)
    return first | second << 4


@cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 levels of nf4, ascending from -1 to 1.

    Quantiles of a normal distribution, 8 above 0, 7 below and 0 itself, of which the outermost stand as far inside the
    distribution as they would between equal shares of it (arXiv 2305.14314, 3; `create_normal_map` of bitsandbytes).
    """
    edge, normal = 1 - (1 / 30 + 1 / 32) / 2, NormalDist()
    above = [normal.inv_cdf(0.5 + (edge - 0.5) * i / 8) for i in range(1, 9)]
    below = [-normal.inv_cdf(0.5 + (edge - 0.5) * i / 7) for i in range(7, 0, -1)]
    return tuple(level / above[-1] for level in (*below, 0.0, *above))


def nf4_pairs(device: torch.device) -> Tensor:
    """What each byte of nf4 stands for, `[256, 2]`."""
    levels = torch.tensor(nf4_levels(), device=device)
    return torch.stack((levels.repeat(16), levels.repeat_interleave(16)), dim=1)


def dequantize(packed: Packed, format: str, inputs: int, dtype: torch.dtype, pairs: Tensor | None = None) -> Tensor:
    """The weight `[out, inputs]` in a floating type; pairs: of `nf4_pairs`, which nf4 needs."""
    weight, scale = packed.weight, packed.weight_scale.to(dtype)
    if format == "int4":
        codes = torch.stack((weight & 15, weight >> 4), dim=-1).view(*scale.shape[:2], GROUP).to(dtype)
        step, low = scale.unsqueeze(2).unbind(-1)
        return torch.addcmul(low, codes, step).flatten(1)[:, :inputs]
    if format == "nf4":
        values = F.embedding(weight.int(), pairs.to(dtype)).view(*scale.shape, GROUP)
        return values.mul_(scale[..., None]).flatten(1)[:, :inputs]
    return weight.to(dtype).mul_(scale)


class FrozenProduct(torch.autograd.Function):
    """What a quantised layer computes, where the gradient of its input is needed; of its weight there is none.

    Inputs are not rounded, and between forward and backward the weight is kept as it is stored.
    """

    @staticmethod
    def forward(context, x: Tensor, layer: QuantizedLinear) -> Tensor:
        context.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.dequantized(gradient.dtype), None


class QuantizedLinear(nn.Module):
    """A linear layer whose weight stays quantised; it computes in the dtype of its input.

    Its tensors are `weight` and `weight_scale` of `quantize`, and `bias`.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, format: str, in_features: int):
        super().__init__()
        self.format = format
        self.in_features = in_features
        self.out_features = packed.weight.shape[0]
        self.weight, self.weight_scale = (nn.Parameter(tensor, requires_grad=False) for tensor in packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        pairs = nf4_pairs(packed.weight.device) if format == "nf4" else None
        self.register_buffer("pairs", pairs, persistent=False)

    @property
    def dynamic(self) -> bool:
        """Whether inputs are quantised too; torch._int_mm needs sizes that are multiples of 8."""
        if self.format != "int8-dynamic" or self.weight.device.type not in ("cpu", "cuda"):
            return False
        return self.in_features % 8 == 0 and self.out_features % 8 == 0

    @property
    def suits_kernel(self) -> bool:
        """Whether torch's int8 kernel on the CPU can be used: other widths make it read beyond its inputs."""
        return stored_as(self.format) == "int8" and self.in_features % 64 == 0

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]`."""
        packed = Packed(self.weight, self.weight_scale)
        return dequantize(packed, stored_as(self.format), self.in_features, dtype, self.pairs)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if x.requires_grad:
            return FrozenProduct.apply(x, self)
        tokens = x.shape[:-1].numel()
        per_row = self.format not in ("int4", "nf4")
        if self.dynamic and tokens >= INT_MM_TOKENS:
            return self._with_bias(self._int8_product(x))
        if self.suits_kernel and tokens <= KERNEL_TOKENS and x.device.type == "cpu":
            scale = self.weight_scale.to(x.dtype).flatten()
            y = torch._weight_int8pack_mm(x.reshape(tokens, -1).contiguous(), self.weight, scale)
            return self._with_bias(y.unflatten(0, x.shape[:-1]))
        if per_row and tokens < self.in_features:  # fewer products than weights to scale
            return self._with_bias(F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype).flatten())
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def _int8_product(self, x: Tensor) -> Tensor:
        """The product of int8 weights and inputs, each token of which is rounded with a scale of its own."""
        tokens = x.shape[:-1].numel()
        y = x.new_empty(tokens, self.out_features)
        parts = ceil(tokens * self.out_features / BLOCK)  # of equal size, so that none is too short for torch._int_mm
        parts = max(1, min(parts, tokens // INT_MM_TOKENS))
        if torch.compiler.is_compiling():  # their number would be compiled in
            parts = 1
        for rows, out in zip(x.reshape(tokens, -1).tensor_split(parts), y.tensor_split(parts)):
            scale = (rows.abs().amax(1, keepdim=True).float() / 127).clamp_min(SMALLEST)
            codes = (rows / scale).round_().to(torch.int8)
            product = torch._int_mm(codes, self.weight.t()).float()
            out.copy_(product.mul_(scale).mul_(self.weight_scale.t()))
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.format}, in_features={self.in_features}, out_features={self.out_features}"


def layer_shape(module: nn.Module, layer: str) -> tuple[int, int]:
    """`(out, in)` of the linear layer of that name."""
    linear = module.get_submodule(layer)
    return linear.out_features, linear.in_features


def replace_layer(module: nn.Module, layer: str, format: str, packed: Packed) -> None:
    """Puts a quantised layer into a module where a linear one of that name stands, whose bias it keeps."""
    parent, _, child = layer.rpartition(".")
    old = module.get_submodule(layer)
    setattr(module.get_submodule(parent), child, QuantizedLinear(packed, old.bias, format, old.in_features))


def quantize_model(transformer: nn.Module, format: str) -> None:
    """Quantises the projections of a decoder in place, one by one. Raises LanceError as `quantize` does."""
    check_format(format)
    for name, weight in list(transformer.named_parameters()):
        if quantizable(name):
            replace_layer(transformer, name.removesuffix(".weight"), format, quantize(weight.detach(), format, name))


def marker(format: str) -> Tensor:
    """The bytes that say in a file how a layer is quantised, `[n]` uint8."""
    return torch.tensor(list(json.dumps(MARKERS[stored_as(format)]).encode()), dtype=torch.uint8)


def format_of(marker: bytes) -> str | None:
    """The format that a file's marker names; None where it is not one of ours."""
    try:
        values = json.loads(marker)
    except (ValueError, RecursionError):
        return None
    if isinstance(values, dict):
        values.pop("full_precision_matrix_mult", None)  # how ComfyUI computes with the weight, not how it is stored
    return next((format for format, known in MARKERS.items() if values == known), None)
