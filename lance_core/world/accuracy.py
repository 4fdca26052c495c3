"""How often a model is right in the small world, on scenes that it was never trained on, judged by pixels and words.

Every case follows from the seed and its number alone, so the same call finds the same on the same machine, and more
cases begin with the fewer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import fmean

from torch import Tensor

from .. import stages
from ..checkpoint import Lance
from .edits import CLIP_OPERATIONS, OPERATIONS, ClipEdit, Edit, clip_edit, drawn_edit
from .judge import ClipReading, Reading, psnr, read_clip, read_picture, unchanged, without_sizes
from .questions import CLIP_TOPICS, TOPICS, Question, clip_question, random_question
from .render import SIDE, draw, draw_clip
from .scene import Clip, Kind, Scene, Vocabulary, random_clip, random_scene
from .words import SIZE_NAMES, Language, caption, clip_caption, name_of

FRAMES = 9  # of a clip
CLEAN = 30.0  # dB outside an edit, from which the rest counts as unchanged
LANGUAGES: dict[Language, str] = {"en": "English", "zh": "Chinese"}
CHINESE = 0.25  # of the cases
MOST_TOKENS = 48  # of an answer; the longest is a sentence
Z = 1.959964  # standard deviations within which 95 % of a normal distribution lie

OnCase = Callable[[int, int], None]
Outcome = Mapping[str, bool | float]  # what a case says of every row it belongs to


@dataclass(frozen=True)
class Share:
    """So many of the cases; in words the percentage and its interval."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval of 95 %: between what shares such a result is usual."""
        if not self.count:
            return 0.0, 1.0
        spread = Z**2 / self.count
        middle = (self.value + spread / 2) / (1 + spread)
        half = Z / (1 + spread) * math.sqrt(self.value * (1 - self.value) / self.count + spread / self.count / 4)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{self.value:.1%} ({low:.0f}-{high:.0f})"


@dataclass(frozen=True)
class Mean:
    """The mean of a figure, and the least of it."""

    value: float
    least: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1f} (least {self.least:.1f})"


Results = dict[str, Share | Mean]  # by the names of rows


def gather(outcomes: Iterable[Outcome]) -> Results:
    """Shares of what is true or false, means of what is a number; of the cases that say anything about it.

    Languages come last. Infinite and missing (NaN) numbers do not count.
    """
    columns: dict[str, list[bool | float]] = {}
    for outcome in outcomes:
        for name, value in outcome.items():
            columns.setdefault(name, []).append(value)
    names = sorted(columns, key=lambda name: name in LANGUAGES.values())
    return {name: _summary(columns[name]) for name in names}


def _summary(values: list[bool | float]) -> Share | Mean:
    if all(isinstance(value, bool) for value in values):
        return Share(sum(values), len(values))
    known = [value for value in values if math.isfinite(value)]
    return Mean(fmean(known), min(known), len(known)) if known else Mean(math.nan, math.nan, 0)


def cases(judged: Callable[[int], Outcome], count: int, progress: OnCase | None = None) -> Results:
    """Runs so many cases. judged(number): one of them."""
    outcomes = []
    for number in range(count):
        outcomes.append(judged(number))
        if progress is not None:
            progress(number + 1, count)
    return gather(outcomes)


def chance(seed: int, number: int) -> tuple[Random, Language]:
    """What a case is drawn from, and its language."""
    random = Random(f"{seed} {number}")
    return random, "zh" if random.random() < CHINESE else "en"


def generation(
    lance: Lance,
    count: int,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    progress: OnCase | None = None,
    **sampling,
) -> Results:
    """Pictures painted from captions.

    As in all functions here, vocabulary: what cases are drawn from; sampling: options of `stages.generate`.
    """

    def paint(prompt: str, number: int) -> Tensor:
        latent = stages.generate(lance, prompt, width=SIDE, height=SIDE, seed=number, **sampling)
        return stages.decode_video(lance, latent)

    return paintings(paint, count, seed=seed, vocabulary=vocabulary, progress=progress)


def paintings(
    paint: Callable[[str, int], Tensor],
    count: int,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    progress: OnCase | None = None,
) -> Results:
    """The pictures `[1, side, side, 3]` that anyone makes of a caption; the number is one for the noise."""

    def judged(number: int) -> Outcome:
        scene, text, language = caption_case(seed, number, vocabulary)
        own = read_picture(paint(text, number)[0])
        outcome = compared(own, scene)
        if any(word in text for word in SIZE_NAMES[language].values()):
            outcome["everything, where sizes are named"] = own.scene == scene
        return outcome | {LANGUAGES[language]: outcome["shape, colour and position"]}

    return cases(judged, count, progress)


def caption_case(seed: int, number: int, vocabulary: Vocabulary = Vocabulary()) -> tuple[Scene, str, Language]:
    random, language = chance(seed, number)
    scene = random_scene(random, "test", vocabulary)
    return scene, caption(scene, random, language), language


def compared(own: Reading, scene: Scene) -> dict[str, bool]:
    """What of a scene a picture shows: its things as a whole, and each part alone."""
    things, wanted = own.things, scene.things
    return {
        "shape, colour and position": shows(own, scene),
        "shapes": sorted(thing.shape for thing in things) == sorted(thing.shape for thing in wanted),
        "colours": sorted(thing.colour for thing in things) == sorted(thing.colour for thing in wanted),
        "positions": sorted(thing.place for thing in things) == sorted(thing.place for thing in wanted),
        "background": own.background == scene.background,
    }


def shows(own: Reading, scene: Scene) -> bool:
    """Whether the picture has the scene's things, in shape, colour and position, and nothing else."""
    return own.scene is not None and without_sizes(own.things) == without_sizes(scene.things)


def shows_all(own: Reading, scene: Scene) -> bool:
    """As `shows`, on the scene's background."""
    return shows(own, scene) and own.background == scene.background


def questions(
    lance: Lance,
    count: int,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    progress: OnCase | None = None,
) -> Results:
    """Answers about pictures, and every fifth time about a clip; the topics in turn."""

    def answer(frames: Tensor, question: str, number: int) -> str:
        return stages.understand(lance, stages.encode_semantic(lance, frames), question, max_new_tokens=MOST_TOKENS)

    return answers(answer, count, seed=seed, vocabulary=vocabulary, progress=progress)


def answers(
    answer: Callable[[Tensor, str, int], str],
    count: int,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    progress: OnCase | None = None,
) -> Results:
    """What anyone answers, given frames and a question."""

    def judged(number: int) -> Outcome:
        frames, question, language = question_case(seed, number, vocabulary)
        right = plain(answer(frames, question.text, number)) == plain(question.answer)
        kind = "" if len(frames) == 1 else "clip: "
        outcome = {"answers": right, f"{kind}{question.topic}": right, LANGUAGES[language]: right}
        if vocabulary.new and name_of(vocabulary.new, language) in question.text + question.answer:
            outcome[f"about {vocabulary.new}"] = right
        return outcome

    return cases(judged, count, progress)


def question_case(seed: int, number: int, vocabulary: Vocabulary = Vocabulary()) -> tuple[Tensor, Question, Language]:
    random, language = chance(seed, number)
    if number % 5 == 4:
        clip = random_clip(random, "test", vocabulary)
        question = clip_question(clip, random, language, CLIP_TOPICS[number // 5 % len(CLIP_TOPICS)])
        return draw_clip(clip, FRAMES), question, language
    scene = random_scene(random, "test", vocabulary)
    question = random_question(scene, random, language, TOPICS[number % len(TOPICS)], vocabulary)
    return draw(scene), question, language


def plain(answer: str) -> str:
    """An answer without what does not change it: capitals, a full stop at its end, space around it."""
    return answer.strip().rstrip(".。").strip().lower()


def edits(
    lance: Lance,
    count: int,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    progress: OnCase | None = None,
    **sampling,
) -> Results:
    """Pictures changed by instructions; the operations in turn."""
    return changes(partial(edited, lance, sampling), count, seed=seed, vocabulary=vocabulary, progress=progress)


def edited(lance: Lance, sampling: Mapping[str, object], frames: Tensor, instruction: str, number: int) -> Tensor:
    """What becomes of frames `[F, side, side, 3]`, in the same shape."""
    semantic = stages.encode_semantic(lance, frames)
    latent = stages.encode_latent(lance, frames, resolution=None)
    return stages.decode_video(lance, stages.edit(lance, semantic, latent, instruction, seed=number, **sampling))


def changes(
    change: Callable[[Tensor, str, int], Tensor],
    count: int,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    progress: OnCase | None = None,
) -> Results:
    """What anyone makes of a picture and an instruction: the true result, and the rest as it was."""

    def judged(number: int) -> Outcome:
        edit, language = edit_case(seed, number, vocabulary)
        before = draw(edit.before)
        own = change(before, edit.instruction, number)
        reading = read_picture(own[0])
        right = shows_all(reading, edit.after)
        outcome = beside(right, edit.operation, language, psnr(own, before, unchanged(before, draw(edit.after))))
        return outcome | {"right in size too": reading.scene == edit.after}

    return cases(judged, count, progress)


def edit_case(seed: int, number: int, vocabulary: Vocabulary = Vocabulary()) -> tuple[Edit, Language]:
    random, language = chance(seed, number)
    return drawn_edit(random, "test", language, vocabulary, OPERATIONS[number % len(OPERATIONS)]), language


def beside(right: bool, operation: str, language: Language, outside: float) -> Outcome:
    """What there is to say of an edit; outside: dB of the rest, NaN where there is no rest, which then is unchanged."""
    clean = math.isnan(outside) or outside >= CLEAN
    return {
        "right, and the rest unchanged": right and clean,
        "right": right,
        "PSNR outside, dB": outside,
        operation: right and clean,
        LANGUAGES[language]: right and clean,
    }


def clip_edits(lance: Lance, count: int, *, seed: int = 0, progress: OnCase | None = None, **sampling) -> Results:
    """Clips changed by instructions: the mover in another colour, or another background, and the way as it was."""
    return clip_changes(partial(edited, lance, sampling), count, seed=seed, progress=progress)


def clip_changes(
    change: Callable[[Tensor, str, int], Tensor], count: int, *, seed: int = 0, progress: OnCase | None = None
) -> Results:
    """As `changes`, of clips."""

    def judged(number: int) -> Outcome:
        edit, language = clip_edit_case(seed, number)
        before = draw_clip(edit.before, FRAMES)
        own = change(before, edit.instruction, number)
        outside = psnr(own, before, unchanged(before, draw_clip(edit.after, FRAMES)))
        return beside(film_shows(read_clip(own), edit.after), edit.operation, language, outside)

    return cases(judged, count, progress)


def clip_edit_case(seed: int, number: int) -> tuple[ClipEdit, Language]:
    random, language = chance(seed, number)
    operation = CLIP_OPERATIONS[number % len(CLIP_OPERATIONS)]
    return clip_edit(random_clip(random, "test"), random, language, operation=operation, split=None), language


def clips(lance: Lance, count: int, *, seed: int = 0, progress: OnCase | None = None, **sampling) -> Results:
    """Clips painted from captions."""

    def film(prompt: str, first: Tensor, number: int) -> Tensor:
        latent = stages.generate(lance, prompt, width=SIDE, height=SIDE, frames=FRAMES, seed=number, **sampling)
        return stages.decode_video(lance, latent)

    return films(film, count, seed=seed, progress=progress)


def clips_from_pictures(
    lance: Lance, count: int, *, seed: int = 0, progress: OnCase | None = None, **sampling
) -> Results:
    """Clips painted from captions and the first frame."""

    def film(prompt: str, first: Tensor, number: int) -> Tensor:
        begin = stages.encode_latent(lance, first, resolution=None)
        latent = stages.generate(lance, prompt, frames=FRAMES, first_frame=begin, seed=number, **sampling)
        return stages.decode_video(lance, latent)

    return films(film, count, seed=seed, progress=progress)


def films(
    film: Callable[[str, Tensor, int], Tensor], count: int, *, seed: int = 0, progress: OnCase | None = None
) -> Results:
    """The clips that anyone makes of a caption and, if it wants it, the true first frame `[1, side, side, 3]`."""

    def judged(number: int) -> Outcome:
        clip, text, language = clip_case(seed, number)
        own = read_clip(film(text, draw_clip(clip, FRAMES)[:1], number))
        direction = own.direction == clip.direction
        wanted = sorted(thing.kind for thing in clip.scene.things)
        return {
            "direction": direction,
            "direction and distance": direction and own.cells == clip.cells,
            "shape and colour": kinds(own.first) == kinds(own.last) == wanted,
            "everything but sizes": film_shows(own, clip),
            f"moving {clip.direction}": direction,
            LANGUAGES[language]: direction,
        }

    return cases(judged, count, progress)


def clip_case(seed: int, number: int) -> tuple[Clip, str, Language]:
    random, language = chance(seed, number)
    clip = random_clip(random, "test")
    return clip, clip_caption(clip, random, language), language


def film_shows(own: ClipReading, clip: Clip) -> bool:
    """Whether a clip begins and ends as it should, in shapes, colours, positions and background."""
    return shows_all(own.first, clip.scene) and shows_all(own.last, clip.scene.changed(clip.mover, place=clip.end))


def kinds(own: Reading) -> list[Kind]:
    return sorted(thing.kind for thing in own.things)


def reconstruction(lance: Lance, count: int, *, seed: int = 0, progress: OnCase | None = None) -> Results:
    """What is left of pictures, and every fourth time of a clip, after the VAE alone."""

    def through(frames: Tensor) -> Tensor:
        return stages.decode_video(lance, stages.encode_latent(lance, frames, resolution=None))

    return copies(through, count, seed=seed, progress=progress)


def copies(
    through: Callable[[Tensor], Tensor], count: int, *, seed: int = 0, progress: OnCase | None = None
) -> Results:
    """What anything that gives frames back leaves of them."""

    def judged(number: int) -> Outcome:
        random, _ = chance(seed, number)
        if number % 4 == 3:
            clip = random_clip(random, "test")
            frames = draw_clip(clip, FRAMES)
            own = through(frames)
            return {"clips, dB": psnr(own, frames), "clips read as drawn": film_shows(read_clip(own), clip)}
        scene = random_scene(random, "test")
        frames = draw(scene)
        own = through(frames)
        return {"pictures, dB": psnr(own, frames), "pictures read as drawn": read_picture(own[0]).scene == scene}

    return cases(judged, count, progress)
