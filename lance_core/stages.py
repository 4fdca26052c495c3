"""The seam: seven functions from a checkpoint to a picture, a clip or an answer.

Frames are `[F, H, W, 3]` float in 0..1, an image has F = 1. Latents are `[B, 48, T, h, w]` raw, the posterior mean
before normalisation. Results are float32 on the CPU. Whatever a user got wrong is a `LanceError` of one sentence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial

import torch
from einops import rearrange
from torch import Tensor

from . import flow, memory, text
from .checkpoint import Lance, load_lance
from .checks import (
    MAX_FRAMES,
    check_frames,
    check_grid,
    check_latent,
    check_number,
    check_seed,
    check_text,
    check_whole,
    too_many,
    warn,
)
from .config import (
    LATENT_CHANNELS,
    RESOLUTIONS,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    LanceConfig,
    Resolution,
    Resolutions,
)
from .errors import LanceError
from .flow import Sampling
from .request import Request, Semantic, check_length, check_widths
from .resize import fit, own_size
from .sequence import Grid, Sequence, build, context_blocks, unconditional, visual_first
from .shortcuts import shortened
from .tokenizer import IM_END
from .transformer import Block, Branch, Context, NoiseBlock, latent_position_ids, latent_position_rows
from .vae import WanVAE, denormalize, normalize
from .vit import normalize_pixels

__all__ = [
    "Semantic",
    "decode_video",
    "edit",
    "encode_latent",
    "encode_semantic",
    "generate",
    "load_lance",
    "read",
    "understand",
]

SEED = 42  # the official one
MIN_TEMPERATURE = 0.01
MAX_NEW_TOKENS = 4096
PAINTING, ANSWERING = ("generation", "understanding"), ("understanding", "text", "embedding")  # parts of the model
TOGETHER = 256  # tokens of all branches up to which one batch is faster than in turn (benchmarks/branches.py, on a CPU)
TILES = (None, 32, 24, 16, 12, 8)  # of latent rows, in which a frame is decoded: the first that there is room for

OnStep = Callable[[int, int, Tensor], None]
OnToken = Callable[[str], None]
OnChunk = Callable[[int, int], None]


@torch.no_grad()
def encode_semantic(
    lance: Lance, frames: Tensor, *, resolution: str | Resolution | None = "auto", kind: str = "auto"
) -> Semantic:
    """Looks at frames `[F, H, W, 3]`: what they show, for questions and edits.

    resolution: a name of `RESOLUTIONS`, or a Resolution; "auto": the checkpoint's own for a picture or a clip, which
    of the release are 768 and 480p; None: frames as they are, with sides that are multiples of 28. kind: "image",
    "video" or "auto" (by the number of frames).
    """
    if lance.vision is None:
        raise LanceError(
            "this checkpoint has no vision tower, so it cannot look at pictures: put Qwen2.5-VL-ViT/vit.safetensors"
            " beside the language model's folder."
        )
    if kind not in ("auto", "image", "video"):
        raise LanceError(f"kind is {kind!r}; give 'image', 'video' or 'auto'.")
    frames = semantic_frames(lance.config, frames, resolution)
    pixels = normalize_pixels(frames)
    kind = frames_kind(frames) if kind == "auto" else kind
    working = partial(memory.looking, lance.vision, pixels.shape, lance.dtype)
    at_most = memory.roughly_looking(lance.vision, pixels.shape, lance.dtype)
    with lance.placement.use("vision", working=working, at_most=at_most):
        embeddings = lance.vision(pixels.to(lance.device), lance.dtype).float().cpu()
    return Semantic(embeddings, lance.vision.grid(pixels), kind)


def semantic_frames(config: LanceConfig, frames: Tensor, resolution: str | Resolution | None = "auto") -> Tensor:
    """The frames `[F, H, W, 3]` that `encode_semantic` hands to the vision tower, in a size that the model knows."""
    check_frames(frames)
    if frames.shape[0] > MAX_FRAMES:
        raise too_many(frames.shape[0])
    multiple = config.vision.patch_size * config.vision.spatial_merge_size
    return resized(frames, resolution, config.resolutions, "vit", multiple)


@torch.no_grad()
def encode_latent(
    lance: Lance, frames: Tensor, *, resolution: str | Resolution | None = "auto", on_chunk: OnChunk | None = None
) -> Tensor:
    """Frames `[F, H, W, 3]` as the model paints them: a raw latent `[1, 48, T, H/16, W/16]`.

    resolution as in `encode_semantic`, with multiples of 16 where it is None. Frames beyond the last 4k+1 are dropped.
    on_chunk(done, total) after every latent frame; it may raise to stop.
    """
    frames = latent_frames(lance.config.resolutions, frames, resolution)
    pixels = rearrange(frames * 2 - 1, "F H W c -> 1 c F H W").to(lance.dtype)
    vae = vae_of(lance)
    working = partial(memory.encoding, vae, pixels.shape, lance.dtype)
    with lance.placement.use("vae", working=working, at_most=memory.roughly_coding(vae, pixels.shape, lance.dtype)):
        return vae.encode(pixels.to(lance.device), on_chunk=on_chunk)[0].float().cpu()


def latent_frames(own: Resolutions, frames: Tensor, resolution: str | Resolution | None = "auto") -> Tensor:
    """The frames `[F, H, W, 3]` that `encode_latent` hands to the VAE: 4k+1 of them, in a size that the model knows.

    own: the resolutions of the checkpoint.
    """
    check_frames(frames)
    return resized(frames[: whole_frames(frames.shape[0])], resolution, own, "vae", SPATIAL_COMPRESSION)


@dataclass(frozen=True, eq=False)
class Reading:
    """Pictures or clips as far as every question about them is the same: the keys and values of all before it."""

    semantics: tuple[Semantic, ...]
    system: str | None
    context: Context
    transformer: weakref.ref  # that has read it


@torch.no_grad()
def read(lance: Lance, semantic: Semantic | Items[Semantic], *, system: str | None = None) -> Reading:
    """Reads what was encoded once, for any number of questions: give the result to `understand` in its place.

    system: as in `understand`.
    """
    semantics = tuple(as_list(semantic))
    if not semantics:
        raise LanceError("there is nothing to read: give what encode_semantic returns.")
    sequence, blocks = question_blocks(lance, semantics, "", system)
    with answering(lance, sequence, 1):
        context = lance.transformer.prefill(blocks[:-1], dtype=lance.dtype)
        if lance.placement.budget is not None:
            context = context.to("cpu")  # in the budget there is no room between questions
        return Reading(semantics, system, context, weakref.ref(lance.transformer))


@torch.no_grad()
def understand(
    lance: Lance,
    semantic: Semantic | Items[Semantic] | Reading | None,
    question: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> str:
    """Answers a question about what was encoded, or, where semantic is None, about nothing but itself.

    Greedy at temperature 0, as the official code. on_token(text_so_far) is called after every token and may raise to
    stop. system: replaces the official system prompt. semantic: also what `read` made of it, with its system prompt.
    """
    check_question(question, max_new_tokens)
    check_number("temperature", temperature, 0.0)
    if 0 < temperature < MIN_TEMPERATURE:
        raise LanceError(f"temperature is {temperature!r}: give 0 (the likeliest answer) or {MIN_TEMPERATURE} or more.")
    check_number("top_p", top_p, 0.0, 1.0)
    check_whole("top_k", top_k, 0)
    check_seed(seed)
    past = None
    if isinstance(semantic, Reading):
        if system not in (None, semantic.system):
            raise LanceError("the system prompt is another than that of the reading: read the picture again with it.")
        if semantic.transformer() is not lance.transformer:
            raise LanceError("the reading is another model's: read the picture again with this one.")
        semantic, system, past = semantic.semantics, semantic.system, semantic.context
    sequence, (*before, last) = question_blocks(lance, as_list(semantic), question, system)
    prompt = [last.without_last()] if past else [*before, last.without_last()]

    generator = torch.Generator().manual_seed(seed)
    known = len(lance.tokenizer)

    def pick(logits: Tensor) -> Tensor:
        return text.choose(logits[:known], temperature, top_p, top_k, generator)

    ids: list[int] = []
    stop = lance.tokenizer.special(IM_END)
    position = int(sequence.positions[0, -1])
    with answering(lance, sequence, max_new_tokens):
        past = None if past is None else past.to(lance.device)
        graph = lance.transformer.compiled and lance.device.type == "cuda" and not lance.placement.streams
        tokens = text.tokens(
            lance.transformer,
            lance.transformer.prefill(prompt, past, dtype=lance.dtype),
            last.ids[-1:],
            position,
            pick,
            max_new_tokens,
            graph,
        )
        for token in tokens:
            ids.append(int(token))
            if ids[-1] == stop:
                break
            if on_token is not None:
                on_token(text.partial_text(lance.tokenizer, ids))
    return text.clean(lance.tokenizer.decode(ids))


def check_question(question: str, max_new_tokens: int) -> None:
    """Raises LanceError for a question that is no text, or empty, and for answers that are too long."""
    check_text("question", question)
    if not question.strip():
        raise LanceError("the question is empty: write what you want to know.")
    check_whole("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)


def answering(lance: Lance, sequence: Sequence, limit: int) -> AbstractContextManager[None]:
    """Inside, the model can read a question and write up to `limit` tokens."""
    working = partial(memory.answering, lance.transformer, sequence, limit, lance.dtype)
    at_most = memory.roughly_running(lance.transformer, 1, len(sequence.ids) + limit, lance.dtype)
    return lance.placement.use(*ANSWERING, working=working, at_most=at_most)


def question_blocks(
    lance: Lance, semantics: Items[Semantic], question: str, system: str | None
) -> tuple[Sequence, list[Block]]:
    """What the model reads to answer: of its blocks the last is the question, and the others are the same for all."""
    if system is not None:
        check_text("system prompt", system)
    check_widths(semantics, lance.config.text)
    kinds = {s.kind for s in semantics}
    sequence = build(
        lance.tokenizer,
        "understand",
        None if not kinds else "video" if "video" in kinds else "image",
        question,
        semantics=[s.tokens for s in semantics],
        system=system,
        tokens_per_second=lance.config.text.tokens_per_second,
    )
    check_length(sequence)
    return sequence, context_blocks(sequence, [s.embeddings for s in semantics], [], lance.device)


@torch.no_grad()
def generate(
    lance: Lance,
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int = 1,
    first_frame: Tensor | None = None,
    steps: int = Sampling.steps,
    guidance: float = Sampling.guidance,
    shift: float = Sampling.shift,
    guidance_interval: tuple[float, float] = Sampling.interval,
    renorm: flow.Renorm = Sampling.renorm,
    renorm_min: float = Sampling.renorm_min,
    guidance_every: int = Sampling.guidance_every,
    cache_threshold: float = Sampling.cache_threshold,
    seed: int | Items[int] = SEED,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Paints a picture (frames = 1) or a clip: a raw latent `[B, 48, T, h, w]`.

    width, height: pixels, multiples of 16; without either, the size that the checkpoint knows best, and that of the
    first frame where there is one.
    first_frame: a raw latent `[1 or B, 48, 1, h, w]` with which the clip begins; it stays exactly as it is.
    guidance_every, cache_threshold: shortcuts, faster and not quite exact. The unconditional branch is computed on
    every n-th guided step alone; steps are predicted while the velocity changes by no more than this share of it.
    seed: one, or one per sample. noise: `[B, 48, T, h, w]`, normalised, instead of a seed.
    on_step(step, steps, estimate) after every step; the estimate is the clean latent so far, normalised
    `[B, 48, T, h, w]`. It may raise to stop.
    """
    request = Request("generate", prompt)
    grid = generation_grid(lance.config.resolutions, width, height, frames, first_frame)
    sampling = Sampling(steps, guidance, shift, guidance_interval, renorm, renorm_min, guidance_every, cache_threshold)
    start = initial_noise(grid, seed, noise)
    if first_frame is not None:
        check_first_batch(first_frame, len(start))
    return paint(lance, request, sampling, start, first_frame, on_step)


@torch.no_grad()
def edit(
    lance: Lance,
    semantic: Semantic | Items[Semantic],
    latent: Tensor | Items[Tensor],
    instruction: str,
    *,
    task: str = "edit",
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    steps: int = Sampling.steps,
    guidance: float = Sampling.guidance,
    shift: float = Sampling.shift,
    guidance_interval: tuple[float, float] = Sampling.interval,
    renorm: flow.Renorm = Sampling.renorm,
    renorm_min: float = Sampling.renorm_min,
    guidance_every: int = Sampling.guidance_every,
    cache_threshold: float = Sampling.cache_threshold,
    seed: int | Items[int] = SEED,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Paints what an instruction makes of one or more references: a raw latent `[B, 48, T, h, w]`.

    semantic and latent: of the same pictures or clips, in the same order. task "edit" changes the last reference,
    "idip" paints the references' subject anew. Size and frames are the last reference's unless given; the rest is as
    in `generate`.
    """
    if task == "generate":
        raise LanceError("task is 'generate'; give 'edit' or 'idip'.")
    request = Request(task, instruction, tuple(as_list(semantic)), tuple(as_list(latent)))
    t, h, w = request.latents[-1].shape[2:]
    grid = target_grid(
        w * SPATIAL_COMPRESSION if width is None else width,
        h * SPATIAL_COMPRESSION if height is None else height,
        TEMPORAL_COMPRESSION * (t - 1) + 1 if frames is None else frames,
    )
    sampling = Sampling(steps, guidance, shift, guidance_interval, renorm, renorm_min, guidance_every, cache_threshold)
    return paint(lance, request, sampling, initial_noise(grid, seed, noise), None, on_step)


@torch.no_grad()
def decode_video(lance: Lance, latent: Tensor, *, tile: int | None = None, on_chunk: OnChunk | None = None) -> Tensor:
    """Frames `[B·F, H, W, 3]` in 0..1 of a raw latent `[B, 48, T, h, w]`.

    tile: side in latent rows of the tiles that are decoded one by one; it saves memory for more computation and gives
    the same frames. None decodes whole frames, or tiles where the memory budget is too small for those.
    on_chunk(done, total) after every latent frame of a tile; it may raise to stop.
    """
    check_latent("the latent", latent)
    if tile is not None:
        check_whole("tile", tile, 2)
    vae = vae_of(lance)

    @cache
    def working(tile: int | None) -> int:
        return memory.decoding(vae, latent.shape, lance.dtype, tile)

    b, _, t, h, w = latent.shape
    size = b, 3, TEMPORAL_COMPRESSION * (t - 1) + 1, h * SPATIAL_COMPRESSION, w * SPATIAL_COMPRESSION
    at_most = memory.roughly_coding(vae, size, lance.dtype)
    if tile is None and not lance.placement.ample(at_most):
        tile = next((side for side in TILES if lance.placement.fits("vae", working=partial(working, side))), TILES[-1])
    with lance.placement.use("vae", working=partial(working, tile), at_most=at_most):
        pixels = vae.decode(latent.to(lance.device, lance.dtype), tile=tile, device="cpu", on_chunk=on_chunk)
    return rearrange(pixels.float() / 2 + 0.5, "B c F H W -> (B F) H W c")


def sides(lance: Lance, request: Request, target: Grid, guided: bool) -> list[Sequence]:
    """What the model reads on the conditional branch and, where `guided`, on the unconditional one.

    target: (t, h, w) in latent rows. Without words both branches are equal, and there is only one.
    """
    sequence = request.sequence(lance.tokenizer, lance.config.text, target)
    if guided and sequence.find("caption"):
        return [sequence, unconditional(sequence, lance.config.text.tokens_per_second)]
    return [sequence]


def branches(lance: Lance, request: Request, sequences: Items[Sequence]) -> list[Branch]:
    """The branches of a request's `sides`; what two of them begin with is computed once."""
    (noise,) = sequences[0].find("noise")
    rows = position_rows(lance, noise.grid)
    prefill = partial(lance.transformer.prefill, dtype=lance.dtype)
    parts = [request.blocks(member, lance.device) for member in sequences]
    if len(parts) > 1:
        shared = prefill(parts[0][0])
        contexts = [prefill(own, shared) for _, own in parts]
    else:
        contexts = [prefill(before + own) for before, own in parts]
    return [Branch(context, noise_block(lance, member, rows)) for context, member in zip(contexts, sequences)]


def position_rows(lance: Lance, target: Grid) -> Tensor:
    """Rows of the latent position table for a target, `[N, D]` in the dtype that the model computes in."""
    rows = latent_position_rows(latent_position_ids(*target), lance.config.text.hidden_size, lance.dtype)
    return rows.to(lance.device)


def noise_block(lance: Lance, sequence: Sequence, rows: Tensor) -> NoiseBlock:
    """The noise block of a sequence; rows: `position_rows` of its target, the same for all branches."""
    (noise,) = sequence.find("noise")
    ids, positions = visual_first(sequence, noise)
    return lance.transformer.noise_block(ids.to(lance.device), positions.to(lance.device), rows)


def paint(
    lance: Lance,
    request: Request,
    sampling: Sampling,
    noise: Tensor,
    first_frame: Tensor | None,
    on_step: OnStep | None,
) -> Tensor:
    """Denoises the target of a request: a raw latent `[B, 48, T, h, w]`; first_frame is raw, noise normalised."""
    t, h, w = noise.shape[2:]
    times = flow.schedule(sampling.steps, sampling.shift)
    guided = [g and sampling.guidance > 1 for g in flow.guided_steps(times, sampling.interval)]
    sequences = sides(lance, request, (t, h, w), any(guided))
    together = len(sequences) * len(noise) * t * h * w <= TOGETHER

    rows = partial(rearrange, pattern="B c t h w -> B (t h w) c")
    x = rows(noise.to(lance.device, torch.float32))
    moving = torch.ones(1, 1, device=lance.device)  # factor on the time of each frame
    frozen_rows = 0
    if first_frame is not None:
        frozen_rows = h * w
        clean = rows(normalize(first_frame.float())).to(lance.device)
        x = torch.cat((clean.expand(x.shape[0], -1, -1), x[:, frozen_rows:]), dim=1)
        moving = (torch.arange(t, device=lance.device) > 0).float()[None]

    def unpacked(x: Tensor) -> Tensor:
        return rearrange(x, "B (t h w) c -> B c t h w", t=t, h=h, w=w)

    working = partial(memory.painting, lance.transformer, sequences, len(noise), together, lance.dtype)
    tokens, context = len(noise) * t * h * w, len(sequences[0].ids) - t * h * w
    at_most = memory.roughly_running(lance.transformer, tokens, context, lance.dtype, len(sequences))
    with lance.placement.use(*PAINTING, working=working, at_most=at_most):
        both = branches(lance, request, sequences)

        def evaluate(x: Tensor, time: Tensor, count: int) -> list[Tensor]:
            velocities = lance.transformer.velocities(x, moving * time, both[:count], together=together)
            return [v.float() for v in velocities]

        velocity = flow.guided_velocity(shortened(evaluate, sampling, times, frozen_rows), sampling)
        report = None if on_step is None else lambda step, steps, x: on_step(step, steps, unpacked(x))
        x = flow.sample(velocity, x, times, [g and len(both) > 1 for g in guided], frozen_rows, report)
    latent = denormalize(unpacked(x).cpu())
    if first_frame is not None:
        latent[:, :, :1] = first_frame.float().cpu()  # bit for bit, not through normalisation and back
    return latent


def initial_noise(grid: Grid, seed: int | Items[int], noise: Tensor | None) -> Tensor:
    """`[B, 48, T, h, w]` float32: the noise given, or one drawn per seed on the CPU, as ComfyUI's KSampler does."""
    shape = (LATENT_CHANNELS, *grid)
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.ndim != 5 or tuple(noise.shape[1:]) != shape:
            given = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise LanceError(f"noise is {given}: this request needs [B, {', '.join(map(str, shape))}].")
        if len(noise) == 0 or not torch.isfinite(noise).all():
            raise LanceError("noise is empty, or holds NaN or infinity: draw it with torch.randn.")
        return noise.float()
    draws = []
    for one in as_list(seed):
        check_seed(one)
        generator = torch.Generator().manual_seed(one)
        draws.append(torch.randn((1, *shape), generator=generator))
    if not draws:
        raise LanceError("the list of seeds is empty: give at least one.")
    return torch.cat(draws)


def target_grid(width: int | None, height: int | None, frames: int) -> Grid:
    """Latent (t, h, w) of a target in pixels and frames; frames are rounded down to 4k+1."""
    for name, value in (("width", width), ("height", height)):
        if value is None:
            raise LanceError(f"{name} is missing: give the size in pixels, a multiple of {SPATIAL_COMPRESSION}.")
        check_whole(name, value, SPATIAL_COMPRESSION)
        if value % SPATIAL_COMPRESSION:
            near = round(value / SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION
            raise LanceError(f"{name} is {value}: give a multiple of {SPATIAL_COMPRESSION}, such as {near}.")
    check_whole("frames", frames, 1)
    t = (whole_frames(frames) - 1) // TEMPORAL_COMPRESSION + 1
    h, w = height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION
    check_grid(t, h, w)
    return t, h, w


def whole_frames(frames: int) -> int:
    """The largest 4k+1 that is not above `frames`; warns where that is less, raises LanceError above 121."""
    if frames > MAX_FRAMES:
        raise too_many(frames)
    whole = (frames - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1
    if whole != frames:
        warn(f"{frames} frames were rounded down to {whole}: clips have 4k+1 frames.")
    return whole


def generation_grid(
    own: Resolutions, width: int | None, height: int | None, frames: int, first_frame: Tensor | None
) -> Grid:
    """Latent (t, h, w) of a generation: as `target_grid`, but the size is the first frame's where there is one.

    own: the resolutions of the checkpoint, which decide where there is neither a size nor a first frame.
    """
    if first_frame is not None:
        check_latent("first_frame", first_frame)
        if first_frame.shape[2] != 1:
            raise LanceError(
                f"first_frame is a clip of {first_frame.shape[2]} latent frames: give one picture, [B, 48, 1, h, w]."
            )
        width, height = size_of_first_frame(first_frame, width, height)
        check_whole("frames", frames, 1)
        if frames < TEMPORAL_COMPRESSION + 1:
            raise LanceError(f"frames is {frames}: with a first frame ask for 5 to {MAX_FRAMES}.")
    elif width is None and height is None:
        width, height = own_size(own.of(frames))
    return target_grid(width, height, frames)


def check_first_batch(first_frame: Tensor, count: int) -> None:
    """One first frame for all clips, or one for each."""
    if first_frame.shape[0] not in (1, count):
        raise LanceError(
            f"first_frame is a batch of {first_frame.shape[0]} where {count} clips are to be made: give one"
            " picture, or one per seed."
        )


def size_of_first_frame(first_frame: Tensor, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels; warns where others were asked for."""
    h, w = (side * SPATIAL_COMPRESSION for side in first_frame.shape[-2:])
    if (width or w, height or h) != (w, h):
        warn(f"the clip is {w}x{h}, the size of its first frame, not {width or w}x{height or h}.")
    return w, h


def resized(
    frames: Tensor, resolution: str | Resolution | None, own: Resolutions, branch: str, multiple: int
) -> Tensor:
    """Frames in the nearest bucket of a resolution, of which "auto" is one of our own, for the "vit" or the "vae"."""
    if resolution is None:
        height, width = frames.shape[1:3]
        if height % multiple or width % multiple:
            raise LanceError(
                f"the frames are {width}x{height}: to keep their size both sides must be multiples of {multiple};"
                " scale them, or choose a resolution."
            )
        return frames
    if resolution == "auto":
        resolution = own.of(frames.shape[0])
    if not isinstance(resolution, Resolution):
        if resolution not in RESOLUTIONS:
            raise LanceError(f"resolution is {resolution!r}; give 'auto', None or one of {', '.join(RESOLUTIONS)}.")
        resolution = RESOLUTIONS[resolution]
    return fit(frames, getattr(resolution, branch), multiple)


def frames_kind(frames: Tensor) -> str:
    """One frame is an image, more are a video."""
    return "image" if frames.shape[0] == 1 else "video"


def vae_of(lance: Lance) -> WanVAE:
    """The model's VAE; raises LanceError where the checkpoint had none."""
    if lance.vae is None:
        raise LanceError("this checkpoint has no VAE: put Wan2.2_VAE.pth beside the language model's folder.")
    return lance.vae


def as_list(value) -> list:
    """A list of what may be nothing, one thing, or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
