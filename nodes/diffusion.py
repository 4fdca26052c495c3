"""Lance as ComfyUI's samplers know models: what they call, ask for, and may put in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from einops import rearrange
from torch import Tensor

from ..lance_core.checkpoint import Lance
from ..lance_core.checks import check_grid
from ..lance_core.config import LanceConfig, TextConfig
from ..lance_core.errors import LanceError
from ..lance_core.flow import Sampling
from ..lance_core.request import Request, kind_of
from ..lance_core.sequence import Grid
from ..lance_core.stages import TOGETHER, Reading, noise_block, position_rows
from ..lance_core.tokenizer import Tokenizer
from ..lance_core.transformer import MLP_CHUNK, Branch, Context, LanceTransformer, NoiseBlock
from .attention import attention
from .batching import options_of, reordered
from .contexts import Contexts, Key, Weights, prefix_key, whole_key
from .quantized import INTEGER_LAYOUTS, LAYOUT
from .report import warnings_logged

COND = "lance_request"  # where a conditioning carries its request
SMALLEST = (1, 1, 1)  # a target, where only the context matters


class LanceDiffusion(LanceTransformer):
    """The decoder with the `forward` that ComfyUI calls at every step."""

    def __init__(self, text_config: TextConfig, *, dtype, device, operations):
        super().__init__(text_config, attention=attention, operations=operations, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context=None,
        control=None,
        transformer_options={},
        *,
        branches: Sequence[Branch],
        **_,
    ) -> Tensor:
        """Velocities on n branches of latents x `[n * B, 48, T, h, w]`, at times `[n * B]` or `[n * B, N]`."""
        wrappers = comfy.patcher_extension.get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self.velocity, self, wrappers)
        # EasyCache writes into x where it skips a step, and in float32 x is the sampler's own.
        return executor.execute(x.clone() if wrappers else x, timestep, branches, transformer_options)

    def velocity(self, x: Tensor, timestep: Tensor, branches: Sequence[Branch], transformer_options: dict) -> Tensor:
        _, _, t, h, w = x.shape
        rows = rearrange(x, "B c t h w -> B (t h w) c")
        times = timestep if timestep.ndim == 2 else timestep[:, None]
        options = (options_of(transformer_options, [index]) for index in range(len(branches)))
        attending = [replace(b, attention=partial(attention, transformer_options=o)) for b, o in zip(branches, options)]
        together = rows.shape[0] * rows.shape[1] <= TOGETHER
        v = torch.cat(self.batch_velocities(rows, times, attending, together=together))
        return rearrange(v, "B (t h w) c -> B c t h w", t=t, h=h, w=w)


class LanceModelConfig(comfy.supported_models_base.BASE):
    """What core wants to know of a model that it does not detect by itself."""

    unet_config = {}
    unet_extra_config = {}
    latent_format = comfy.latent_formats.Wan22
    sampling_settings = {"shift": Sampling.shift, "multiplier": 1.0}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    memory_usage_factor = 1.0  # not asked for: LanceModel counts bytes


class LanceSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Times as the official code has them, from 1 to 0.

    Core's schedulers pick from a table. With 25,200 entries "simple" picks exactly the official schedule's times where
    the number of steps divides it, as it does for 30, 50 and every number up to 10.
    """

    def set_parameters(self, shift: float = 1.0, timesteps: int = 25200, multiplier: float = 1.0) -> None:
        super().set_parameters(shift, timesteps, multiplier)


class RequestCond(comfy.conds.CONDRegular):
    """A request on its way through a sampler, which gives a forward as many of them as the memory has room for."""

    def __init__(self, cond: Request, tokens: int):
        super().__init__(cond)
        self.tokens = tokens

    def _copy_with(self, cond: Request):
        return type(self)(cond, self.tokens)

    def process_cond(self, batch_size, **_):
        return self

    def can_concat(self, other) -> bool:
        return True

    def concat(self, others) -> tuple[Request, ...]:
        return (self.cond, *(other.cond for other in others))

    def size(self) -> list[int]:
        return [1, 1, self.tokens]


class LanceModel(comfy.model_base.BaseModel):
    """Core's BaseModel around Lance.

    A conditioning carries a `Request`. What the model reads is built at sampling time, when the latent's size is known,
    and its keys and values are computed at the first step, when LoRAs, hooks and compilation are in place.
    """

    def __init__(self, model_config: LanceModelConfig, config: LanceConfig, tokenizer: Tokenizer, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=LanceDiffusion)
        self.model_sampling = LanceSampling(model_config)
        self.config = config
        self.tokenizer = tokenizer
        self.contexts = Contexts()
        self.noise_blocks: dict[tuple[Key, Grid], NoiseBlock] = {}  # of the sampling under way
        self.position_rows: dict[Grid, Tensor] = {}
        self.reading: tuple[Key, Reading] | None = None  # of the last question, by what it depends on

    def lance(self, device: torch.device) -> Lance:
        """What `lance_core` calls a model: the decoder, computing on a device in the dtype that ComfyUI has chosen."""
        dtype = self.get_dtype_inference()
        if dtype not in self.model_config.supported_inference_dtypes:
            raise LanceError(
                f"ComfyUI is set to compute in {str(dtype).removeprefix('torch.')}, in which Lance overflows: start it"
                " without --fp16-unet, or set ModelComputeDtype to bf16 or fp32."
            )
        return Lance(
            config=self.config,
            transformer=self.diffusion_model,
            vision=None,
            vae=None,
            tokenizer=self.tokenizer,
            device=device,
            dtype=dtype,
        )

    def extra_conds_shapes(self, **cond) -> dict[str, list[int]]:
        return {COND: [1, 1, self.context_tokens(request_of(cond))]}

    def extra_conds(self, **cond) -> dict[str, comfy.conds.CONDRegular]:
        request, noise = request_of(cond), cond["noise"]
        self.contexts.want(request, kind_of(noise.shape[2:]))
        out = super().extra_conds(**cond)
        out.pop("c_crossattn", None)
        out[COND] = RequestCond(request, self.context_tokens(request))
        if cond.get("denoise_mask") is not None:
            out["denoise_mask"] = comfy.conds.CONDNoiseShape(cond["denoise_mask"])
        return out

    def context_tokens(self, request: Request) -> int:
        return request.sequence(self.tokenizer, self.config.text, SMALLEST).find("noise")[0].start

    def memory_required(self, input_shape, cond_shapes={}) -> int:
        """Bytes beside the weights: of a layer of one branch and the streams of all, the noise blocks, the contexts."""
        net, dtype = self.diffusion_model, self.get_dtype_inference()
        contexts = [shape[-1] for shape in cond_shapes.get(COND, ())]
        target = input_shape[0] * math.prod(input_shape[2:])
        branch = math.ceil(target / max(1, len(contexts)))
        layer = net.working_memory(max(branch, *contexts, 0), dtype)
        layer += (target - branch) * self.config.text.hidden_size * dtype.itemsize
        if self.model_config.quant_config and self.model_config.quant_config[LAYOUT] in INTEGER_LAYOUTS:
            # Without its own CUDA kernels core makes the products of 8 bits in 32.
            layer += self.config.text.intermediate_size * min(max(branch, *contexts, 0), MLP_CHUNK) * 4
        return layer + net.noise_memory(math.prod(input_shape[2:]), dtype) + net.context_memory(sum(contexts), dtype)

    def scale_latent_inpaint(self, sigma, noise, latent_image, **_) -> Tensor:
        """What is not painted enters clean, at time 0, as the first frame of a clip does in the official code."""
        return latent_image

    def process_timestep(self, timestep: Tensor, x: Tensor, denoise_mask: Tensor | None = None, **_) -> Tensor:
        """Times in 0..1, `[B]`, or `[B, N]` where a mask leaves rows nearer to the clean latent."""
        t = timestep / getattr(self.model_sampling, "multiplier", 1.0)
        if denoise_mask is None:
            return t
        return t[:, None] * denoise_mask[:, 0].flatten(1).float()

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **conds
    ) -> Tensor:
        requests, mask = conds.pop(COND), conds.pop("denoise_mask", None)
        # Core puts the conditional branch last. EasyCache follows the first, which has to be there at every step.
        order = range(len(requests))[::-1]
        options = options_of(transformer_options, order)
        x, t = reordered(x, order), reordered(t, order)
        mask = None if mask is None else reordered(mask, order)
        branches = tuple(self.branch(requests[index], x, options_of(transformer_options, [index])) for index in order)
        out = super()._apply_model(
            x, t, c_concat, c_crossattn, control, options, branches=branches, denoise_mask=mask, **conds
        )
        return reordered(self.on_the_way(x, out, mask), order)

    def on_the_way(self, x: Tensor, out: Tensor, mask: Tensor | None) -> Tensor:
        """What core is told that x leads to, so that each row goes as far as its own time is from 0."""
        if mask is None:
            return out
        # Core goes the way from time t to the clean latent, where a row that the mask leaves at m·t is nearer. Rows at
        # time 0 keep it: the official renorm counts the velocities of a first frame.
        mask = mask[:, :1].to(out)
        return x - (x - out) * torch.where(mask > 0, mask, 1.0)

    def branch(self, request: Request, x: Tensor, transformer_options: dict) -> Branch:
        """The context and the noise block of a request whose target is x `[B, 48, T, h, w]`."""
        grid = tuple(x.shape[2:])
        kind, lance = kind_of(grid), self.lance(x.device)
        sequence = cache(lambda: request.sequence(self.tokenizer, self.config.text, grid))  # for the first step alone
        attend = partial(attention, transformer_options=transformer_options)
        prefill = partial(self.diffusion_model.prefill, dtype=lance.dtype, attention=attend)
        weights = self.weights(transformer_options)

        def whole() -> Context:
            before, own = request.blocks(sequence(), lance.device)
            prefix = self.contexts.get(prefix_key(request, kind), weights, request, lambda: prefill(before))
            return prefill(own, prefix)

        key = whole_key(request, kind)
        context = self.contexts.get(key, weights, request, whole)
        if (key, grid) not in self.noise_blocks:
            if grid not in self.position_rows:
                with warnings_logged():
                    check_grid(*grid)
                self.position_rows[grid] = position_rows(lance, grid)
            self.noise_blocks[key, grid] = noise_block(lance, sequence(), self.position_rows[grid])
        return Branch(context, self.noise_blocks[key, grid])

    def weights(self, transformer_options: dict) -> Weights:
        """What contexts depend on beside their requests: the patches, the hooks of this step, and the attention.

        Core gives the patches a new identity in every sampling that has hooks, so those find nothing of the last one.
        """
        patcher: ModelPatcher = self.current_patcher
        hooks = () if patcher.current_hooks is None else tuple(patcher.current_hooks.hooks)
        strengths = tuple((getattr(hook, "strength_model", None), hook.strength) for hook in hooks)
        override = transformer_options.get("optimized_attention_override")
        return Weights(tuple(hook.hook_ref for hook in hooks), (patcher.patches_uuid, strengths, override))

    def end_sampling(self) -> None:
        self.noise_blocks, self.position_rows = {}, {}
        self.contexts.end()

    def forget(self) -> None:
        """Gives back all memory beside the weights."""
        self.noise_blocks, self.position_rows, self.reading = {}, {}, None
        self.contexts.clear()


def lance_of(model: ModelPatcher) -> LanceModel:
    """The Lance on a MODEL wire; LanceError for other models."""
    if not isinstance(model.model, LanceModel):
        raise LanceError("the model on this wire is not Lance: connect the MODEL of Load Lance.")
    return model.model


def request_of(cond: dict) -> Request:
    """The request that a conditioning carries; without its words where Conditioning Zero Out has been there.

    Raises LanceError for other models' conditionings, and for two that were put one behind the other.
    """
    request, tensor = cond.get(COND), cond.get("cross_attn")
    if not isinstance(request, Request) or tensor is None:
        raise LanceError("this conditioning is another model's: connect Lance Conditioning to the sampler.")
    if tensor.shape[1] != 1:
        raise LanceError(
            "Lance reads one text, and cannot read what Conditioning (Concat) has joined: write both texts into one"
            " Lance Conditioning, or use Conditioning (Combine)."
        )
    return request if torch.any(tensor) else replace(request, unconditional=True)
