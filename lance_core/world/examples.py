"""Examples of the small world for training: every task, of the training split alone.

In both languages, but for two pictures that are joined: these are asked for in English.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .. import stages
from ..checkpoint import Lance
from ..prompts import describe_prompt
from ..train.examples import Example
from ..vae import normalize
from ..vit import normalize_pixels
from .edits import ClipEdit, Edit, clip_edit, random_edit
from .questions import clip_question, random_question
from .render import draw, draw_clip
from .scene import Clip, Scene, Vocabulary, held_out, random_clip, random_scene
from .words import CHINESE, Language, at, caption, clip_caption

LENGTHS = (9, 9, 9, 9, 9, 9, 13, 17)  # frames of clips
DESCRIBE = ("Describe the picture.", "描述这张图片。")
QUESTIONS, DESCRIBED = 4, 0.5  # about one picture, and how often a description is asked for as well
CROWDED = (0.1, 0.35, 0.55)  # scenes of one, two and three things: most of what is held out is of three
FIRST = {"ask": 0.9, "describe": 0.1}  # shares of tasks while it learns to see
TOGETHER = 16  # edits or clips encoded in a batch

Medium = tuple[Tensor, Tensor]  # frames as bytes `[F, H, W, 3]`, and their latent `[48, T, h, w]`
Item = tuple[Any, tuple[Medium, ...]]  # what is known of pictures or clips, and these
Maker = Callable[[Random], tuple[Any, list[Tensor]]]


@dataclass(frozen=True)
class Amounts:
    """How many different pictures and clips there are: pictures before and after an edit, pairs to be joined, …"""

    edits: int = 2000
    pairs: int = 800
    clips: int = 2500
    clip_edits: int = 600


@dataclass(frozen=True)
class Shares:
    """How large a part of the examples each task is; tasks are methods of `SmallWorld`."""

    paint: float = 0.13
    edit: float = 0.46
    ask: float = 0.23
    describe: float = 0.01
    join: float = 0.02
    film: float = 0.06
    animate: float = 0.03
    edit_clip: float = 0.04
    ask_of_clip: float = 0.02


class SmallWorld:
    """Endless examples, the same for the same index and seed.

    Each is one of a limited number of pictures, edits and clips, drawn and encoded when they are first met and kept,
    with words that are chosen anew. seeing: so many at the beginning are only about what is seen in pictures.
    """

    def __init__(
        self,
        lance: Lance,
        seed: int = 0,
        amounts: Amounts = Amounts(),
        shares: Shares = Shares(),
        vocabulary: Vocabulary = Vocabulary(),
        seeing: int = 0,
    ):
        self.lance, self.seed, self.shares, self.vocabulary = lance, seed, vars(shares), vocabulary
        self.seeing = seeing
        self.counts = {
            self.new_edit: amounts.edits,
            self.new_pair: amounts.pairs,
            self.new_clip: amounts.clips,
            self.new_clip_edit: amounts.clip_edits,
        }
        self.kept: dict[tuple[str, int], Item] = {}

    def __getitem__(self, index: int) -> Example:
        random = Random(f"{self.seed} example {index}")
        shares = FIRST if index < self.seeing else self.shares
        (task,) = random.choices(tuple(shares), tuple(shares.values()))
        return getattr(self, task)(random)

    def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Draws and encodes everything now, which is several times faster in batches. on_progress(done, total)."""
        numbers = [(make, number) for make, count in self.counts.items() for number in range(count)]
        for start in range(0, len(numbers), TOGETHER):
            self.make(numbers[start : start + TOGETHER])
            if on_progress is not None:
                on_progress(min(start + TOGETHER, len(numbers)), len(numbers))

    def paint(self, random: Random) -> Example:
        scene, (_, latent) = self.picture(random)
        return Example("generate", caption(scene, random, language(random)), target=latent)

    def edit(self, random: Random) -> Example:
        return self.edit_of(self.new_edit, random)

    def edit_of(self, make: Maker, random: Random) -> Example:
        edit, ((pixels, before), (_, after)) = self.one_of(make, random)
        return Example("edit", edit.instruction, pixels=(self.seen(pixels),), latents=(before,), target=after)

    def ask(self, random: Random) -> Example:
        scene, (pixels, _) = self.picture(random)
        asked = [random_question(scene, random, language(random), vocabulary=self.vocabulary) for _ in range(QUESTIONS)]
        pairs = [(question.text, question.answer) for question in asked]
        if random.random() < DESCRIBED:
            chosen = language(random)
            pairs.append((DESCRIBE[chosen == "zh"], caption(scene, random, chosen)))
        (text, answer), *others = pairs
        return Example("understand", text, answer=answer, pixels=(self.seen(pixels),), others=tuple(others))

    def describe(self, random: Random) -> Example:
        scene, (pixels, _) = self.picture(random)
        chosen = language(random)
        text, answer, system = DESCRIBE[chosen == "zh"], caption(scene, random, chosen), describe_prompt("image")
        return Example("understand", text, answer=answer, system=system, pixels=(self.seen(pixels),))

    def join(self, random: Random) -> Example:
        text, ((first, one), (second, other), (_, target)) = self.one_of(self.new_pair, random)
        return Example("edit", text, pixels=(self.seen(first), self.seen(second)), latents=(one, other), target=target)

    def film(self, random: Random) -> Example:
        clip, ((_, latent),) = self.one_of(self.new_clip, random)
        return Example("generate", clip_caption(clip, random, language(random)), target=latent)

    def animate(self, random: Random) -> Example:
        return replace(self.film(random), first_frame=True)

    def edit_clip(self, random: Random) -> Example:
        return self.edit_of(self.new_clip_edit, random)

    def ask_of_clip(self, random: Random) -> Example:
        clip, ((pixels, _),) = self.one_of(self.new_clip, random)
        asked = [clip_question(clip, random, language(random)) for _ in range(QUESTIONS)]
        (text, answer), *others = [(question.text, question.answer) for question in asked]
        looked = (self.seen(pixels),)
        return Example("understand", text, answer=answer, kind="video", pixels=looked, others=tuple(others))

    def picture(self, random: Random) -> tuple[Scene, Medium]:
        """Of an edit, before or after it."""
        edit, media = self.one_of(self.new_edit, random)
        return random.choice(((edit.before, media[0]), (edit.after, media[1])))

    def one_of(self, make: Maker, random: Random) -> Item:
        number = random.randrange(self.counts[make])
        if (make.__name__, number) not in self.kept:
            self.make([(make, number)])
        return self.kept[make.__name__, number]

    def make(self, numbers: Sequence[tuple[Maker, int]]) -> None:
        """Draws these and keeps them, encoded in one batch."""
        drawn = [make(Random(f"{self.seed} {make.__name__} {number}")) for make, number in numbers]
        media = iter(self.encoded([frames for _, clips in drawn for frames in clips]))
        for (make, number), (facts, clips) in zip(numbers, drawn):
            self.kept[make.__name__, number] = facts, tuple(islice(media, len(clips)))

    def new_edit(self, random: Random) -> tuple[Edit, list[Tensor]]:
        scene = random_scene(random, "train", self.vocabulary, CROWDED)
        edit = random_edit(scene, random, language(random), self.vocabulary)
        return edit, [draw(edit.before), draw(edit.after)]

    def new_pair(self, random: Random) -> tuple[str, list[Tensor]]:
        first, second, text, joined = join_scenes(random, self.vocabulary)
        return text, [draw(scene) for scene in (first, second, joined)]

    def new_clip(self, random: Random) -> tuple[Clip, list[Tensor]]:
        clip = random_clip(random, "train", self.vocabulary)
        return clip, [draw_clip(clip, random.choice(LENGTHS))]

    def new_clip_edit(self, random: Random) -> tuple[ClipEdit, list[Tensor]]:
        edit = clip_edit(random_clip(random, "train", self.vocabulary), random, language(random), self.vocabulary)
        return edit, [draw_clip(edit.before), draw_clip(edit.after)]

    @torch.no_grad()
    def encoded(self, clips: Sequence[Tensor]) -> list[Medium]:
        """Clips `[F, H, W, 3]` as they are kept; those of one length go through the VAE together."""
        found: dict[int, Tensor] = {}
        fitted = [stages.latent_frames(self.lance.config.resolutions, frames) for frames in clips]
        for length in {len(frames) for frames in fitted}:
            where = [index for index, frames in enumerate(fitted) if len(frames) == length]
            pixels = rearrange(torch.stack([fitted[index] for index in where]), "b f h w c -> b c f h w")
            latents = self.lance.vae.encode(pixels.to(self.lance.device, self.lance.dtype) * 2 - 1)[0]
            found.update(zip(where, normalize(latents.float().cpu()).unbind()))
        return [((frames * 255).round().byte(), found[index]) for index, frames in enumerate(clips)]

    def seen(self, frames: Tensor) -> Tensor:
        """What the vision tower sees of frames in bytes."""
        return normalize_pixels(stages.semantic_frames(self.lance.config, frames.float() / 255))


def language(random: Random) -> Language:
    return "zh" if random.random() < CHINESE else "en"


def join_scenes(random: Random, vocabulary: Vocabulary = Vocabulary()) -> tuple[Scene, Scene, str, Scene]:
    """Two pictures, an instruction that puts the one shape of the first into the second, and the result.

    All three are of the training split.
    """
    while True:
        first, second = (random_scene(random, "train", vocabulary) for _ in range(2))
        if len(first.things) > 1 or len(second.things) > 2:
            continue
        (thing,) = first.things
        place = random.choice(second.free_places)
        if thing.kind in [other.kind for other in second.things]:
            continue
        joined = second.with_things((*second.things, replace(thing, place=place)))
        if held_out(joined):
            continue
        text = f"Add the {thing.shape} of the first picture {at(place, 'en')} of the second picture."
        return first, second, text, joined
