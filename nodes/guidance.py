"""Guidance as the official code has it, in every sampler: its interval, and the correction of its length."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..lance_core import flow
from ..lance_core.flow import RENORMS, Sampling
from ..lance_core.shortcuts import Difference
from .diffusion import lance_of

OPTION = "lance"  # of transformer_options: a Sampling, whose interval, renorm and guidance_every count
DIFFERENCE = "lance_difference"  # of a sampling's own transformer_options: the Difference that its steps share
KEY = "lance_guidance"  # of wrappers
MAX_EVERY = 10


def attach_guidance(model: ModelPatcher) -> None:
    """Makes samplers with two branches guide this model as the official code does."""
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_conds)
    model.set_model_sampler_post_cfg_function(post_cfg)
    set_guidance(model, Sampling())


def set_guidance(model: ModelPatcher, sampling: Sampling) -> None:
    model.model_options["transformer_options"][OPTION] = sampling


def guidance(model_options: dict[str, Any]) -> Sampling:
    return model_options["transformer_options"][OPTION]


def outer_sample(executor: WrapperExecutor, *args, **kwargs) -> Tensor:
    """A whole sampling, whose model options core has made for it alone and drops with it, however it ends."""
    options = executor.class_obj.model_options
    every = guidance(options).guidance_every
    if every > 1:
        options["transformer_options"][DIFFERENCE] = Difference(every)
    return executor(*args, **kwargs)


def calc_conds(
    executor: WrapperExecutor, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Both branches, computed or, from the conditional one, by what separated them last.

    Outside of the guidance interval the conditional one alone, for both.
    """
    if len(conds) != 2 or None in conds:
        return executor(model, conds, x, timestep, model_options)

    def evaluate(count: int) -> list[Tensor]:
        return executor(model, [conds[0], conds[1] if count == 2 else None], x, timestep, model_options)[:count]

    if not flow.is_guided(timestep[0], guidance(model_options).interval):
        return 2 * evaluate(1)
    difference = model_options["transformer_options"].get(DIFFERENCE)
    if difference is None or "context_handler" in model_options:  # each window of a clip would need its own
        return evaluate(2)
    return difference.branches(evaluate, timestep.reshape(-1, 1, 1, 1, 1))


def post_cfg(args: dict[str, Any]) -> Tensor:
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


class LanceGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceGuidance",
            display_name="Lance Guidance",
            category="Lance",
            description="Sets when guidance acts and how it is kept from burning the picture, for every sampler and for"
            " Lance Generate and Lance Edit. Load Lance has the official settings already.",
            search_aliases=["lance cfg", "guidance interval", "cfg renorm", "cfg rescale"],
            inputs=[
                io.Model.Input("model", tooltip="What is guided differently: the MODEL of Load Lance."),
                io.Float.Input(
                    "guidance_start",
                    default=Sampling.interval[0],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lower guides longer and slower: below this time (1 is noise, 0 the picture) it is off.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=Sampling.interval[1],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lower leaves the first, noisiest steps unguided: above this time guidance is off.",
                ),
                io.Combo.Input(
                    "renorm",
                    options=list(RENORMS),
                    default=Sampling.renorm,
                    tooltip="Keeps strong guidance from burning the picture: over the whole of it, per token, or not"
                    " at all.",
                ),
                io.Float.Input(
                    "renorm_min",
                    default=Sampling.renorm_min,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Higher lets guidance keep more of its strength; 1 switches the correction off.",
                    advanced=True,
                ),
                io.Int.Input(
                    "guidance_every",
                    default=Sampling.guidance_every,
                    min=1,
                    max=MAX_EVERY,
                    tooltip="Higher is faster and changes the picture a little: guidance is computed on every n-th step"
                    " alone and reused in between. 1 is exact.",
                    advanced=True,
                    optional=True,
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        guidance_start: float,
        guidance_end: float,
        renorm: str,
        renorm_min: float,
        guidance_every: int = Sampling.guidance_every,
    ) -> io.NodeOutput:
        lance_of(model)
        settings = Sampling(
            interval=(guidance_start, guidance_end),
            renorm=renorm,
            renorm_min=renorm_min,
            guidance_every=guidance_every,
        )
        model = model.clone()
        set_guidance(model, settings)
        return io.NodeOutput(model)
