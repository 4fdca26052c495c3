"""How often a model is right in the small world, on scenes that it was never trained on, judged by pixels and words.

Every case follows from the seed and its number alone, so the same call finds the same on the same machine, and more
cases begin with the fewer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from torch import Tensor

from .. import stages
from ..checkpoint import Lance
from ..checks import check_whole
from .edits import CLIP_OPERATIONS, OPERATIONS, ClipEdit, Edit, clip_edit, drawn_edit
from .judge import ClipReading, Reading, psnr, read_clip, read_picture, unchanged, without_sizes
from .questions import CLIP_TOPICS, TOPICS, Question, clip_question, random_question
from .render import SIDE, centre, draw, draw_clip
from .scene import Clip, Kind, Scene, Vocabulary, random_clip, random_scene
from .shares import LANGUAGES, Outcome, Results, gather
from .words import CHINESE, SIZE_NAMES, Language, caption, clip_caption, name_of

FRAMES = 9  # of a clip
CLEAN = 30.0  # dB outside an edit, from which the rest counts as unchanged
MOST_TOKENS = 48  # of an answer; the longest is a sentence

OnCase = Callable[[int, int], None]


@dataclass(frozen=True)
class Cases:
    """So many cases of a seed, drawn from a vocabulary. progress(done, count) after each."""

    count: int
    seed: int = 0
    vocabulary: Vocabulary = Vocabulary()
    progress: OnCase | None = None

    def __post_init__(self):
        check_whole("count", self.count, 1)

    def chance(self, number: int) -> tuple[Random, Language]:
        """What a case is drawn from, and its language."""
        random = Random(f"{self.seed} {number}")
        return random, "zh" if random.random() < CHINESE else "en"

    def judge(self, judged: Callable[[int], Outcome]) -> Results:
        """Runs them. judged(number): one of them."""
        outcomes = []
        for number in range(self.count):
            outcomes.append(judged(number))
            if self.progress is not None:
                self.progress(number + 1, self.count)
        return gather(outcomes)


def generation(lance: Lance, cases: Cases, **sampling) -> Results:
    """Pictures painted from captions.

    As in all functions here, sampling: options of `stages.generate`.
    """

    def paint(prompt: str, number: int) -> Tensor:
        latent = stages.generate(lance, prompt, width=SIDE, height=SIDE, seed=number, **sampling)
        return stages.decode_video(lance, latent)

    return paintings(paint, cases)


def paintings(paint: Callable[[str, int], Tensor], cases: Cases) -> Results:
    """The pictures `[1, side, side, 3]` that anyone makes of a caption; the number is one for the noise."""

    def judged(number: int) -> Outcome:
        scene, text, language = caption_case(cases, number)
        own = read_picture(paint(text, number)[0])
        outcome = compared(own, scene)
        if any(word in text for word in SIZE_NAMES[language].values()):
            outcome["everything, where sizes are named"] = own.scene == scene
        return outcome | {LANGUAGES[language]: outcome["shape, colour and position"]}

    return cases.judge(judged)


def caption_case(cases: Cases, number: int) -> tuple[Scene, str, Language]:
    random, language = cases.chance(number)
    scene = random_scene(random, "test", cases.vocabulary)
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


def questions(lance: Lance, cases: Cases) -> Results:
    """Answers about pictures, and every fifth time about a clip; the topics in turn."""

    def answer(frames: Tensor, question: str, number: int) -> str:
        return stages.understand(lance, stages.encode_semantic(lance, frames), question, max_new_tokens=MOST_TOKENS)

    return answers(answer, cases)


def answers(answer: Callable[[Tensor, str, int], str], cases: Cases) -> Results:
    """What anyone answers, given frames and a question."""
    new = cases.vocabulary.new

    def judged(number: int) -> Outcome:
        frames, question, language = question_case(cases, number)
        right = plain(answer(frames, question.text, number)) == plain(question.answer)
        kind = "" if len(frames) == 1 else "clip: "
        outcome = {"answers": right, f"{kind}{question.topic}": right, LANGUAGES[language]: right}
        if new and name_of(new, language) in question.text + question.answer:
            outcome[f"about {new}"] = right
        return outcome

    return cases.judge(judged)


def question_case(cases: Cases, number: int) -> tuple[Tensor, Question, Language]:
    random, language = cases.chance(number)
    if number % 5 == 4:
        clip = random_clip(random, "test", cases.vocabulary)
        question = clip_question(clip, random, language, CLIP_TOPICS[number // 5 % len(CLIP_TOPICS)])
        return draw_clip(clip, FRAMES), question, language
    scene = random_scene(random, "test", cases.vocabulary)
    question = random_question(scene, random, language, TOPICS[number % len(TOPICS)], cases.vocabulary)
    return draw(scene), question, language


def plain(answer: str) -> str:
    """An answer without what does not change it: capitals, a full stop at its end, space around it."""
    return answer.strip().rstrip(".。").strip().lower()


def edits(lance: Lance, cases: Cases, **sampling) -> Results:
    """Pictures changed by instructions; the operations in turn."""
    return changes(partial(edited, lance, sampling), cases)


def edited(lance: Lance, sampling: Mapping[str, object], frames: Tensor, instruction: str, number: int) -> Tensor:
    """What becomes of frames `[F, side, side, 3]`, in the same shape."""
    semantic = stages.encode_semantic(lance, frames)
    latent = stages.encode_latent(lance, frames, resolution=None)
    return stages.decode_video(lance, stages.edit(lance, semantic, latent, instruction, seed=number, **sampling))


def changes(change: Callable[[Tensor, str, int], Tensor], cases: Cases) -> Results:
    """What anyone makes of a picture and an instruction: the true result, and the rest as it was."""

    def judged(number: int) -> Outcome:
        edit, language = edit_case(cases, number)
        own = change(draw(edit.before), edit.instruction, number)
        return beside(*made(own, edit.before, edit.after), edit.operation, language)

    return cases.judge(judged)


def edit_case(cases: Cases, number: int) -> tuple[Edit, Language]:
    random, language = cases.chance(number)
    return drawn_edit(random, "test", language, cases.vocabulary, OPERATIONS[number % len(OPERATIONS)]), language


def made(own: Tensor, before: Scene, after: Scene) -> tuple[bool, float]:
    """Whether a picture `[1, side, side, 3]` shows the scene after an edit, sizes too; and dB of what the edit leaves.

    dB: NaN where it leaves nothing.
    """
    given, true = draw(before), draw(after)
    return read_picture(own[0]).scene == after, psnr(own, given, unchanged(given, true))


def nothing_else_made(own: Tensor, before: Scene, after: Scene) -> bool:
    """As `made`, with the rest unchanged."""
    right, outside = made(own, before, after)
    return right and clean(outside)


def clean(outside: float) -> bool:
    """Whether the rest of an edited picture is unchanged; where there is none, it is."""
    return math.isnan(outside) or outside >= CLEAN


def beside(right: bool, outside: float, operation: str, language: Language) -> Outcome:
    """What there is to say of an edit; outside: dB of the rest."""
    alone = right and clean(outside)
    return {
        "right, and the rest unchanged": alone,
        "right": right,
        "PSNR outside, dB": outside,
        operation: alone,
        LANGUAGES[language]: alone,
    }


def clip_edits(lance: Lance, cases: Cases, **sampling) -> Results:
    """Clips changed by instructions: the mover in another colour, or another background, and the way as it was."""
    return clip_changes(partial(edited, lance, sampling), cases)


def clip_changes(change: Callable[[Tensor, str, int], Tensor], cases: Cases) -> Results:
    """As `changes`, of clips."""

    def judged(number: int) -> Outcome:
        edit, language = clip_edit_case(cases, number)
        before = draw_clip(edit.before, FRAMES)
        own = change(before, edit.instruction, number)
        outside = psnr(own, before, unchanged(before, draw_clip(edit.after, FRAMES)))
        return beside(film_shows(read_clip(own), edit.after), outside, edit.operation, language)

    return cases.judge(judged)


def clip_edit_case(cases: Cases, number: int) -> tuple[ClipEdit, Language]:
    random, language = cases.chance(number)
    operation = CLIP_OPERATIONS[number % len(CLIP_OPERATIONS)]
    clip = random_clip(random, "test", cases.vocabulary)
    return clip_edit(clip, random, language, cases.vocabulary, operation, split=None), language


def clips(lance: Lance, cases: Cases, **sampling) -> Results:
    """Clips painted from captions."""

    def film(prompt: str, first: Tensor, number: int) -> Tensor:
        latent = stages.generate(lance, prompt, width=SIDE, height=SIDE, frames=FRAMES, seed=number, **sampling)
        return stages.decode_video(lance, latent)

    return films(film, cases)


def clips_from_pictures(lance: Lance, cases: Cases, **sampling) -> Results:
    """Clips painted from captions and the first frame."""

    def film(prompt: str, first: Tensor, number: int) -> Tensor:
        begin = stages.encode_latent(lance, first, resolution=None)
        latent = stages.generate(lance, prompt, frames=FRAMES, first_frame=begin, seed=number, **sampling)
        return stages.decode_video(lance, latent)

    return films(film, cases)


def films(film: Callable[[str, Tensor, int], Tensor], cases: Cases) -> Results:
    """The clips that anyone makes of a caption and, if it wants it, the true first frame `[1, side, side, 3]`."""

    def judged(number: int) -> Outcome:
        clip, text, language = clip_case(cases, number)
        own = read_clip(film(text, draw_clip(clip, FRAMES)[:1], number))
        direction = goes(own, clip)
        wanted = sorted(thing.kind for thing in clip.scene.things)
        return {
            "direction": direction,
            "direction and distance": direction and own.cells == clip.cells,
            "shape and colour": kinds(own.first) == kinds(own.last) == wanted,
            "everything but sizes": film_shows(own, clip),
            f"moving {clip.direction}": direction,
            LANGUAGES[language]: direction,
        }

    return cases.judge(judged)


def clip_case(cases: Cases, number: int) -> tuple[Clip, str, Language]:
    random, language = cases.chance(number)
    clip = random_clip(random, "test", cases.vocabulary)
    return clip, clip_caption(clip, random, language), language


def goes(own: ClipReading, clip: Clip) -> bool:
    """Whether what should move does, in the right direction, and nothing else, whatever it looks like at the end."""
    nearest = min(own.first.spots, key=lambda spot: math.dist(spot, centre(clip.mover)), default=None)
    return own.direction == clip.direction and own.start == nearest


def film_shows(own: ClipReading, clip: Clip) -> bool:
    """Whether a clip begins and ends as it should, in shapes, colours, positions and background."""
    return shows_all(own.first, clip.scene) and shows_all(own.last, clip.scene.changed(clip.mover, place=clip.end))


def kinds(own: Reading) -> list[Kind]:
    return sorted(thing.kind for thing in own.things)


def reconstruction(lance: Lance, cases: Cases) -> Results:
    """What is left of pictures, and every fourth time of a clip, after the VAE alone."""

    def through(frames: Tensor) -> Tensor:
        return stages.decode_video(lance, stages.encode_latent(lance, frames, resolution=None))

    return copies(through, cases)


def copies(through: Callable[[Tensor], Tensor], cases: Cases) -> Results:
    """What anything that gives frames back leaves of them."""

    def judged(number: int) -> Outcome:
        random, _ = cases.chance(number)
        if number % 4 == 3:
            clip = random_clip(random, "test", cases.vocabulary)
            frames = draw_clip(clip, FRAMES)
            own = through(frames)
            reading = read_clip(own)
            return {
                "clips, dB": psnr(own, frames),
                "clips in their direction": goes(reading, clip),
                "clips read as drawn": film_shows(reading, clip),
            }
        scene = random_scene(random, "test", cases.vocabulary)
        frames = draw(scene)
        own = through(frames)
        return {"pictures, dB": psnr(own, frames), "pictures read as drawn": read_picture(own[0]).scene == scene}

    return cases.judge(judged)
