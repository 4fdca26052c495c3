# ruff: noqa: E402, I001  (nothing of ComfyUI can be imported before it has begun)
"""Runs in ComfyUI's interpreter, with the pack loaded there as ComfyUI loads it, and prints measurements as JSON.

What the tests of `test_sampling.py` assert is measured here in one go, because starting ComfyUI takes seconds.
Arguments: the folder of ComfyUI, a small checkpoint, and a file for the results.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

from inside import begin

COMFYUI, CHECKPOINT, RESULTS = sys.argv[1:]
begin(COMFYUI)

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.samplers
import nodes as core
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import CFGGuider, KSamplerSelect, Noise_RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_advanced import (
    ModelComputeDtype,
    ModelSamplingAuraFlow,
    ModelSamplingFlux,
    ModelSamplingSD3,
)
from comfy_extras.nodes_torch_compile import TorchCompileModel
from torch import Tensor

from lance.lance_core import load_lance, stages
from lance.lance_core.shortcuts import Difference
from lance.lance_core.transformer import LanceTransformer
from lance.nodes import guidance
from lance.nodes.conditioning import LanceConditioning
from lance.nodes.diffusion import COND
from lance.nodes.encode import EncodeSemantic
from lance.nodes.guidance import LanceGuidance
from lance.nodes.model import load_model
from lance.nodes.paint import LanceEdit, LanceGenerate
from lance.nodes.sigmas import LanceSigmas
from lance.nodes.understand import ask

PROMPT, SEED, STEPS = "a red fox on a stone", 7, 6
SMALL = {"size": "custom", "width": 64, "height": 48}
EMPTY = torch.zeros(1, 48, 1, 3, 4)
WIDGETS = {"seed": SEED, "steps": STEPS, "guidance": 4.0, "batch_size": 1, "shift": 3.5}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except BaseException as error:  # an interruption is no Exception
        return f"{type(error).__name__}: {error}"
    return "no error"


class Counted:
    """The decoder's prefills, and the tokens in them, while this is entered."""

    def __enter__(self) -> Counted:
        self.count, self.tokens, self.original = 0, 0, LanceTransformer.prefill

        def prefill(transformer, blocks, *args, **kwargs):
            self.count += 1
            self.tokens += sum(block.positions.shape[1] for block in blocks)
            return self.original(transformer, blocks, *args, **kwargs)

        LanceTransformer.prefill = prefill
        return self

    def __exit__(self, *_) -> None:
        LanceTransformer.prefill = self.original


library = load_lance(CHECKPOINT, device="cpu", dtype="fp32")
model = load_model(CHECKPOINT, "default")
positive, negative = LanceConditioning.execute(model, PROMPT, "", "edit").args
picture = torch.rand(1, 112, 112, 3, generator=torch.Generator().manual_seed(0))
semantic = EncodeSemantic.execute(model, picture, "native").args[0]
reference = stages.encode_latent(library, picture, resolution=None)


def ksampler(
    patcher=model, positive=positive, negative=negative, latent=EMPTY, mask=None, sampler="euler", scheduler="simple",
    seed=SEED, steps=STEPS, cfg=4.0, denoise=1.0,
) -> Tensor:  # fmt: skip
    latent = {"samples": latent} if mask is None else {"samples": latent, "noise_mask": mask}
    (out,) = core.common_ksampler(
        patcher, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise
    )
    return out["samples"]


def custom(patcher=model, steps=STEPS) -> Tensor:
    (guider,) = CFGGuider.execute(patcher, positive, negative, 4.0).args
    (sampler,) = KSamplerSelect.execute("euler").args
    (sigmas,) = LanceSigmas.execute(steps, 3.5, 1.0).args
    noise = Noise_RandomNoise(SEED)
    return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, {"samples": EMPTY}).args[0]["samples"]


def generated(patcher=model, frames=1, first=None, **changes) -> Tensor:
    first = None if first is None else {"samples": first}
    return LanceGenerate.execute(patcher, PROMPT, frames, SMALL, first, **WIDGETS | changes).args[0]["samples"]


def edited(patcher=model, **changes) -> Tensor:
    latent = {"samples": reference}
    return LanceEdit.execute(patcher, semantic, latent, PROMPT, "edit", **WIDGETS | changes).args[0]["samples"]


def equality() -> dict[str, float]:
    """Relative distances between the three ways to the same latent."""
    size = {"width": 64, "height": 48, "seed": SEED, "steps": STEPS}
    base = stages.generate(library, PROMPT, **size)
    first = drawn(1, 48, 1, 3, 4)
    clip = stages.generate(library, PROMPT, frames=9, first_frame=first, **size)
    edit = stages.edit(library, semantic, reference, PROMPT, seed=SEED, steps=STEPS)
    seen, unseen = LanceConditioning.execute(model, PROMPT, "", "edit", semantic, {"samples": reference}).args
    settings = LanceGuidance.execute(model, 0.1, 0.9, "channel", 0.3).args[0]
    options = {"guidance_interval": (0.1, 0.9), "renorm": "channel", "renorm_min": 0.3}
    guided = stages.generate(library, PROMPT, **size, **options)
    seldom = LanceGuidance.execute(model, 0.1, 0.9, "global", 0.0, 2).args[0]
    options = {"guidance_interval": (0.1, 0.9), "guidance_every": 2}
    reused = stages.generate(library, PROMPT, **size, **options)
    reused_clip = stages.generate(library, PROMPT, frames=9, first_frame=first, **size, **options)
    shifted = stages.generate(library, PROMPT, shift=5.0, **size)
    long = stages.generate(library, PROMPT, **size | {"steps": 30})
    mask = torch.ones(1, 1, 3, 3, 4)
    mask[:, :, 0] = 0
    start = torch.cat((first, torch.zeros(1, 48, 2, 3, 4)), dim=2)
    four = torch.randn(4, 48, 1, 3, 4, generator=torch.Generator().manual_seed(SEED))
    return {
        "LanceGenerate": distance(generated(), base),
        "KSampler": distance(ksampler(), base),
        "SamplerCustomAdvanced": distance(custom(), base),
        "30 steps, KSampler": distance(ksampler(steps=30), long),
        "LanceEdit": distance(edited(), edit),
        "edit, KSampler": distance(ksampler(positive=seen, negative=unseen, latent=torch.zeros_like(reference)), edit),
        "first frame, LanceGenerate": distance(generated(frames=9, first=first), clip),
        "first frame, KSampler": distance(ksampler(latent=start, mask=mask), clip),
        "LanceGuidance, LanceGenerate": distance(generated(settings), guided),
        "LanceGuidance, KSampler": distance(ksampler(settings), guided),
        "guidance every 2, LanceGenerate": distance(generated(seldom), reused),
        "guidance every 2, KSampler": distance(ksampler(seldom), reused),
        "guidance every 2, KSampler again": distance(ksampler(seldom), reused),
        "guidance every 2, first frame": distance(generated(seldom, frames=9, first=first), reused_clip),
        "shift, LanceGenerate": distance(generated(shift=5.0), shifted),
        "batch of four": distance(generated(batch_size=4), stages.generate(library, PROMPT, noise=four, **size)),
        "batch, KSampler": distance(ksampler(latent=EMPTY.repeat(4, 1, 1, 1, 1)), generated(batch_size=4)),
        "weights in bf16, computing in float32": distance(
            generated(load_model(CHECKPOINT, "bf16")),
            stages.generate(rounded_weights(), PROMPT, **size),
        ),
    }


def rounded_weights():
    """The library's model with weights that bf16 can hold, computing in float32."""
    lance = load_lance(CHECKPOINT, device="cpu", dtype="fp32")
    for parameter in lance.transformer.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return lance


def samplers() -> dict[str, bool]:
    """Whether every sampler and scheduler of core gives a finite latent."""
    results = {name: ksampler(sampler=name) for name in comfy.samplers.SAMPLER_NAMES}
    results |= {name: ksampler(scheduler=name) for name in comfy.samplers.SCHEDULER_NAMES}
    return {name: bool(torch.isfinite(latent).all()) for name, latent in results.items()}


def in_two_parts(latent: Tensor, mask: Tensor | None = None) -> Tensor:
    """KSamplerAdvanced twice: the first hands its leftover noise to the second."""
    advanced = core.KSamplerAdvanced().sample
    middle = STEPS // 2
    first = {"samples": latent} if mask is None else {"samples": latent, "noise_mask": mask}
    common = (SEED, STEPS, 4.0, "euler", "simple", positive, negative)
    (second,) = advanced(model, "enable", *common, first, 0, middle, "enable")
    (out,) = advanced(model, "disable", *common, second, middle, STEPS, "disable")
    return out["samples"]


def core_nodes() -> dict[str, float]:
    """Distances from plain sampling with core's nodes in between."""
    base, long = ksampler(), ksampler(steps=20)
    zeroed = core.ConditioningZeroOut().zero_out(positive)[0]
    other = LanceConditioning.execute(model, PROMPT, "ugly, blurred", "edit").args[1]
    easy, lazy = (node.execute(model, 0.2, 0.15, 0.95, False).args[0] for node in (EasyCacheNode, LazyCacheNode))
    upscaled = core.LatentUpscale().upscale({"samples": base}, "nearest-exact", 128, 96, "disabled")[0]["samples"]
    return {
        "KSamplerAdvanced in two parts": distance(in_two_parts(EMPTY), base),
        "ModelSamplingFlux": distance(ksampler(ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)[0]), base),
        "ModelSamplingAuraFlow": distance(ksampler(ModelSamplingAuraFlow().patch_aura(model, 3.5)[0]), base),
        "ConditioningZeroOut": distance(ksampler(negative=zeroed), base),
        "negative prompt": distance(ksampler(negative=other), base),
        "ConditioningCombine": distance(ksampler(positive=[*positive, *positive]), base),
        "cfg 1": distance(ksampler(cfg=1.0), base),
        "ModelSamplingSD3 3.5": distance(ksampler(ModelSamplingSD3().patch(model, 3.5)[0]), base),
        "ModelSamplingSD3 8": distance(ksampler(ModelSamplingSD3().patch(model, 8.0)[0]), base),
        "EasyCache": distance(ksampler(easy, steps=20), long),
        "LazyCache": distance(ksampler(lazy, steps=20), long),
        "TorchCompileModel": distance(ksampler(TorchCompileModel.execute(model, "inductor").args[0], steps=2),
                                      ksampler(steps=2)),
        "ModelComputeDtype bf16": distance(ksampler(ModelComputeDtype().patch(model, "bf16")[0]), base),
        "upscaled, denoise 0.5": distance(ksampler(latent=upscaled, denoise=0.5), upscaled),
        "upscaled, rows": upscaled.shape[-2],
        "the model again": distance(ksampler(), base),
    }  # fmt: skip


def masks() -> dict[str, object]:
    """What a mask leaves, and what it changes, for a still and a clip; and a first frame."""
    result = {}
    for name, frames in (("picture", 1), ("clip", 3)):
        latent, mask = drawn(1, 48, frames, 8, 8), torch.zeros(1, 1, 128, 128)
        mask[..., :64] = 1
        out = ksampler(latent=latent, mask=mask, denoise=0.8)
        result[f"{name} kept"] = torch.equal(out[..., 4:], latent[..., 4:])
        result[f"{name} changed"] = distance(out[..., :4], latent[..., :4])
    latent, mask = drawn(1, 48, 1, 8, 8), torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    parts, whole = in_two_parts(latent, mask), ksampler(latent=latent, mask=mask)
    result["two parts kept"] = torch.equal(parts[..., 4:], latent[..., 4:])
    result["two parts and one"] = distance(parts, whole)
    result["soft"] = {strength: soft_mask(strength) for strength in (1.0, 0.5, 0.1)}
    first = drawn(1, 48, 1, 3, 4)
    result["first frame kept"] = torch.equal(generated(frames=9, first=first)[:, :, :1], first)
    return result


def soft_mask(strength: float) -> float:
    """The noise that is left by a model that knows the clean latent, where the mask lets only a part through.

    A row at time m·t is the clean latent and m·t of noise, so its velocity is (row - clean) / (m·t).
    """
    clean = drawn(1, 48, 1, 8, 8)
    rows = model.model.process_latent_in(clean)
    original = type(model.model.diffusion_model).velocity

    def velocity(self, x: Tensor, timestep: Tensor, branch, transformer_options) -> Tensor:
        return (x - rows) / timestep.reshape(1, 1, 1, 8, 8)

    type(model.model.diffusion_model).velocity = velocity
    try:
        out = ksampler(latent=clean, mask=torch.full((1, 1, 128, 128), strength), steps=20, cfg=1.0)
    finally:
        type(model.model.diffusion_model).velocity = original
    return distance(out, clean)


def lora(name: str) -> dict[str, Tensor]:
    weight = dict(model.model.diffusion_model.named_parameters())[f"{name}.weight"]
    key = f"diffusion_model.{name}"
    return {f"{key}.lora_A.weight": drawn(4, weight.shape[1]), f"{key}.lora_B.weight": drawn(weight.shape[0], 4)}


def caching() -> dict[str, object]:
    """Prefills in a row of samplings, each with one thing changed."""
    comfy.model_management.unload_all_models()
    patched = comfy.sd.load_lora_for_models(model, None, lora(TEXT_LAYER), 0.5, 0)[0]
    words, _ = LanceConditioning.execute(model, "another text", "", "edit").args
    seen, unseen = LanceConditioning.execute(model, PROMPT, "", "edit", semantic, {"samples": reference}).args
    asked, unasked = LanceConditioning.execute(model, "other words", "", "edit", semantic, {"samples": reference}).args
    latent = torch.zeros_like(reference)
    runs = {
        "first": lambda: ksampler(),
        "seed": lambda: ksampler(seed=8),
        "size": lambda: ksampler(latent=torch.zeros(1, 48, 1, 4, 4)),
        "the short way, same words": lambda: generated(),
        "words": lambda: ksampler(positive=words),
        "edit": lambda: ksampler(positive=seen, negative=unseen, latent=latent),
        "edit, seed": lambda: ksampler(positive=seen, negative=unseen, latent=latent, seed=9),
        "edit, words": lambda: ksampler(positive=asked, negative=unasked, latent=latent),
        "LoRA behind the conditioning": lambda: ksampler(patched),
        "LoRA, seed": lambda: ksampler(patched, seed=8),
        "without LoRA": lambda: ksampler(),
    }
    counts = {}
    for name, run in runs.items():
        with Counted() as counted:
            run()
        counts[name] = counted.count
    kept = len(model.model.contexts.kept)
    comfy.model_management.unload_all_models()
    return {
        "prefills": counts,
        "kept": kept,
        "kept after unloading": len(model.model.contexts.kept),
        "LoRA's effect on words alone": distance(ksampler(patched), ksampler()),
    }


TEXT_LAYER = "language_model.model.layers.0.self_attn.v_proj"


def questions() -> dict[str, object]:
    """Tokens prefilled for a row of questions, and answers beside the library's."""
    comfy.model_management.unload_all_models()
    patched = comfy.sd.load_lora_for_models(model, None, lora(TEXT_LAYER), 0.5, 0)[0]
    other = EncodeSemantic.execute(model, 1 - picture, "native").args[0]
    *_, words = stages.question_blocks(library, [semantic], "what is this?", None)[1]
    rows = {
        "first": (model, [semantic], "what is it?", None),
        "again": (model, [semantic], "what is this?", None),
        "LoRA": (patched, [semantic], "what is this?", None),
        "without LoRA": (model, [semantic], "what is this?", None),
        "another system prompt": (model, [semantic], "what is this?", "Answer in French."),
        "another picture": (model, [other], "what is this?", None),
        "no picture": (model, [], "what is this?", None),
    }
    tokens, answers = {}, {}
    for name, row in rows.items():
        with Counted() as counted:
            answers[name] = ask(*row, max_new_tokens=6)
        tokens[name] = counted.tokens
    expected = {
        name: stages.understand(library, semantics, question, system=system, max_new_tokens=6)
        for name, (patcher, semantics, question, system) in rows.items()
        if patcher is model
    }
    kept = model.model.reading is not None
    comfy.model_management.unload_all_models()
    return {
        "tokens": tokens,
        "words": words.without_last().positions.shape[1],
        "picture": len(semantic.embeddings),
        "same answers": [name for name in expected if answers[name] == expected[name]],
        "asked": list(expected),
        "kept": kept,
        "kept after unloading": model.model.reading is not None,
    }


def hooks() -> dict[str, float]:
    """A LoRA as a hook on the conditioning: its keys and values are the patched model's."""
    hook = comfy.hooks.create_hook_lora(lora(TEXT_LAYER), 0.5, 0)
    hooked = [comfy.hooks.set_hooks_for_conditioning(conds, hook) for conds in (positive, negative)]
    patched = comfy.sd.load_lora_for_models(model, None, lora(TEXT_LAYER), 0.5, 0)[0]
    plain = ksampler()
    keyframes = comfy.hooks.HookKeyframeGroup()
    for step in range(STEPS):
        keyframes.add(comfy.hooks.HookKeyframe(strength=step / STEPS, start_percent=step / STEPS))
    changing = comfy.hooks.create_hook_lora(lora(TEXT_LAYER), 0.5, 0)
    changing.set_keyframes_on_hooks(keyframes)
    moving = comfy.hooks.set_hooks_for_conditioning(positive, changing)
    model.model.forget()
    most, original = 0, model.model.contexts.get

    def watched(*args):
        nonlocal most
        context = original(*args)
        most = max(most, len(model.model.contexts.kept))
        return context

    model.model.contexts.get = watched
    try:
        ksampler(positive=moving)
    finally:
        del model.model.contexts.get
    with Counted() as one_side:
        ksampler(positive=hooked[0])
    return {
        "contexts under keyframes": most,
        "prefills with a hook on one side": one_side.count,
        "hook and LoRA": distance(ksampler(positive=hooked[0], negative=hooked[1]), ksampler(patched)),
        "hook and nothing": distance(ksampler(positive=hooked[0], negative=hooked[1]), plain),
        "afterwards": distance(ksampler(), plain),
    }


def seldom_guided() -> dict[str, object]:
    """Guidance on every second guided step: how often each branch is computed, and what is left of it."""
    model_every_2 = LanceGuidance.execute(model, 0.4, 1.0, "global", 0.0, 2).args[0]
    made: list[weakref.ref] = []
    passes, original = 0, type(model.model.diffusion_model).velocity
    stop_at = 0

    def velocity(self, x: Tensor, timestep: Tensor, branches, transformer_options) -> Tensor:
        nonlocal passes
        passes += len(branches)
        if 0 < stop_at <= passes:
            raise comfy.model_management.InterruptProcessingException()
        return original(self, x, timestep, branches, transformer_options)

    class Watched(Difference):
        def __init__(self, every: int):
            super().__init__(every)
            made.append(weakref.ref(self))

    def counted(*args, **kwargs) -> int:
        nonlocal passes
        passes = 0
        ksampler(*args, steps=30, **kwargs)
        return passes

    guidance.Difference, type(model.model.diffusion_model).velocity = Watched, velocity
    try:
        plain = counted()
        unmade = len(made)
        every_2, cfg_1 = counted(model_every_2), counted(model_every_2, cfg=1.0)
        heun = counted(model_every_2, sampler="heun")
        in_windows = [counted(windows(each), latent=torch.zeros(1, 48, 6, 3, 4)) for each in (model, model_every_2)]
        before, passes, stop_at = ksampler(model_every_2), 0, 5
        error = message(lambda: ksampler(model_every_2, seed=1))
        stop_at = 0
        after = ksampler(model_every_2)
    finally:
        guidance.Difference, type(model.model.diffusion_model).velocity = Difference, original
    gc.collect()
    return {
        "passes": {"exact": plain, "every 2": every_2, "cfg 1": cfg_1, "heun": heun},
        "passes in context windows": in_windows,
        "made without": unmade,
        "made": len(made),
        "left": sum(ref() is not None for ref in made),
        "error": error,
        "after a stop": distance(after, before),
        "effect": distance(after, ksampler()),
    }  # fmt: skip


def windows(patcher: ModelPatcher) -> ModelPatcher:
    """The model looking at four latent frames at a time."""
    kinds = {"context_schedule": "standard_static", "fuse_method": "pyramid"}
    sizes = {"context_length": 4, "context_overlap": 2, "context_stride": 1, "dim": 2}
    switches = {"closed_loop": False, "freenoise": False}
    return ContextWindowsManualNode.execute(patcher, **kinds, **sizes, **switches).args[0]


def partial_loading() -> dict[str, object]:
    """One forward with a third of the weights loaded, through the patcher."""
    latent, time = drawn(1, 48, 1, 3, 4), torch.tensor([0.7])
    request = positive[0][1][COND]

    def forward(patcher) -> Tensor:
        patcher.pre_run()
        try:
            return patcher.model.apply_model(latent, time, **{COND: (request,)}, transformer_options={})
        finally:
            patcher.cleanup()

    whole = forward(model)
    comfy.model_management.unload_all_models()
    part = model.clone()
    part.load(torch.device("cpu"), lowvram_model_memory=part.model_size() // 3)
    result = {"loaded": part.loaded_size() / part.model_size(), "equal": torch.equal(forward(part), whole)}
    part.detach()
    return result


def stopped() -> dict[str, object]:
    """What an interrupted sampling leaves, and in which attention call it stops."""
    comfy.model_management.unload_all_models()
    calls, original = [], comfy.model_management.throw_exception_if_processing_interrupted

    def stop_at_the_tenth() -> None:
        calls.append(1)
        if len(calls) == 10:
            raise comfy.model_management.InterruptProcessingException()

    comfy.model_management.throw_exception_if_processing_interrupted = stop_at_the_tenth
    try:
        error = message(ksampler)
    finally:
        comfy.model_management.throw_exception_if_processing_interrupted = original
    left = len(model.model.contexts.kept) + len(model.model.noise_blocks) + len(model.model.contexts.wanted)
    return {"error": error, "calls": len(calls), "left": left, "then": distance(ksampler(), custom())}


def mistakes() -> dict[str, str]:
    """What people are told."""
    foreign = [[torch.zeros(1, 77, 768), {}]]
    clip = [[torch.ones(1, 1, 1), {COND: "not a request"}]]
    cpu = torch.device("cpu")
    other = ModelPatcher(torch.nn.Linear(1, 1), cpu, cpu)
    half = ModelComputeDtype().patch(model, "fp16")[0]
    frames = drawn(1, 48, 1, 3, 4)
    return {
        "another model": message(lambda: LanceGuidance.execute(other, 0.4, 1.0, "global", 0.0)),
        "another model's words": message(lambda: LanceConditioning.execute(other, PROMPT, "", "edit")),
        "another model's picture": message(lambda: generated(other)),
        "conditioning of another model": message(lambda: ksampler(positive=foreign)),
        "conditioning of something else": message(lambda: ksampler(positive=clip)),
        "joined conditionings": message(
            lambda: ksampler(positive=core.ConditioningConcat().concat(positive, positive)[0])
        ),
        "latent with NaN": message(lambda: ksampler(latent=EMPTY * float("nan"))),
        "long negative prompt": message(lambda: LanceConditioning.execute(model, PROMPT, "ugly " * 6000, "edit")),
        "latent of another model": message(lambda: ksampler(latent=drawn(1, 4, 8, 8))),
        "float16": message(lambda: ksampler(half)),
        "too large": message(lambda: ksampler(latent=torch.zeros(1, 48, 1, 65, 4))),
        "too long": message(lambda: ksampler(latent=torch.zeros(1, 48, 32, 3, 4))),
        "semantic alone": message(lambda: LanceConditioning.execute(model, PROMPT, "", "edit", semantic)),
        "first frames for three": message(lambda: generated(frames=9, first=frames.repeat(3, 1, 1, 1, 1))),
        "batch as a reference": message(
            lambda: LanceEdit.execute(model, semantic, {"samples": frames.repeat(2, 1, 1, 1, 1)}, PROMPT, "edit",
                                      **WIDGETS)
        ),
    }  # fmt: skip


def estimates() -> dict[str, int]:
    """Bytes that core is told beside the weights."""
    host = model.model
    context = host.extra_conds_shapes(**{COND: positive[0][1][COND], "cross_attn": torch.ones(1, 1, 1)})
    tokens = context[COND][-1]
    shapes = {COND: [context[COND]]}
    return {
        "small": host.memory_required([1, 48, 1, 3, 4]),
        "large": host.memory_required([1, 48, 1, 48, 48]),
        "two": host.memory_required([2, 48, 1, 48, 48]),
        "context": host.memory_required([1, 48, 1, 48, 48], shapes) - host.memory_required([1, 48, 1, 48, 48]),
        "keys and values": host.diffusion_model.context_memory(tokens),
    }


MEASUREMENTS = (
    *(equality, samplers, core_nodes, masks, caching, questions, hooks),
    *(seldom_guided, partial_loading, stopped, mistakes, estimates),
)

with torch.inference_mode():
    results = {measure.__name__: measure() for measure in MEASUREMENTS}
Path(RESULTS).write_text(json.dumps(results, indent=1))
