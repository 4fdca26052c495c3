"""How far we are from the official model, task by task: `python tests/parity.py` prints the table.

Every measure is a relative L2 error against what the official code computed in float32 with the same small checkpoint
and the same noise. Whole stages are run, from pixels and words; only the noise and the references' latents, which the
official code draws at random, are taken from the recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange
from goldens import TINY, golden, relative_error, values
from torch import Tensor

from lance_core import stages, text
from lance_core.flow import guide
from lance_core.sequence import build, context_blocks
from lance_core.vae import denormalize, normalize

Grid = tuple[int, int, int]

VARIANTS = {
    "renorm_channel": {"renorm": "channel"},
    "renorm_none": {"renorm": "none"},
    "cfg1": {"guidance": 1.0},
    "interval_0.7_0.95": {"guidance_interval": (0.7, 0.95)},
    "renorm_min_0.98": {"renorm_min": 0.98},
    "shift1": {"shift": 1.0},
}


@cache
def lance(rounded_rope: bool = False) -> stages.Lance:
    """The small checkpoint in float32; with rotary frequencies as the official code rounds them in bf16."""
    model = stages.load_lance(TINY, device="cpu", dtype="fp32")
    if rounded_rope:
        model.transformer.rounded_rope = model.vision.rounded_rope = True
    return model


def semantic(model: stages.Lance, name: str) -> stages.Semantic:
    """The vision tower on recorded pixels `[3, F, H, W]` in 0..255, which are already resized."""
    key = f"{name}.resized_uint8"
    pixels = golden(0)[key if key in golden(0) else values()[name]]
    frames = rearrange(pixels.float() / 255, "c F H W -> F H W c")
    return stages.encode_semantic(model, frames, resolution=None)


@dataclass(frozen=True)
class Request:
    """A recorded generation or edit, by its name in the recordings; grid (t, h, w) is the target's, in tokens."""

    name: str
    prompt: str
    grid: Grid
    task: str = "generate"
    references: tuple[tuple[str, Grid], ...] = ()  # recorded pixels and the latent's size
    has_first_frame: bool = False

    @property
    def start(self) -> list[Tensor]:
        """Normalised latents `[1, 48, T, h, w]` of the references, in their order, and last the target's noise."""
        grids = [*(grid for _, grid in self.references), self.grid]
        parts = golden(5)[f"{self.name}.x_t_init"].split([t * h * w for t, h, w in grids])
        return [rearrange(x, "(t h w) c -> 1 c t h w", t=t, h=h, w=w) for x, (t, h, w) in zip(parts, grids)]

    def run(self, model: stages.Lance, **options) -> Tensor:
        """The normalised result, `[T, h, w, 48]`."""
        *latents, noise = self.start
        t, h, w = self.grid
        common = dict(width=16 * w, height=16 * h, frames=4 * t - 3, noise=noise, **options)
        if self.task == "generate":
            first_frame = denormalize(noise[:, :, :1]) if self.has_first_frame else None
            raw = stages.generate(model, self.prompt, first_frame=first_frame, **common)
        else:
            semantics = [semantic(model, name) for name, _ in self.references]
            raw = stages.edit(
                model, semantics, [denormalize(x) for x in latents], self.prompt, task=self.task, **common
            )
        return rearrange(normalize(raw), "1 c t h w -> t h w c")

    def velocities(self, model: stages.Lance, rows: Tensor, times: Tensor) -> dict[str, Tensor]:
        """One step: velocities `[N, 48]` of the target's rows at a time per row `[N]`."""
        *latents, _ = self.start
        semantics = [semantic(model, name) for name, _ in self.references]
        request = stages.Request(self.task, self.prompt, tuple(semantics), tuple(denormalize(x) for x in latents))
        with torch.no_grad():
            both = stages.branches(model, request, stages.sides(model, request, self.grid, guided=True))
            cond, uncond = (
                model.transformer.denoise(rows[None], times[None], branch.block, branch.context) for branch in both
            )
        return {"v_cond": cond[0], "v_uncond": uncond[0], "v_final": guide(cond, uncond, 4.0)[0]}


def requests() -> dict[str, Request]:
    english, chinese = values()["t2i.en.prompt"], values()["t2i.zh.prompt"]
    instruction = values()["image_edit.en.prompt"]
    photo = ("input.image_edit.en.vit_video0", (1, 3, 4))
    portrait = ("input.image_edit_2ref.en.vit_video0", (1, 4, 3))
    clip = ("input.video_edit.en.vit_video0", (2, 3, 4))
    made = (
        Request("t2i", english, (1, 4, 6)),
        Request("t2i.zh", chinese, (1, 4, 6)),
        Request("t2v", english, (3, 3, 4)),
        Request("i2v", english, (3, 3, 4), has_first_frame=True),
        Request("image_edit", instruction, (1, 3, 4), "edit", (photo,)),
        Request("video_edit", instruction, (2, 3, 4), "edit", (clip,)),
        Request("image_edit_2ref.en", instruction, (1, 3, 4), "edit", (portrait, photo)),
        Request("image_idip_2ref.zh", chinese, (1, 4, 5), "idip", (photo, portrait)),
    )
    return {request.name: request for request in made}


def answer(model: stages.Lance, name: str, count: int) -> tuple[list[int], Tensor]:
    """The first tokens of a recorded question's greedy answer, and their logits `[count, V]`."""
    task, language = name.split(".")
    kind = task.removeprefix("x2t_")
    seen = semantic(model, f"input.{kind}_edit.en.vit_video0")
    question = values()[f"{name}.prompt"]
    sequence = build(model.tokenizer, "understand", kind, question, semantics=[seen.tokens])
    rows = []

    def pick(logits: Tensor) -> Tensor:
        rows.append(logits)
        return logits[: len(model.tokenizer)].argmax(keepdim=True)

    with torch.no_grad():
        *blocks, last = context_blocks(sequence, [seen.embeddings], [])
        context = model.transformer.prefill([*blocks, last.without_last()])
        position = int(sequence.positions[0, -1])
        ids = [int(i) for i in text.tokens(model.transformer, context, last.ids[-1:], position, pick, count)]
    return ids, torch.stack(rows)


def step_errors() -> Iterator[tuple[str, float]]:
    """One step in the official start and in the middle of the official trajectory."""
    recorded = golden(4)
    for request in requests().values():
        n = request.grid[0] * request.grid[1] * request.grid[2]
        for step in ("step0", "step3"):
            prefix = f"{request.name}.{step}"
            if f"{prefix}.x_t_in" not in recorded:
                continue
            rows, times = recorded[f"{prefix}.x_t_in"][-n:], recorded[f"{prefix}.timestep"][-n:]
            for branch, v in request.velocities(lance(), rows, times).items():
                yield f"{prefix}.{branch}", relative_error(v, recorded[f"{prefix}.{branch}"])


def first_step_errors() -> Iterator[tuple[str, float]]:
    """The first step of the requests for which no more than that was recorded."""
    for section, rounded, infix in ((5, False, ".steps4"), (8, True, "")):
        for request in requests().values():
            prefix = f"{request.name}{infix}.step0"
            if f"{prefix}.v_cond" not in golden(section):
                continue
            noise = rearrange(request.start[-1], "1 c t h w -> (t h w) c")
            v = request.velocities(lance(rounded), noise, torch.ones(len(noise)))
            for branch in ("v_cond", "v_uncond"):
                name = f"{prefix}.{branch}"
                yield f"{name}{' (rounded rope)' if rounded else ''}", relative_error(v[branch], golden(section)[name])


def sampling_errors() -> Iterator[tuple[str, float]]:
    """Every recorded sampling of the official cached loop."""
    for request in requests().values():
        for steps in (4, 6, 30):
            for variant, options in {"": {}, **VARIANTS}.items():
                name = ".".join(filter(None, (request.name, f"steps{steps}", variant, "final_latent")))
                if name in golden(5):
                    yield name, relative_error(request.run(lance(), steps=steps, **options), golden(5)[name])
    for name in ("t2i", "image_edit"):
        final = requests()[name].run(lance(rounded_rope=True), steps=6)
        yield f"{name}.final_latent (rounded rope)", relative_error(final, golden(8)[f"{name}.final_latent"])


def pixel_errors() -> Iterator[tuple[str, float]]:
    """The frames that were recorded of the decoded results after six steps, in -1..1."""
    kept = {"t2i": [0], "t2v": [0, 8], "i2v": [8], "image_edit": [0], "video_edit": [4]}
    for name, frames in kept.items():
        latent = denormalize(rearrange(requests()[name].run(lance(), steps=6), "t h w c -> 1 c t h w"))
        decoded = rearrange(stages.decode_video(lance(), latent)[frames] * 2 - 1, "F H W c -> c F H W")
        yield f"{name}.decoded_frames", relative_error(decoded, golden(5)[f"{name}.decoded_frames"])


def answer_errors() -> Iterator[tuple[str, float]]:
    """Logits of greedy answers; infinite where a single token differs."""
    for rounded in (False, True):
        for name in ("x2t_image.en", "x2t_image.zh", "x2t_video.en", "x2t_video.zh"):
            logits = golden(6).get(f"{name}.logits", golden(6).get(f"{name}.logits_first4"))
            if rounded:
                logits = golden(8)["x2t_image.logits_first4"]
            if rounded and name != "x2t_image.en":
                continue
            ids, ours = answer(lance(rounded), name, 24)
            same = rounded or ids == golden(6)[f"{name}.generated_ids"].tolist()
            error = relative_error(ours[: len(logits)], logits) if same else float("inf")
            yield f"{name}.logits{' (rounded rope)' if rounded else ''}", error


def unit_errors() -> Iterator[tuple[str, float]]:
    """Single layers and tables."""
    from lance_core.rope import rotary_table, rotate
    from lance_core.transformer import latent_position_rows, timestep_features

    recorded, transformer = golden(7), lance().transformer
    config = transformer.config
    layer = transformer.language_model.model.layers[0]
    cos, sin = rotary_table(recorded["mrope.pos"][:, 0], config.mrope_section, config.rope_theta, False, torch.float32)
    with torch.no_grad():
        ours = {
            "time.sinusoid": timestep_features(recorded["time.t"]),
            "time.embed": transformer.time_embedder(recorded["time.t"], torch.float32),
            "latent_pos.embed": latent_position_rows(recorded["latent_pos.ids"], config.hidden_size, torch.float32),
            "rmsnorm.y": layer.input_layernorm(recorded["rmsnorm.x"]),
            "mlp_gen.y": layer.mlp_moe_gen(recorded["rmsnorm.x"]),
            "mrope.q_rot": rotate(recorded["mrope.q"].transpose(1, 2), cos, sin).transpose(1, 2),
            "mrope.k_rot": rotate(recorded["mrope.k"].transpose(1, 2), cos, sin).transpose(1, 2),
            "vae2llm.y": transformer.vae2llm(recorded["vae2llm.x"]),
        }
    for name, value in ours.items():
        yield name, relative_error(value, recorded[name])


def bf16_errors() -> Iterator[tuple[str, float, float]]:
    """Samplings in bf16 against the official float32 ones: ours, and the official bf16 ones."""
    model = stages.load_lance(TINY, device="cpu", dtype="bf16")
    for request in requests().values():
        name = f"{request.name}.steps4.final_latent"
        exact = golden(5)[name]
        yield name, relative_error(request.run(model, steps=4), exact), relative_error(golden("bf16")[name], exact)


TABLE: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
    "single layers": unit_errors,
    "one step": step_errors,
    "first step": first_step_errors,
    "sampling": sampling_errors,
    "pixels": pixel_errors,
    "answers": answer_errors,
}


def main() -> None:
    worst = 0.0
    print(f"{'measure':58} relative error")
    for part, errors in TABLE.items():
        print(f"-- {part}")
        for name, error in errors():
            worst = max(worst, error)
            print(f"{name:58} {error:.1e}")
    print(f"largest: {worst:.1e}")
    print(f"\n{'bf16, against float32':58} ours     official")
    for name, ours, official in bf16_errors():
        print(f"{name:58} {ours:.1e}  {official:.1e}")


if __name__ == "__main__":
    main()
