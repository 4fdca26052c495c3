"""LoRA: a frozen model, and beside its layers changes of low rank that are trained (arXiv 2106.09685)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..adapters import LoraLinear, replace_module
from ..checks import check_number, check_whole
from ..config import TextConfig
from ..errors import LanceError
from ..lora import DIFFUSERS_CONFIG, TARGET
from ..media import replacing
from ..quantized import layer_shape

EXPERTS = {"understanding": "", "generation": "_moe_gen"}  # and how their modules' names end
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
AROUND = {  # targets outside the layers: whose they are, and their modules
    "vae2llm": ("generation", ("vae2llm",)),
    "llm2vae": ("generation", ("llm2vae",)),
    "time_embedder": ("generation", ("time_embedder.mlp.0", "time_embedder.mlp.2")),
    "lm_head": ("understanding", ("language_model.lm_head",)),
}
TARGETS = (*ATTENTION, *MLP, *AROUND)
HEADER = "lance_lora"  # in the file's metadata: what the LoRA was trained on


@dataclass(frozen=True)
class LoraConfig:
    """What is trained beside the frozen weights. A change is alpha / rank * B A.

    experts: "understanding" (text and what is looked at), "generation" (what is painted), or both. layers: "all" or
    their numbers from 0. targets: of `TARGETS`; those outside the layers belong to one expert. Raises LanceError for
    what cannot be.
    """

    rank: int = 16
    alpha: float = 16.0
    experts: tuple[str, ...] = tuple(EXPERTS)
    layers: Literal["all"] | tuple[int, ...] = "all"
    targets: tuple[str, ...] = (*ATTENTION, *MLP)

    def __post_init__(self):
        check_whole("lora.rank", self.rank, 1)
        check_number("lora.alpha", self.alpha, 0)
        if self.alpha == 0:
            raise LanceError("lora.alpha is 0, so that nothing could be learnt: give a number above 0, such as rank.")
        check_names("lora.experts", self.experts, EXPERTS)
        check_names("lora.targets", self.targets, TARGETS)
        if self.layers != "all":
            check_layers(self.layers)
        for target, (expert, _) in AROUND.items():
            if target in self.targets and expert not in self.experts:
                raise LanceError(
                    f"lora.targets has {target!r}, which belongs to the {expert} expert: add that to lora.experts, or"
                    " leave the target out."
                )


def check_names(name: str, given: Sequence[str], known: Sequence[str] | Mapping) -> None:
    """Some of the known names, each once."""
    good = isinstance(given, (tuple, list)) and given and set(map(str, given)) <= set(known)
    if not good or len(set(given)) < len(given):
        raise LanceError(f"{name} is {given!r}: list some of {', '.join(known)}, each once.")


def check_layers(layers: Sequence[int]) -> None:
    if not isinstance(layers, (tuple, list)) or not layers:
        raise LanceError(f"lora.layers is {layers!r}: give 'all' or a list of numbers.")
    for layer in layers:
        check_whole("a number in lora.layers", layer, 0)


def lora_modules(config: LoraConfig, text: TextConfig) -> list[str]:
    """Names of the modules that get a LoRA; raises LanceError for a layer that the model has not."""
    last = text.num_hidden_layers - 1
    layers = range(last + 1) if config.layers == "all" else sorted(set(config.layers))
    if layers and max(layers) > last:
        raise LanceError(f"lora.layers has {max(layers)}, but the model's layers are 0 to {last}: leave it out.")
    names = []
    for layer in layers:
        for expert in config.experts:
            end = EXPERTS[expert]
            parts = {**dict.fromkeys(ATTENTION, f"self_attn.{{}}{end}"), **dict.fromkeys(MLP, f"mlp{end}.{{}}")}
            inside = (parts[target].format(target) for target in config.targets if target in parts)
            names += [f"language_model.model.layers.{layer}.{name}" for name in inside]
    return names + [module for target in config.targets if target in AROUND for module in AROUND[target][1]]


def add_lora(
    transformer: nn.Module, config: LoraConfig, generator: torch.Generator | None = None
) -> list[nn.Parameter]:
    """Freezes a `LanceTransformer`, puts LoRAs beside its layers in place, and returns their parameters.

    These are float32, each pair A `[rank, in]`, B `[out, rank]`; A is drawn as in PEFT from `generator` (of the CPU,
    whatever the device; None: one of seed 0, so that all processes draw the same), B is 0, so that the model first
    computes what it did. The weights may be quantised. Raises LanceError for a layer that the model has not, and for
    one that has a LoRA.
    """
    names = lora_modules(config, transformer.config)
    generator = generator or torch.Generator().manual_seed(0)
    transformer.requires_grad_(False)
    for name in names:
        base = transformer.get_submodule(name)
        if isinstance(base, LoraLinear):
            raise LanceError(f"the model has a LoRA beside {name} already: merge it first, or load the model again.")
        rows, columns = layer_shape(transformer, name)
        device = base.weight.device
        a = (2 * torch.rand(config.rank, columns, generator=generator) - 1) / math.sqrt(columns)
        b = torch.zeros(rows, config.rank, device=device)
        layer = LoraLinear(base, a.to(device), b, config.alpha / config.rank)
        replace_module(transformer, name, layer.train(transformer.training))
    return [parameter for _, parameter in named_lora(transformer)]


def named_lora(transformer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The LoRA parameters under the names of their tensors in files, without the prefix."""
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLinear):
            yield f"{name}.lora_A.weight", module.lora_A
            yield f"{name}.lora_B.weight", module.lora_B


def lora_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """What `save_lora` takes: the trained tensors as they are now, by name."""
    return {name: parameter.detach() for name, parameter in named_lora(transformer)}


def save_lora(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    text: TextConfig,
    *,
    step: int = 0,
) -> Path:
    """Writes a LoRA as one safetensors file, complete or not at all, and returns its path.

    tensors: of `lora_tensors`, or averages of them. text: the base model's sizes. Names are PEFT's behind
    `diffusion_model.`, as ComfyUI's own loader maps them, and each module's alpha stands beside its factors, so that
    ComfyUI, its Load LoRA (Lance) and `apply_loras` scale alike. The header holds PEFT's settings and what was trained.
    Raises LanceError where the file cannot be written.
    """
    path = Path(path).expanduser()
    stored = {f"{TARGET}{name}": tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    stored |= {f"{TARGET}{module}.alpha": torch.tensor(float(config.alpha)) for module in modules}
    content = save(stored, {"format": "pt", **header(config, text, modules, step)})
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


def header(config: LoraConfig, text: TextConfig, modules: Sequence[str], step: int) -> dict[str, str]:
    """The settings of a LoRA for its file's header: PEFT's, and ours."""
    peft = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(modules),
    }
    own = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "experts": list(config.experts),
        "layers": config.layers if config.layers == "all" else list(config.layers),
        "targets": list(config.targets),
        "step": step,
    }
    return {DIFFUSERS_CONFIG: json.dumps(peft), HEADER: json.dumps(own)}
