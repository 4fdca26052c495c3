"""Pictures, clips and answers of a model in training."""

from __future__ import annotations

from pathlib import Path

from .. import stages
from ..checkpoint import Lance
from ..media import read_media, write_mp4, write_png
from .config import Question, Samples


def write_samples(samples: Samples, lance: Lance, folder: Path, step: int) -> list[Path]:
    """Writes one file per prompt, and one with all questions and answers; returns their paths."""
    paths = [paint(samples, lance, prompt, folder / f"step_{step:06d}_{i}") for i, prompt in enumerate(samples.prompts)]
    if samples.questions:
        lines = [f"{question.question}\n{answer(samples, lance, question)}\n" for question in samples.questions]
        paths.append(folder / f"step_{step:06d}.txt")
        folder.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text("\n".join(lines), encoding="utf-8")
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
