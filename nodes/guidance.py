"""What happens around the model in every sampling: guidance as the official code has it, exact masks, and its end."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from einops import rearrange
from torch import Tensor

from ..lance_core import flow
from ..lance_core.flow import Sampling
from .diffusion import check_latent_image

OPTION = "lance"  # of transformer_options: a Sampling, whose interval and renorm count


def attach(model: ModelPatcher) -> None:
    """Makes every sampler treat this model as the official code does."""
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, OPTION, sample)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, OPTION, predict)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, OPTION, lambda patcher: patcher.model.end_sampling())
    model.add_callback_with_key(CallbacksMP.ON_DETACH, OPTION, forget_unloaded)
    model.set_model_sampler_post_cfg_function(renormalize)
    set_guidance(model, Sampling())


def forget_unloaded(patcher: ModelPatcher, unloaded: bool) -> None:
    """Core also detaches a patcher when a clone takes its place; the weights then stay where they are."""
    if unloaded:
        patcher.model.forget()


def set_guidance(model: ModelPatcher, sampling: Sampling) -> None:
    model.model_options["transformer_options"][OPTION] = sampling


def guidance(model_options: dict[str, Any]) -> Sampling:
    return model_options["transformer_options"][OPTION]


def sample(
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
    check_latent_image(latent_image)
    try:
        samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    except BaseException:
        executor.class_obj.model_patcher.model.forget()
        raise
    if denoise_mask is None or sigmas[-1] > 0:
        return samples
    return torch.where(denoise_mask.to(samples) > 0, samples, latent_image.to(samples))


def predict(
    executor: WrapperExecutor, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Both branches, or outside of the guidance interval the conditional one alone, for both."""
    cond, *others = conds
    unguided = not flow.is_guided(timestep[0], guidance(model_options).interval)
    if not unguided or len(others) != 1 or others[0] is None:
        return executor(model, conds, x, timestep, model_options)
    out, _ = executor(model, [cond, None], x, timestep, model_options)
    return [out, out]


def renormalize(args: dict[str, Any]) -> Tensor:
    """The denoised latent, after guidance no longer a way from the noise than without."""
    x, cond = args["input"], args["cond_denoised"]
    if args["uncond"] is None or args["uncond_denoised"] is cond:
        return args["denoised"]
    settings = guidance(args["model_options"])
    sigma = args["sigma"].reshape(-1, 1, 1)

    def velocity(denoised: Tensor) -> Tensor:
        return rearrange(x - denoised, "B c t h w -> B (t h w) c") / sigma

    _, _, t, h, w = x.shape
    v = flow.renormalize(velocity(args["denoised"]), velocity(cond), settings.renorm, settings.renorm_min)
    return x - rearrange(v * sigma, "B (t h w) c -> B c t h w", t=t, h=h, w=w)
