"""A sampling as a whole: what it refuses, what it leaves untouched, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor

from ..lance_core.checks import check_latent
from ..lance_core.errors import LanceError
from .quantized import LAYOUT

KEY = "lance"  # of wrappers and callbacks


def attach_sampling(model: ModelPatcher) -> None:
    """Wraps every sampling of this model, and ends it."""
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda patcher: patcher.model.end_sampling())
    model.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, forget_unloaded)


def forget_unloaded(patcher: ModelPatcher, unloaded: bool) -> None:
    """Core also detaches a patcher when a clone takes its place; the weights then stay where they are."""
    if unloaded:
        patcher.model.forget()


def outer_sample(
    executor: WrapperExecutor,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args,
    **kwargs,
) -> Tensor:
    """A whole sampling: what the mask leaves out stays as it is, bit for bit; a stopped one leaves nothing behind."""
    check_latent("the LATENT on the sampler", latent_image)
    model = executor.class_obj.model_patcher
    check_compilation(model)
    model.model.reading = None  # of a question: a sampling needs the room
    try:
        samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    except BaseException:
        model.model.forget()
        raise
    if denoise_mask is None:
        return samples
    return torch.where(denoise_mask.to(samples) > 0, samples, latent_image.to(samples))


def check_compilation(model: ModelPatcher) -> None:
    """Raises LanceError for weights that torch.compile cannot look through: core's 4-bit layers are no operators."""
    from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS  # which core itself imports late

    config = model.model.model_config
    if TORCH_COMPILE_KWARGS in model.model_options and config.quant_config and config.quant_config[LAYOUT] == "w4a8":
        raise LanceError("w4a8 weights cannot be compiled: leave out TorchCompileModel, or load int8, fp8 or bf16.")
