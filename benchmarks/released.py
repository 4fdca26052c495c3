"""The released model with random weights in any form, and the tasks that it is measured by."""

from __future__ import annotations

from dataclasses import dataclass

import measuring  # noqa: F401 - so that lance_core is found
import torch
from torch import Tensor, nn

from lance_core import flow
from lance_core.checkpoint import Lance
from lance_core.config import LanceConfig, TextConfig
from lance_core.flow import Sampling
from lance_core.placement import Placement, model_parts, weight_bytes
from lance_core.quantized import QuantizedLinear, quantize, quantize_model
from lance_core.sequence import Grid
from lance_core.tiny import TINY_TEXT, TINY_VAE, TINY_VISION, tokenizer_specification
from lance_core.tokenizer import IM_END, Tokenizer
from lance_core.transformer import LanceTransformer
from lance_core.vae import VAEConfig, WanVAE
from lance_core.vit import VisionTower

DEVIATION = 0.02  # of random weights
POOL = 2**22 + 15  # random numbers, repeated over all weights; an odd count, so that no two rows are alike


@dataclass(frozen=True)
class Task:
    """Something asked of the model, in pixels and frames. kind: "generate", "edit" or "question"."""

    title: str
    kind: str
    width: int
    height: int
    frames: int = 1
    seen: int = 0  # side of the picture for the vision tower

    @property
    def grid(self) -> Grid:
        return (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


TASKS = {
    "image": Task("text to image 768x768", "generate", 768, 768),
    "edit": Task("edit 768x768", "edit", 768, 768, seen=672),
    "clip": Task("text to video 848x480, 49 frames", "generate", 848, 480, 49),
    "long": Task("text to video 848x480, 121 frames", "generate", 848, 480, 121),
    "question": Task("question about 672x672", "question", 0, 0, seen=672),
}
TINY_TASKS = {
    "image": Task("text to image 64x64", "generate", 64, 64),
    "edit": Task("edit 64x64", "edit", 64, 64, seen=56),
    "clip": Task("text to video 64x32, 9 frames", "generate", 64, 32, 9),
    "long": Task("text to video 64x32, 17 frames", "generate", 64, 32, 17),
    "question": Task("question about 56x56", "question", 0, 0, seen=56),
}


@dataclass(frozen=True)
class Form:
    """How a model is kept: sizes, device, dtype, a format of quantised weights, and a budget of device memory."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    format: str | None = None
    budget: int | None = None  # bytes
    tiny: bool = False
    compiled: bool = False

    @property
    def config(self) -> LanceConfig:
        return LanceConfig(TINY_TEXT, TINY_VISION) if self.tiny else LanceConfig()


def random_model(form: Form, placement: type[Placement] = Placement) -> Lance:
    """A model in that form, made tensor by tensor, so that nothing is ever held in another form."""
    config, empty = form.config, {"dtype": form.dtype, "device": "meta"}
    transformer, vision = LanceTransformer(config.text, **empty), VisionTower(config.vision, **empty)
    vae = WanVAE(TINY_VAE if form.tiny else VAEConfig(), **empty)
    if form.format:
        quantize_model(transformer, form.format)
    fits = form.budget is None or weight_bytes(transformer, vision, vae) <= form.budget
    home = form.device if fits else torch.device("cpu")
    pool = DEVIATION * torch.randn(POOL, generator=torch.Generator(home).manual_seed(0), device=home)
    for network in (transformer, vision, vae):
        fill(network.requires_grad_(False).eval(), pool.to(form.dtype))
    tokenizer = Tokenizer(tokenizer_specification())
    transformer.language_model.lm_head.weight[tokenizer.special(IM_END)] = 0  # answers end at their limit only
    if form.compiled:
        transformer.compile_layers(form.device)
    places = placement(model_parts(transformer, vision, vae, present=fits), form.device, form.budget)
    return Lance(config, transformer, vision, vae, tokenizer, form.device, form.dtype, places)


def fill(network: nn.Module, pool: Tensor) -> None:
    """Gives a network on the meta device random weights in the place and the dtype of `pool`; norms are one."""
    for path, module in list(network.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "gamma" or parameter.ndim == 1 and name == "weight":
                value = torch.ones(parameter.shape, dtype=pool.dtype, device=pool.device)
            elif isinstance(module, QuantizedLinear) and name != "bias":
                continue
            else:
                value = drawn(parameter.shape, pool)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if isinstance(module, QuantizedLinear):
            packed = quantize(drawn(torch.Size((module.out_features, module.in_features)), pool), module.format)
            parent, _, child = path.rpartition(".")
            layer = QuantizedLinear(packed, module.bias, module.format, module.in_features)
            setattr(network.get_submodule(parent), child, layer)


def drawn(shape: torch.Size, pool: Tensor) -> Tensor:
    """A tensor of the pool's numbers."""
    value = torch.empty(shape, dtype=pool.dtype, device=pool.device)
    for part in value.view(-1).split(len(pool)):
        part.copy_(pool[: len(part)])
    return value


def pass_flops(config: TextConfig, tokens: int, context: int) -> float:
    """Of one branch in one step: matrix products of the layers, two operations for a multiplication and an addition.

    tokens: of the target, without its two boundaries; context: keys before them.
    """
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    weights = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size
    length = tokens + 2
    return config.num_hidden_layers * (2 * length * weights + 4 * length * (length + context) * d)


def sampling_flops(config: TextConfig, tokens: int, contexts: tuple[int, int], sampling: Sampling) -> float:
    """Of all steps; contexts: of the conditional and the unconditional branch."""
    guided, plain = official_steps(sampling)
    cond, uncond = (pass_flops(config, tokens, context) for context in contexts)
    return (guided + plain) * cond + guided * uncond


def official_steps(sampling: Sampling = Sampling()) -> tuple[int, int]:
    """Guided and plain steps of a schedule: 26 and 4."""
    guided = flow.guided_steps(flow.schedule(sampling.steps, sampling.shift), sampling.interval)
    return sum(guided), len(guided) - sum(guided)
