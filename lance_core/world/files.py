"""The small world as a data set to try training with: pictures, clips, captions, questions and edits in files.

Clips are animated PNGs, since a video codec would blur shapes of a few pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image
from torch import Tensor

from ..checks import check_seed, check_whole
from ..config import VIDEO_FPS
from ..media import to_bytes
from ..prompts import Kind
from ..saving import replacing_folder
from ..train.convert import write_folder, write_parquet
from ..train.records import Embedded, Record
from .edits import clip_edit, drawn_edit
from .questions import clip_question, random_question
from .render import draw, draw_clip
from .scene import Split, Vocabulary, random_clip, random_scene
from .words import Language, caption, clip_caption

Format = Literal["jsonl", "parquet"]
WRITERS = {"jsonl": write_folder, "parquet": write_parquet}
NEW_SHARE = 0.6  # of the records show what is new, if anything is; the others may


def make_world(
    folder: str | Path,
    *,
    count: int = 1000,
    split: Split = "train",
    format: Format = "jsonl",
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
) -> dict[str, int]:
    """Writes so many records into a new folder and returns how many each file has.

    vocabulary: what is shown; if anything in it is new, three of five records show it and the others may, so that the
    rest is not forgotten. The folder appears complete or not at all. Raises LanceError where there is something
    already.
    """
    check_whole("count", count, 1)
    check_seed(seed)
    numbered = ((index, *world_record(index, split, seed, vocabulary)) for index in range(count))
    with replacing_folder(Path(folder).expanduser(), overwrite=False) as fresh:
        fresh.mkdir()
        return WRITERS[format](numbered, fresh, _never)


def _never(index: int, error: Exception) -> None:
    raise error  # every record of ours is good


def world_record(index: int, split: Split, seed: int, vocabulary: Vocabulary) -> tuple[Record, list[Kind]]:
    """A record, the same for the same arguments, and the kinds of its media."""
    random = Random(f"{seed} {split} {index}")
    language: Language = random.choice(("en", "zh"))
    if random.random() >= NEW_SHARE:
        vocabulary = vocabulary.whole
    make, kind = random.choices(list(MAKERS), list(MAKERS.values()))[0]
    record = make(random, language, split, vocabulary)
    return record, [kind] * (len(record.references) + (record.target is not None))


def _painted(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    scene = random_scene(random, split, vocabulary)
    return Record("generate", caption(scene, random, language), target=png("target", draw(scene)))


def _edited(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    edit = drawn_edit(random, split, language, vocabulary)
    before, after = png("before", draw(edit.before)), png("after", draw(edit.after))
    return Record("edit", edit.instruction, references=(before,), target=after)


def _asked(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    scene = random_scene(random, split, vocabulary)
    question = random_question(scene, random, language, vocabulary=vocabulary)
    return Record("understand", question.text, question.answer, references=(png("seen", draw(scene)),))


def _described(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    scene = random_scene(random, split, vocabulary)
    seen = png("seen", draw(scene))
    return Record("describe", "", caption(scene, random, language), references=(seen,))


def _animated(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    clip = random_clip(random, split, vocabulary)
    return Record("generate", clip_caption(clip, random, language), target=png("target", draw_clip(clip)))


def _edited_clip(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    edit = clip_edit(random_clip(random, split, vocabulary), random, language, vocabulary, split=split)
    before, after = png("before", draw_clip(edit.before)), png("after", draw_clip(edit.after))
    return Record("edit", edit.instruction, references=(before,), target=after)


def _asked_of_clip(random: Random, language: Language, split: Split, vocabulary: Vocabulary) -> Record:
    clip = random_clip(random, split, vocabulary)
    question = clip_question(clip, random, language)
    return Record("understand", question.text, question.answer, references=(png("seen", draw_clip(clip)),))


Maker = Callable[[Random, Language, Split, Vocabulary], Record]
MAKERS: dict[tuple[Maker, Kind], float] = {  # and their shares
    (_painted, "image"): 0.25,
    (_edited, "image"): 0.25,
    (_asked, "image"): 0.2,
    (_described, "image"): 0.05,
    (_animated, "video"): 0.1,
    (_edited_clip, "video"): 0.05,
    (_asked_of_clip, "video"): 0.1,
}


def png(name: str, frames: Tensor) -> Embedded:
    """Frames `[F, H, W, 3]` in 0..1 as a PNG, which is animated where there are several, at 12 a second."""
    first, *others = (Image.fromarray(frame.numpy()) for frame in to_bytes(frames))
    file = io.BytesIO()
    moving = {"save_all": True, "append_images": others, "duration": 1000 / VIDEO_FPS, "loop": 0} if others else {}
    first.save(file, format="PNG", **moving)
    return Embedded(name, file.getvalue())
