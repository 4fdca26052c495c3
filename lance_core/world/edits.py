"""Instructions that change a picture or a clip of the small world, each with the one right result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from .scene import BACKGROUNDS, SIZES, Clip, Place, Scene, Split, Thing, Vocabulary, held_out, random_scene
from .words import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    SHAPE_NAMES,
    SPOTS,
    Language,
    at,
    full_reference,
    hue,
    one,
    refer,
    with_article,
)

OPERATIONS = ("recolour", "move", "remove", "add", "replace", "background")
CLIP_OPERATIONS = ("recolour", "background")
INSTRUCTIONS = {
    "en": {
        "recolour": ("Make {thing} {colour}.", "Change the {hue} of {thing} to {colour}."),
        "move": ("Move {thing} to {spot}.",),
        "remove": ("Remove {thing}.",),
        "add": ("Add {new} {at}.",),
        "replace": ("Replace {thing} with {shape}.",),
        "background": ("Make the background {colour}.", "Change the background to {colour}."),
    },
    "zh": {
        "recolour": ("把{thing}变成{colour}。", "把{thing}的颜色改成{colour}。"),
        "move": ("把{thing}移到{spot}。",),
        "remove": ("去掉{thing}。",),
        "add": ("在{at}添加{new}。",),
        "replace": ("把{thing}换成{shape}。",),
        "background": ("把背景变成{colour}。", "把背景改成{colour}。"),
    },
}
KEEP = {"en": " Keep everything else as it is.", "zh": "其他保持不变。"}
KEEP_SHARE = 0.3  # of the instructions end with it
MOST_THINGS = 3
TRIES = 200  # proposals of one operation before it counts as impossible

Proposal = tuple[Scene, dict[str, str]]  # the result, and what the instruction says


@dataclass(frozen=True)
class Edit:
    before: Scene
    instruction: str
    after: Scene
    operation: str

    @property
    def places(self) -> tuple[Place, ...]:
        """The grid places that change, in reading order; none where the background does."""
        return tuple(sorted({thing.place for thing in set(self.before.things) ^ set(self.after.things)}))


@dataclass(frozen=True)
class ClipEdit:
    before: Clip
    instruction: str
    after: Clip
    operation: str


def random_edit(
    scene: Scene,
    random: Random,
    language: Language = "en",
    vocabulary: Vocabulary = Vocabulary(),
    operation: str | None = None,
    split: Split | None = "train",
) -> Edit:
    """One of OPERATIONS, or the one asked for; of the split "train", the result is not held out.

    Raises ValueError where the scene allows no such edit: removing its only thing, adding a fourth.
    """
    for name in [operation] if operation else random.sample(OPERATIONS, len(OPERATIONS)):
        if edit := _tried(scene, random, language, vocabulary, name, split):
            return edit
    raise ValueError(f"no edit of the kind {operation or 'any'} suits {scene}")


def drawn_edit(
    random: Random,
    split: Split,
    language: Language = "en",
    vocabulary: Vocabulary = Vocabulary(),
    operation: str | None = None,
) -> Edit:
    """One of OPERATIONS, or the one asked for, on a scene drawn for it; of the split "test", that scene is held out.

    Where the vocabulary has something new, operations that can bring it into a scene without it do so, and of the split
    "test" the result is held out; the others change a scene that shows it.
    """
    operation = operation or random.choice(OPERATIONS)
    brings = _can_bring(operation, vocabulary)
    drawn, options = (vocabulary.without_new, vocabulary.only_new) if brings else (vocabulary, vocabulary)
    while True:
        scene = random_scene(random, None if brings and split == "test" else split, drawn)
        edit = _tried(scene, random, language, options, operation, split)
        if edit and held_out(edit.after if brings else edit.before) == (split == "test"):
            return edit


def clip_edit(
    clip: Clip,
    random: Random,
    language: Language = "en",
    vocabulary: Vocabulary = Vocabulary(),
    operation: str | None = None,
    split: Split | None = "train",
) -> ClipEdit:
    """The mover in another colour, or another background; errors as those of `random_edit`."""
    for name in [operation] if operation else random.sample(CLIP_OPERATIONS, len(CLIP_OPERATIONS)):
        for _ in range(TRIES):
            mover = clip.mover
            if name == "recolour":
                mover = replace(mover, colour=random.choice(vocabulary.colours))
                after, words = _recoloured(clip.scene, clip.mover, mover.colour, random, language)
            else:
                after, words = _background(clip.scene, random, language, vocabulary)
            changed = replace(clip, scene=after, mover=mover)
            if all(_allowed(old, new, split) for old, new in zip(clip.scenes, changed.scenes)):
                return ClipEdit(clip, _instruction(name, words, random, language), changed, name)
    raise ValueError(f"no edit of the kind {operation or 'any'} suits {clip}")


def suggestion(scene: Scene, language: Language = "en") -> Edit:
    """The one right answer to the question how to make the picture more cheerful: a rule of the scene alone.

    The first thing in reading order that can become yellow does; where none can, the background becomes white, or black
    if it is white. The result may be held out.
    """
    kinds = {thing.kind for thing in scene.things}
    for thing in scene.things:
        if ("yellow", thing.shape) not in kinds:
            words = {"thing": full_reference(thing, language), "colour": COLOUR_NAMES[language]["yellow"]}
            text = INSTRUCTIONS[language]["recolour"][0].format(**words)
            return Edit(scene, text, scene.changed(thing, colour="yellow"), "recolour")
    background = "black" if scene.background == "white" else "white"
    text = INSTRUCTIONS[language]["background"][1].format(colour=BACKGROUND_NAMES[language][background])
    return Edit(scene, text, replace(scene, background=background), "background")


def _can_bring(operation: str, vocabulary: Vocabulary) -> bool:
    """Whether the operation can put what is new into a scene."""
    if vocabulary.new is None:
        return False
    return operation in ("add", "recolour" if vocabulary.new in vocabulary.colours else "replace")


def _tried(
    scene: Scene, random: Random, language: Language, vocabulary: Vocabulary, operation: str, split: Split | None
) -> Edit | None:
    """None where the scene allows no such edit."""
    if _hopeless(scene, operation):
        return None
    for _ in range(TRIES):
        after, words = _PROPOSALS[operation](scene, random, language, vocabulary)
        if _allowed(scene, after, split):
            return Edit(scene, _instruction(operation, words, random, language), after, operation)
    return None


def _hopeless(scene: Scene, operation: str) -> bool:
    return {"remove": len(scene.things) == 1, "add": len(scene.things) >= MOST_THINGS}.get(operation, False)


def _allowed(before: Scene, after: Scene, split: Split | None) -> bool:
    kinds = {thing.kind for thing in after.things}
    return after != before and len(kinds) == len(after.things) and not (split == "train" and held_out(after))


def _instruction(operation: str, words: dict[str, str], random: Random, language: Language) -> str:
    text = random.choice(INSTRUCTIONS[language][operation]).format(**words, hue=hue(random))
    return text + KEEP[language] if random.random() < KEEP_SHARE else text


def _recoloured(scene: Scene, thing: Thing, colour: str, random: Random, language: Language) -> Proposal:
    words = {"thing": refer(scene, thing, random, language), "colour": COLOUR_NAMES[language][colour]}
    return scene.changed(thing, colour=colour), words


def _recolour(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Proposal:
    return _recoloured(scene, random.choice(scene.things), random.choice(vocabulary.colours), random, language)


def _move(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Proposal:
    thing, place = random.choice(scene.things), random.choice(scene.free_places)
    words = {"thing": refer(scene, thing, random, language), "spot": SPOTS[language][place]}
    return scene.changed(thing, place=place), words


def _remove(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Proposal:
    thing = random.choice(scene.things)
    return scene.without(thing), {"thing": refer(scene, thing, random, language)}


def _add(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Proposal:
    colour, shape = random.choice(vocabulary.colours), random.choice(vocabulary.shapes)
    new = Thing(random.choice(scene.free_places), colour, shape, random.choice(tuple(SIZES)))
    return scene.with_things([*scene.things, new]), {"new": one(new, language), "at": at(new.place, language)}


def _replace(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Proposal:
    thing, shape = random.choice(scene.things), random.choice(vocabulary.shapes)
    name = SHAPE_NAMES[language][shape]
    named = with_article(name) if language == "en" else name
    return scene.changed(thing, shape=shape), {"thing": refer(scene, thing, random, language), "shape": named}


def _background(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Proposal:
    background = random.choice(tuple(BACKGROUNDS))
    return replace(scene, background=background), {"colour": BACKGROUND_NAMES[language][background]}


_PROPOSALS: dict[str, Callable[[Scene, Random, Language, Vocabulary], Proposal]] = {
    "recolour": _recolour,
    "move": _move,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "background": _background,
}
