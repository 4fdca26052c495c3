"""LoRAs on a loaded model, computed beside its weights.

A layer with weight W computes W x + B (A x), so that W is neither changed nor copied: the model without its LoRAs is
the one they were applied to, bit for bit; quantised weights and weights that wait in the host's memory serve as they
are; and in bfloat16 a small change is not lost in the rounding of a large weight. The price are two thin products per
layer. A LoRA for good costs nothing when it is merged into a checkpoint (`merging`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoint import Lance
from .checks import check_number, warn
from .errors import LanceError
from .lora import TARGET, convert_lora, read_config
from .quantized import QuantizedLinear
from .transformer import LanceTransformer

BASE = "base"  # the name of the layer inside a LoraLinear
DAMAGED = "is damaged or no file of tensors: download or save it again"
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
STRONGEST = 100.0


class Factors(NamedTuple):
    """A change B A of a weight `[out, in]`, scaled."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]


class LoraLinear(nn.Module):
    """A linear layer and, beside it, a change of low rank: base(x) + scale * B A x, in the dtype of x.

    base: `nn.Linear` or `QuantizedLinear`. a `[rank, in]`, b `[out, rank]`.
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float = 1.0):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        inner = F.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(inner * self.scale, self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scale={self.scale:g}"


@torch.inference_mode(False)
def apply_loras(lance: Lance, loras: Iterable[tuple[str | Path, float]]) -> Lance:
    """The model with LoRA files of these strengths beside its weights, all of which it shares with the one given.

    The one given stays as it is: to be rid of a LoRA, go on with that. strength: 1 as trained, 0 nothing, below 0 the
    other way. Files of any style of `lora` are read that hold products of two factors for linear layers.
    What a picture was read to (`stages.read`) belongs to one of the two models. Under a budget of device memory
    (`load_lance`) the factors, which stay on the device, are taken off it. Raises LanceError for a file that is missing
    or damaged, that was trained on another model (the layer and both sizes are named), or that changes weights in
    another way (LoKr, LoHa, DoRA and whole weights).
    """
    weights = weight_shapes(lance.transformer)
    added: dict[str, list[Factors]] = {}
    for path, strength in loras:
        for module, factors in read_low_rank(path, strength, weights).items():
            added.setdefault(module, []).append(factors)
    if not added:
        return lance
    transformer = sharing(lance.transformer)
    for module, several in added.items():
        add_branch(transformer, module, joined(several), lance.device, lance.dtype)
    extra = sum(factors.a.numel() + factors.b.numel() for several in added.values() for factors in several)
    placement = lance.placement.shared(transformer, extra * lance.dtype.itemsize)
    return replace(lance, transformer=transformer, placement=placement)


def read_low_rank(path: str | Path, strength: float, weights: Mapping[str, Sequence[int]]) -> dict[str, Factors]:
    """The changes in a LoRA's file, times `strength`, by module, in float32; none at strength 0.

    weights: shapes by module. Raises LanceError as `apply_loras` does, and for what is no linear layer.
    """
    path = Path(path).expanduser()
    check_number(f"the strength of LoRA {path.name}", strength, -STRONGEST, STRONGEST)
    tensors, metadata = read_tensors(path)
    lora = convert_lora(tensors, weights, read_config(path, tensors, metadata), path.name)
    if lora.unmatched:
        warn(
            f"LoRA {path.name}: {len(lora.unmatched)} of its tensors are left out, for Lance has no such weight, such"
            f" as '{lora.unmatched[0]}'."
        )
    return {} if strength == 0 else low_rank(lora.tensors, strength, path.name)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors of a safetensors file, or of a file of torch, and the former's metadata."""
    if not path.is_file():
        raise LanceError(f"LoRA {path} does not exist; check the name and the folder.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}, None
    except Exception as error:  # of a damaged file torch raises whatever its parsers meet first
        raise LanceError(f"LoRA {path.name} {DAMAGED}.") from error


def low_rank(lora: Mapping[str, Tensor], strength: float, file: str) -> dict[str, Factors]:
    """The factors of tensors under ComfyUI's names, scaled by `strength` and alpha / rank, in float32, by module.

    file: what to call the LoRA in an error. Raises LanceError where a weight is changed in another way, or by NaN.
    """
    left = set(lora)
    found = {}
    for a_name, b_name in PAIRS:
        for name in [name for name in lora if name.endswith(f".{a_name}")]:
            path = name.removesuffix(f".{a_name}")
            names = name, f"{path}.{b_name}", f"{path}.alpha"
            a, b = lora[name].float(), lora[names[1]].float()
            alpha = float(lora[names[2]]) if names[2] in lora else len(a)
            scaled = b * (strength * alpha / len(a))
            if not (torch.isfinite(a).all() and torch.isfinite(scaled).all()):
                raise LanceError(f"LoRA {file} holds NaN or infinity for {path.removeprefix(TARGET)}: train it again.")
            found[path.removeprefix(TARGET)] = Factors(a, scaled)
            left.difference_update(names)
    if left:
        raise LanceError(
            f"LoRA {file} changes weights by more than two factors ('{min(left).removeprefix(TARGET)}'), which only"
            " ComfyUI's Load LoRA (Lance) can do: use it there."
        )
    return found


def joined(several: Sequence[Factors]) -> Factors:
    """One change that is the sum of several."""
    return Factors(torch.cat([factors.a for factors in several]), torch.cat([factors.b for factors in several], dim=1))


def add_branch(transformer: nn.Module, module: str, factors: Factors, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a change beside a layer of the transformer, in place."""
    layer = transformer.get_submodule(module)
    if not isinstance(layer, (nn.Linear, QuantizedLinear, LoraLinear)):
        raise LanceError(
            f"a LoRA for {module} cannot be applied beside it, for that is no linear layer: merge it into a checkpoint"
            " with `python -m lance_core merge`."
        )
    a, b = (factor.to(device, dtype) for factor in factors)
    if isinstance(layer, LoraLinear):
        before = Factors(layer.lora_A.detach(), layer.lora_B.detach() * layer.scale)
        layer, (a, b) = layer.base, joined([before, Factors(a, b)])
    replace_module(transformer, module, LoraLinear(layer, a, b).requires_grad_(False).eval())


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def sharing(transformer: LanceTransformer) -> LanceTransformer:
    """A copy of the modules around the same tensors."""
    kept = (*transformer.parameters(), *transformer.buffers(), transformer.attention)
    return copy.deepcopy(transformer, {id(thing): thing for thing in kept})


def weight_shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by module, `(out, in)` of a linear one however it is stored."""
    shapes = {}
    for name, module in transformer.named_modules():
        if name.endswith(f".{BASE}"):
            continue
        if isinstance(module, (nn.Linear, QuantizedLinear, LoraLinear)):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(getattr(module, "weight", None), Tensor):
            shapes[name] = tuple(module.weight.shape)
    return shapes


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH."""
    name, separator, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    return (Path(name), strength) if separator and math.isfinite(strength) else (Path(text), 1.0)
