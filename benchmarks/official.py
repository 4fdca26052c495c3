"""The official code and ours on a CPU, one after the other: `python benchmarks/official.py --official CHECKOUT`.

CHECKOUT is a clone of github.com/bytedance/Lance, of which `modeling`, `common`, `config` and `data` are read. It wants
transformers 4.49.0, imageio and PyYAML beside torch and what `lance_core` needs: give it an environment of its own.
Nothing of it is copied here, and no file of it is changed.

Both sides get the same random weights, token ids, positions' grids and embeddings of the reference, and compute in
float32. The official loops `validation_gen_KVcache` and `validation_und_KVcache` run as they are, but for what a CPU
lacks, which is put in their way from outside:

- `flash_attn_varlen_func` is torch's scaled_dot_product_attention;
- `torch.bfloat16`, to which the decoder casts in several places, reads as float32 inside that one module;
- the vision tower gives fixed embeddings at once, here as there.

That both sides compute the same is checked: their answers have to be equal, and the relative distance of their latents
and of what their VAEs give is printed with the times. "ours in bf16" stands beside the official float32 and is no
comparison of code: a CPU runs the official one in float32 only. Memory peaks are those of processes of their own, once
the model is made.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from cpu import per_branch
from measuring import in_own_process, least, peak_gigabytes, seconds, table
from operations import Operations, count_per_call
from torch import Tensor, nn
from vae import official_vae
from workload import (
    ANSWER,
    PROMPT,
    SEEN,
    SIZES,
    TITLES,
    Request,
    Size,
    answer,
    drawn,
    model,
    seconds_per_token,
)

from lance_core import flow
from lance_core.checkpoint import Lance
from lance_core.sequence import build
from lance_core.stages import normalize
from lance_core.tokenizer import VIDEO_PAD, VISION_END, VISION_START
from lance_core.vae import WanVAE

# How the official data code marks tokens (data/datasets_custom/validation_dataset.py, modality_map).
MODALITY = {"text": -1, "caption": 0, "noise": 1, "source": 2, "identity": 3, "semantic": 4}
NEVER = -1  # a stop token that never comes


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **lengths: object) -> Tensor:
    """flash-attn's `flash_attn_varlen_func` for one sample: q `[L, nh, hd]`, k and v `[S, nkv, hd]`.

    A causal mask stands at the lower right, as in flash-attn since 2.1.
    """
    mask = None
    if causal and len(q) > 1:
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


class Float32Torch(ModuleType):
    """torch, for a module that shall not cast to bfloat16."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


class FixedTower(nn.Module):
    """A vision tower that has seen everything already."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.embeddings = embeddings

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        return self.embeddings


def import_official(checkout: str) -> ModuleType:
    """The package `modeling.lance` of the checkout, ready for a CPU."""
    stub = ModuleType("flash_attn")
    stub.__spec__ = ModuleSpec("flash_attn", None)
    stub.flash_attn_varlen_func = attention
    sys.modules["flash_attn"] = stub
    sys.path.insert(0, checkout)
    import modeling.lance
    from modeling.lance import qwen2_navit

    qwen2_navit.torch = Float32Torch("torch")
    return modeling.lance


def official_model(package: ModuleType, lance: Lance, frames: int) -> nn.Module:
    """The official model with the sizes and the weights of ours, for so many latent frames."""
    from common.utils.misc import AutoEncoderParams

    config, special = lance.config.text, lance.tokenizer.special
    llm_config = package.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling={"type": "default", "mrope_section": list(config.mrope_section)},
        layer_module="Qwen2MoTDecoderLayer",
        qk_norm=True,
        qk_norm_und=True,
        qk_norm_gen=True,
        apply_qwen_2_5_vl_pos_emb=True,
        vision_config={"spatial_merge_size": 2, "tokens_per_second": config.tokens_per_second},
        image_token_id=config.vocab_size,  # as officially, pictures too are made of video tokens
        video_token_id=special(VIDEO_PAD),
        vision_start_token_id=special(VISION_START),
        vision_end_token_id=special(VISION_END),
    )
    lance_config = package.LanceConfig(
        llm_config=llm_config,
        vit_config=argparse.Namespace(patch_size=14),
        vae_config=AutoEncoderParams(downsample_spatial=16, downsample_temporal=4, z_channels=48),
        latent_patch_size=(1, 1, 1),
        max_latent_size=64,
        max_num_frames=4 * frames - 3,
    )
    tower = FixedTower(drawn(SEEN[1] * SEEN[2], config.hidden_size))
    official = package.Lance(
        language_model=package.Qwen2ForCausalLM(llm_config),
        vit_model=tower,
        vit_type="qwen_2_5_vl_original",
        config=lance_config,
    ).eval()
    missing, unknown = official.load_state_dict(lance.transformer.state_dict(), strict=False, assign=True)
    if set(missing) - {"latent_pos_embed.pos_embed"} or unknown:
        raise SystemExit(f"the official model has other weights than ours: {missing}, {unknown}")
    return official


def merged_grid(grid: tuple[int, int, int]) -> list[int]:
    """A visual block's grid as the official rotary index wants it, which halves every side."""
    t, h, w = grid
    return [t, 2 * h, 2 * w]


@dataclass(frozen=True)
class OfficialRequest:
    """The same request for the official model."""

    official: nn.Module
    request: Request

    @cached_property
    def inputs(self) -> dict[str, object]:
        """The arguments of `validation_gen_KVcache` that do not depend on the sampling."""
        sequence, size = self.request.sequence, self.request.size
        segments = sequence.segments[: sequence.segments.index(sequence.find("noise")[0]) + 1]
        length = segments[-1].end
        modality = torch.cat([torch.full((s.end - s.start,), MODALITY[s.role]) for s in segments])
        visual = [s for s in segments if s.grid is not None]
        inner = {s: torch.arange(s.start + 1, s.end - 1) for s in visual}
        vit = [inner[s] for s in visual if s.role == "semantic"]
        vae = [inner[s] for s in visual if s.role != "semantic"]
        is_text = torch.ones(length, dtype=torch.bool)
        is_text[torch.cat([*vit, *vae])] = False
        t, h, w = size.grid
        picture = [4 * t - 3, 16 * h, 16 * w]
        grids = torch.tensor([merged_grid(s.grid) for s in visual])
        _, latents = self.request.request.references()
        latents = [latent.permute(1, 2, 3, 0) for latent in latents]
        vit_grids = torch.tensor([merged_grid(s.grid) for s in visual if s.role == "semantic"])
        return dict(
            val_packed_text_ids=sequence.ids[:length],
            val_packed_text_indexes=is_text.nonzero().flatten(),
            val_packed_vit_tokens=[torch.zeros(int(vit_grids.prod(1).sum()), 1)] if vit else None,
            val_packed_vit_token_indexes=torch.cat(vit) if vit else None,
            val_sample_lens=[length],
            val_packed_position_ids=torch.arange(length),
            val_split_lens=[s.end - s.start for s in segments],
            val_attn_modes=[s.attention for s in segments],
            val_sample_N_target=[1],
            vit_video_grid_thw=vit_grids if vit else None,
            video_grid_thw=[grids],
            val_mse_loss_indexes=vae[-1],
            val_packed_vae_token_indexes=torch.cat(vae),
            val_padded_latent=[*latents, torch.zeros(*self.request.grid, 48)],
            sample_task=torch.zeros(length, dtype=torch.long),
            sample_modality=modality,
            video_sizes=[picture] * len(vae),
            apply_qwen_2_5_vl_pos_emb=True,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    def run(self, steps: int) -> Tensor:
        """The normalised latent `[N, 48]` after some steps from the noise that `noise` returns."""
        with torch.inference_mode():
            results = self.official.validation_gen_KVcache(
                **self.inputs,
                timestep_shift=3.5,
                num_timesteps=steps,
                cfg_interval=[0.4, 1.0],
                cfg_text_scale=4.0,
                validation_noise_seed=1,
            )
        return results[0][-1].reshape(-1, 48)

    def noise(self) -> Tensor:
        """The target's rows `[N, 48]` of the draw that the official loop makes."""
        n = self.request.size.tokens
        blocks = len(self.inputs["video_sizes"])
        return torch.randn(blocks * n, 48, generator=torch.Generator().manual_seed(1))[-n:]

    def timed_run(self) -> tuple[float, list[float], list[float]]:
        """Seconds before the first step, of the guided and of the plain steps but for the first.

        The time embedder runs once for the context and then once at the beginning of every step.
        """
        marks = [time.perf_counter()]
        handle = self.official.time_embedder.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
        try:
            self.run(self.request.size.steps)
        finally:
            handle.remove()
        marks.append(time.perf_counter())
        start, _, *steps = marks
        guided = flow.guided_steps(flow.schedule(self.request.size.steps, 3.5), (0.4, 1.0))
        spans = [(b - a, flag) for a, b, flag in zip(steps[1:], steps[2:], guided[1:])]
        return steps[0] - start, [s for s, flag in spans if flag], [s for s, flag in spans if not flag]

    def layers(self) -> list[Operations]:
        """The operations of every layer in one guided step, both branches together."""
        layers = self.official.language_model.model.layers
        forwards = count_per_call(layers, lambda: self.run(1))[-2 * len(layers) :]
        return [sum(forwards[i :: len(layers)], Operations()) for i in range(len(layers))]


def official_answer(official: nn.Module, lance: Lance, length: int) -> list[int]:
    """Greedy tokens of the official understanding loop."""
    sequence = build(lance.tokenizer, "understand", "image", PROMPT, semantics=[SEEN])
    grid = torch.tensor([merged_grid(SEEN)])
    n = len(sequence.ids)
    with torch.inference_mode():
        (ids,), _, _ = official.validation_und_KVcache(
            val_packed_text_ids=sequence.ids,
            val_packed_text_indexes=torch.arange(n),
            val_packed_position_ids=torch.arange(n),
            val_ce_loss_indexes=torch.tensor([n - 1]),
            val_sample_N_target=[1],
            val_split_lens=[*(s.end - s.start for s in sequence.segments), 1],
            val_attn_modes=[*(s.attention for s in sequence.segments), "causal"],
            val_sample_lens=[n + 1],
            val_sample_type=["und"],
            val_packed_vit_tokens=[torch.zeros(int(grid.prod()), 1)],
            val_vit_video_grid_thw=grid,
            max_length=length,
            device=torch.device("cpu"),
            dtype=torch.float32,
            new_token_ids={"eos_token_id": NEVER},
            pad_token_id=0,
            vocab_size=len(lance.tokenizer),
            apply_qwen_2_5_vl_pos_emb=True,
            image_token_id=lance.tokenizer.special(VIDEO_PAD),
        )
    return ids.flatten().tolist()


def distance(theirs: OfficialRequest) -> float:
    """|ours - theirs| / |theirs| of the latents after all steps from the same noise."""
    noise = theirs.noise().T.reshape(1, 48, *theirs.request.grid)
    ours = theirs.request.run(theirs.request.size.steps, noise=noise)
    expected = theirs.run(theirs.request.size.steps)
    rows = normalize(ours)[0].flatten(1).T
    return float((rows - expected).norm() / expected.norm())


def attention_seconds(request: Request, repeats: int) -> float:
    """The attention of one guided step on its own: what both sides spend in the same function of torch."""
    config, n = request.lance.config.text, request.size.tokens + 2
    q = drawn(1, config.num_attention_heads, n, config.head_dim)
    lengths = [branch.context.length + n for branch in request.prefill()]
    pairs = [[drawn(1, config.num_key_value_heads, s, config.head_dim) for _ in "kv"] for s in lengths]

    def step() -> None:
        for _ in range(config.num_hidden_layers):
            for k, v in pairs:
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with torch.inference_mode():
        return min(seconds(step) for _ in range(5 * repeats))


def measure(size: Size, repeats: int, checkout: str) -> dict[str, float]:
    """All figures of one size; the two sides take turns."""
    lance = model(size)
    official = official_model(import_official(checkout), lance, size.grid[0])
    requests = [OfficialRequest(official, Request(lance, size, task)) for task in size.tasks]
    figures: dict[str, float] = {}
    for theirs in requests:
        title, once = TITLES[theirs.request.task], size == SIZES["clip"]
        found = step_figures(theirs, 1 if once else repeats)
        found |= {} if once else without_attention(found, theirs.request, repeats)
        figures |= {f"{title}: {name}": value for name, value in (found | operation_figures(theirs)).items()}
    if size == SIZES["clip"]:
        return figures
    figures |= answer_figures(official, lance, repeats) | vae_figures(lance.vae, repeats)
    return figures | bf16_figures(size, repeats)


def compared(name: str, official: float, ours: float) -> dict[str, float]:
    """Milliseconds of both, and how many times faster ours is."""
    return {f"{name}, official, ms": 1e3 * official, f"{name}, ours, ms": 1e3 * ours, f"{name}, ratio": official / ours}


def step_figures(theirs: OfficialRequest, repeats: int) -> dict[str, float]:
    ours = theirs.request
    figures = {"relative distance of the latents": distance(theirs)}
    turns = [(theirs.timed_run(), ours.step_seconds(), seconds(ours.prefill)) for _ in range(repeats)]
    (prefill, guided, plain), (our_guided, our_plain) = (zip(*(turn[i] for turn in turns)) for i in (0, 1))
    figures |= compared("guided step", least(guided), least(our_guided))
    if any(plain):
        figures |= compared("plain step", least(plain), least(our_plain))
    return figures | compared("prefill of both branches", min(prefill), min(turn[2] for turn in turns))


def without_attention(figures: dict[str, float], ours: Request, repeats: int) -> dict[str, float]:
    """Guided steps less what both sides spend in the same function of torch."""
    shared = attention_seconds(ours, repeats)
    official, own = (figures[f"guided step, {side}, ms"] / 1e3 - shared for side in ("official", "ours"))
    return compared("guided step without attention", official, own)


def operation_figures(theirs: OfficialRequest) -> dict[str, float]:
    figures: dict[str, float] = {}
    for side, layers in (("official", theirs.layers()), ("ours", theirs.request.layers())):
        figures[f"operations per layer and branch, {side}"] = per_branch(layers)
        figures[f"waits per layer and branch, {side}"] = max(each.waits.total() for each in layers) / 2
    return figures


def answer_figures(official: nn.Module, lance: Lance, repeats: int) -> dict[str, float]:
    if official_answer(official, lance, ANSWER) != answer(lance, ANSWER):
        raise SystemExit("the official answer is not ours")
    theirs = 1 / seconds_per_token(partial(official_answer, official, lance), repeats)
    ours = 1 / seconds_per_token(partial(answer, lance), repeats)
    return {"decode, official, tokens/s": theirs, "decode, ours, tokens/s": ours, "decode, ratio": ours / theirs}


def vae_figures(ours: WanVAE, repeats: int) -> dict[str, float]:
    """A picture of 256x256 through both VAEs, in turn."""
    from modeling.vae.wan.vae2_2 import WanVAE_

    theirs, scale = official_vae(WanVAE_, ours), [0.0, 1.0]
    pixels, latent = drawn(1, 3, 1, 256, 256).clamp(-1, 1), drawn(1, 48, 1, 16, 16)
    figures: dict[str, float] = {}
    with torch.inference_mode():
        for name, official, own in (
            ("VAE encode of 256x256", lambda: theirs.encode(pixels, scale)[0], lambda: ours.encode(pixels)[0]),
            ("VAE decode of 256x256", lambda: theirs.decode(latent, scale).clamp(-1, 1), lambda: ours.decode(latent)),
        ):
            expected = official()
            figures[f"{name}: relative distance"] = float((own() - expected).norm() / expected.norm())
            turns = [(seconds(official), seconds(own)) for _ in range(repeats)]
            figures |= compared(name, *map(min, zip(*turns)))
    return figures


def bf16_figures(size: Size, repeats: int) -> dict[str, float]:
    """Ours alone in bf16."""
    lance = model(size, torch.bfloat16)
    figures: dict[str, float] = {}
    for task in size.tasks:
        request = Request(lance, size, task)
        request.run(2)
        guided = least(request.step_seconds()[0] for _ in range(repeats))
        figures[f"{TITLES[task]}: guided step, ours in bf16, ms"] = 1e3 * guided
    return figures | {"decode, ours in bf16, tokens/s": 1 / seconds_per_token(partial(answer, lance), repeats)}


def peak_figures(size: Size, side: str, checkout: str) -> dict[str, float]:
    """The peak of a process in which one side does every task of a size, a few steps each."""
    lance = model(size)
    calls: list[Callable[[], object]] = []
    if side == "ours":
        calls += [partial(Request(lance, size, task).run, 2) for task in size.tasks]
        calls.append(partial(answer, lance, 8))
    else:
        official = official_model(import_official(checkout), lance, size.grid[0])
        calls += [partial(OfficialRequest(official, Request(lance, size, task)).run, 2) for task in size.tasks]
        calls.append(partial(official_answer, official, lance, 8))
    forget_peak()
    for call in calls:
        call()
    return {f"peak memory, {side}, GB": peak_gigabytes()}


def forget_peak() -> None:
    """Lets the peak begin anew where the system can (Linux, proc(5)); elsewhere it is the whole run's."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def figures_of(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Times of both sides in one process, peaks in one for each."""
    given = [f"--size={name}", f"--official={options.official}"]
    given += [f"--repeats={options.repeats}", f"--threads={options.threads}"]
    found = [in_own_process(__file__, *given, f"--here={what}") for what in ("times", "official", "ours")]
    return found[0] | found[1] | found[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--official", required=True, help="a clone of github.com/bytedance/Lance")
    parser.add_argument("--repeats", type=int, default=5, help="how often every time is taken (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--size", choices=SIZES, help="measure this size only")
    parser.add_argument("--here", choices=("times", "official", "ours"), help="measure in this process; print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here == "times":
        print(json.dumps(measure(SIZES[options.size], options.repeats, options.official)))
    elif options.here:
        print(json.dumps(peak_figures(SIZES[options.size], options.here, options.official)))
    else:
        names = [options.size] if options.size else ["a", "b", "clip"]
        print(f"torch {torch.__version__}, {options.threads} threads, float32 unless said otherwise")
        print("\n".join(f"({name}): {SIZES[name]}" for name in names))
        print(table({f"({name})": figures_of(name, options) for name in names}))


if __name__ == "__main__":
    main()
