"""What a request needs in device memory, phase by phase, before there is one: its sizes are enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Items
from dataclasses import dataclass, replace
from math import ceil, inf

from . import memory
from .checkpoint import Lance
from .checks import check_whole
from .config import LATENT_CHANNELS
from .errors import LanceError
from .placement import GIB, SLACK, Part, arrangement, model_parts
from .resize import nearest_bucket, own_size
from .sequence import Grid, Sequence, build, prefix_length, unconditional
from .stages import ANSWERING, PAINTING, TOGETHER, target_grid, vae_of
from .vit import FRAMES_PER_STEP

ANSWER = 256  # tokens
VISION_MULTIPLE = 28  # pixels of a token's side
WORDS = "A picture or a clip of something, described in a sentence or two that say what is where, and how it looks."


@dataclass(frozen=True)
class Job:
    """task: "generate", "edit" or "understand"; the size of its result, and of its references, in pixels.

    width, height: without either, the size that the checkpoint knows best.
    references: how many pictures or clips; of a generation at most one, the first frame. tile: as in `decode_video`.
    """

    task: str
    width: int | None = None
    height: int | None = None
    frames: int = 1
    references: int = 0
    tile: int | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a request. parts: of the model, as `Placement.use` takes them; bytes, of working memory in all."""

    name: str
    parts: tuple[str, ...]
    working: int
    context: int = 0  # of it keys and values that are kept


@dataclass(frozen=True)
class Plan:
    """A phase within a budget, in bytes: weights on the device all the time, others that pass, and room for these."""

    resident: int
    streamed: int  # over the bus, each time that all layers run
    buffers: int
    working: int

    @property
    def peak(self) -> int:
        return self.resident + self.buffers + self.working


def plan(parts: dict[str, Part], phase: Phase, budget: int) -> Plan:
    """How a phase fits into a budget, starting with nothing on the device. Raises LanceError where it does not."""
    places = arrangement(parts, phase.parts, budget, phase.working)
    resident = {
        name: sum(piece.size for piece, there in zip(part.pieces, places[name]) if there)
        for name, part in parts.items()
    }
    used = [name for name in phase.parts if parts[name].table is None]
    return Plan(
        resident=sum(resident.values()),
        streamed=sum(parts[name].size - resident[name] for name in used),
        buffers=sum(parts[name].taken(places[name]) - resident[name] for name in used),
        working=phase.working,
    )


def needs(lance: Lance, job: Job) -> Iterator[Phase]:
    """The phases of a request, in order; the model may be without data. Raises LanceError for impossible sizes."""
    job = sized(lance, job)
    grid = target_grid(job.width, job.height, job.frames)
    check_whole("references", job.references, int(job.task == "edit"), 1 if job.task == "generate" else inf)
    dtype = lance.dtype
    seen = seen_shape(lance, job) if job.task != "generate" else None
    if job.task != "understand":
        vae_of(lance)
    if job.references and seen:
        if lance.vision is None:
            raise LanceError("this checkpoint has no vision tower: put Qwen2.5-VL-ViT/vit.safetensors beside it.")
        yield Phase("look", ("vision",), memory.looking(lance.vision, seen, dtype))
    if job.references and job.task != "understand":
        frames = job.frames if job.task == "edit" else 1
        shape = 1, 3, frames, job.height, job.width
        yield Phase("encode", ("vae",), memory.encoding(lance.vae, shape, dtype))
    if job.task == "understand":
        (sequence,) = sequences(lance, job, seen, None)
        working = memory.answering(lance.transformer, sequence, ANSWER, dtype)
        yield Phase("answer", ANSWERING, working, lance.transformer.context_memory(len(sequence.ids) + ANSWER, dtype))
        return
    both = sequences(lance, job, seen, grid)
    t, h, w = grid
    working = memory.painting(lance.transformer, both, 1, len(both) * t * h * w <= TOGETHER, dtype)
    yield Phase("paint", PAINTING, working, lance.transformer.context_memory(context_tokens(both), dtype))
    yield Phase("decode", ("vae",), memory.decoding(lance.vae, (1, LATENT_CHANNELS, *grid), dtype, job.tile))


def sized(lance: Lance, job: Job) -> Job:
    """The job with the checkpoint's own size where it has none."""
    if (job.width, job.height) != (None, None):
        return job
    width, height = own_size(lance.config.resolutions.of(job.frames))
    return replace(job, width=width, height=height)


def seen_shape(lance: Lance, job: Job) -> tuple[int, int, int, int]:
    """Pixels `[3, F, H, W]` of a reference as the vision tower sees it in the automatic resolution."""
    bucket = nearest_bucket(job.height, job.width, lance.config.resolutions.of(job.frames).vit)
    height, width = (side - side % VISION_MULTIPLE for side in bucket)
    return 3, job.frames + job.frames % FRAMES_PER_STEP, height, width


def sequences(lance: Lance, job: Job, seen: tuple[int, ...] | None, target: Grid | None) -> list[Sequence]:
    """What the model reads, on both branches where something is painted."""
    references = [semantic_grid(seen)] * job.references if seen else []
    sequence = build(
        lance.tokenizer,
        job.task,
        None if job.task == "understand" and not references else "image" if job.frames == 1 else "video",
        WORDS,
        semantics=references,
        latents=[target] * len(references) if target else (),
        target=target,
        tokens_per_second=lance.config.text.tokens_per_second,
    )
    return [sequence, unconditional(sequence, lance.config.text.tokens_per_second)] if target else [sequence]


def semantic_grid(seen: tuple[int, ...]) -> Grid:
    """Tokens (t, h, w) of what the vision tower saw."""
    _, frames, height, width = seen
    return frames // FRAMES_PER_STEP, height // VISION_MULTIPLE, width // VISION_MULTIPLE


def context_tokens(both: Items[Sequence]) -> int:
    """Tokens whose keys and values are kept: of the shared beginning once."""
    shared = sum(segment.end - segment.start for segment in both[0].segments[: prefix_length(both[0])])
    own = sum(sequence.find("noise")[0].start - shared for sequence in both)
    return shared + own


def report(lance: Lance, job: Job, budget: int | None = None) -> str:
    """A table of what each phase needs, in GiB, or of how it fits into a budget; the model may be without data.

    Raises LanceError where it does not fit.
    """
    parts = model_parts(lance.transformer, lance.vision, lance.vae)
    if budget is not None:
        return planned(parts, needs(lance, job), budget)
    lines = [f"{'GiB':8}{'weights':>10}{'working':>10}{'in all':>10}{'at least':>10}"]
    for phase in needs(lance, job):
        used = [parts[name] for name in ("rest", *phase.parts)]
        weights, least = sum(part.size for part in used), sum(part.least for part in used)
        working = ceil(SLACK * phase.working)
        row = (weights, phase.working, weights + working, least + working)
        lines.append(f"{phase.name:8}" + "".join(f"{size / GIB:10.2f}" for size in row))
    return "\n".join([*lines, "", "in all: nothing comes from the host meanwhile; at least: layers come one by one"])


def planned(parts: dict[str, Part], phases: Iterator[Phase], budget: int) -> str:
    """A table of how phases fit into a budget, in GiB."""
    lines = [f"{'GiB':8}{'stays':>10}{'streamed':>10}{'working':>10}{'peak':>10}"]
    for phase in phases:
        made = plan(parts, phase, budget)
        row = (made.resident, made.streamed, made.working, made.peak)
        lines.append(f"{phase.name:8}" + "".join(f"{size / GIB:10.2f}" for size in row))
    return "\n".join([*lines, "", "stays: weights on the device; streamed: others, which come whenever all layers run"])
