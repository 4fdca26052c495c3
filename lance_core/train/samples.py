"""Pictures, clips and answers of a model in training."""

from __future__ import annotations

from pathlib import Path

from .. import stages
from ..checkpoint import Lance
from ..checks import check_grid
from ..config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ..media import read_media, replacing, write_mp4, write_png
from ..request import Request, check_length
from ..sequence import build
from .config import Question, Samples


def check_samples(samples: Samples, lance: Lance) -> None:
    """Raises LanceError where these samples could not be made: for missing media, texts or sizes that are too large."""
    t = (samples.frames - 1) // TEMPORAL_COMPRESSION + 1
    target = t, samples.height // SPATIAL_COMPRESSION, samples.width // SPATIAL_COMPRESSION
    if samples.prompts:
        check_grid(*target)
    for prompt in samples.prompts:
        Request("generate", prompt).sequence(lance.tokenizer, lance.config.text, target)
    for question in samples.questions:
        _, kind = read_media(question.media)
        stages.check_question(question.question, samples.max_new_tokens)
        check_length(build(lance.tokenizer, "understand", kind, question.question, semantics=[(1, 1, 1)]))


def write_samples(samples: Samples, lance: Lance, folder: Path, step: int) -> list[Path]:
    """Writes one file per prompt, and one with all questions and answers; returns their paths."""
    paths = [paint(samples, lance, prompt, folder / f"step_{step:06d}_{i}") for i, prompt in enumerate(samples.prompts)]
    if samples.questions:
        lines = [f"{question.question}\n{answer(samples, lance, question)}\n" for question in samples.questions]
        paths.append(folder / f"step_{step:06d}.txt")
        with replacing(paths[-1]) as partial:
            partial.write_text("\n".join(lines), encoding="utf-8")
    return paths


def paint(samples: Samples, lance: Lance, prompt: str, path: Path) -> Path:
    latent = stages.generate(
        lance,
        prompt,
        width=samples.width,
        height=samples.height,
        frames=samples.frames,
        steps=samples.steps,
        guidance=samples.guidance,
        shift=samples.shift,
        seed=samples.seed,
    )
    frames = stages.decode_video(lance, latent)
    if samples.frames == 1:
        return write_png(frames, path.with_suffix(".png"))
    return write_mp4(frames, path.with_suffix(".mp4"))


def answer(samples: Samples, lance: Lance, question: Question) -> str:
    pixels, kind = read_media(question.media)
    semantic = stages.encode_semantic(lance, pixels, kind=kind)
    return stages.understand(lance, semantic, question.question, max_new_tokens=samples.max_new_tokens)
