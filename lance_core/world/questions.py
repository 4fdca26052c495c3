"""Questions about a picture or a clip of the small world, each with the one right, short answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .edits import suggestion
from .scene import Clip, Scene, Vocabulary
from .words import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    DIRECTION_NAMES,
    PLACE_NAMES,
    SHAPE_NAMES,
    SIZE_NAMES,
    Language,
    at,
    hue,
    place_reference,
    refer,
    shape_reference,
    unique,
    with_article,
)

TOPICS = ("colour", "shape", "count", "position", "size", "background", "presence", "suggestion")
CLIP_TOPICS = ("direction", "colour", "shape", "background")
TEXTS = {
    "en": {
        "colour": "What {hue} is {thing}?",
        "shape": "What shape is {at}?",
        "shape of": "What shape is the {colour} one?",
        "count": "How many shapes are there?",
        "count of": "How many {shape}s are there?",
        "position": "Where is {thing}?",
        "size": "Is {thing} big or small?",
        "background": "What {hue} is the background?",
        "presence": "Is there {thing}?",
        "suggestion": "Name one change that would make this picture more cheerful. Answer with one short sentence.",
        "direction": "Which way does {thing} move?",
        "colour of the mover": "What {hue} is the moving shape?",
        "shape of the mover": "What shape is moving?",
    },
    "zh": {
        "colour": "{thing}是什么颜色？",
        "shape": "{at}是什么形状？",
        "shape of": "{colour}的图形是什么形状？",
        "count": "有几个图形？",
        "count of": "有几个{shape}？",
        "position": "{thing}在哪里？",
        "size": "{thing}是大还是小？",
        "background": "背景是什么颜色？",
        "presence": "有{thing}吗？",
        "suggestion": "说出一个能让画面更欢快的改动，用一句短话回答。",
        "direction": "{thing}向哪边移动？",
        "colour of the mover": "移动的图形是什么颜色？",
        "shape of the mover": "移动的图形是什么形状？",
    },
}
YES_NO = {"en": ("yes", "no"), "zh": ("有", "没有")}

Asked = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    topic: str


def random_question(
    scene: Scene,
    random: Random,
    language: Language = "en",
    topic: str | None = None,
    vocabulary: Vocabulary = Vocabulary(),
) -> Question:
    """On one of TOPICS, or on the one asked for; the vocabulary is where absent things that are asked for come from."""
    topic = topic or random.choice(TOPICS)
    return Question(*_ASKERS[topic](scene, random, language, vocabulary), topic)


def clip_question(clip: Clip, random: Random, language: Language = "en", topic: str | None = None) -> Question:
    """On one of CLIP_TOPICS, or on the one asked for."""
    topic = topic or random.choice(CLIP_TOPICS)
    texts, mover = TEXTS[language], clip.mover
    if topic == "direction":
        text = texts["direction"].format(thing=refer(clip.scene, mover, random, language))
        return Question(text, DIRECTION_NAMES[language][clip.direction], topic)
    if topic == "colour":
        text = texts["colour of the mover"].format(hue=hue(random))
        return Question(text, COLOUR_NAMES[language][mover.colour], topic)
    if topic == "shape":
        return Question(texts["shape of the mover"], SHAPE_NAMES[language][mover.shape], topic)
    return random_question(clip.scene, random, language, topic)


def _colour(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    thing = random.choice(scene.things)
    by_shape = unique(scene, "shape", thing.shape) and random.random() < 0.5
    reference = shape_reference(thing, language) if by_shape else place_reference(thing, language)
    return TEXTS[language]["colour"].format(thing=reference, hue=hue(random)), COLOUR_NAMES[language][thing.colour]


def _shape(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    thing = random.choice(scene.things)
    by_colour = unique(scene, "colour", thing.colour) and random.random() < 0.5
    text = TEXTS[language]["shape of" if by_colour else "shape"]
    words = {"colour": COLOUR_NAMES[language][thing.colour], "at": at(thing.place, language)}
    return text.format(**words), SHAPE_NAMES[language][thing.shape]


def _count(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    if random.random() < 0.5:
        return TEXTS[language]["count"], str(len(scene.things))
    shape = random.choice((random.choice(scene.things).shape, random.choice(vocabulary.shapes)))
    text = TEXTS[language]["count of"].format(shape=SHAPE_NAMES[language][shape])
    return text, str(sum(thing.shape == shape for thing in scene.things))


def _position(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    thing = random.choice(scene.things)
    text = TEXTS[language]["position"].format(thing=refer(scene, thing, random, language))
    return text, PLACE_NAMES[language][thing.place]


def _size(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    thing = random.choice(scene.things)
    text = TEXTS[language]["size"].format(thing=refer(scene, thing, random, language))
    return text, SIZE_NAMES[language][thing.size]


def _background(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    return TEXTS[language]["background"].format(hue=hue(random)), BACKGROUND_NAMES[language][scene.background]


def _presence(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    coloured = random.random() < 0.5
    present = {_looks(thing.colour, thing.shape, coloured, language): True for thing in scene.things}
    absent = [
        looks
        for colour, shape in vocabulary.kinds
        if (looks := _looks(colour, shape, coloured, language)) not in present
    ]
    there = random.random() < 0.5 or not absent
    text = TEXTS[language]["presence"].format(thing=random.choice(list(present) if there else absent))
    return text, YES_NO[language][0 if there else 1]


def _looks(colour: str, shape: str, coloured: bool, language: Language) -> str:
    colour, shape = COLOUR_NAMES[language][colour], SHAPE_NAMES[language][shape]
    if language == "en":
        return with_article(f"{colour} {shape}" if coloured else shape)
    return f"{colour}的{shape}" if coloured else shape


def _suggestion(scene: Scene, random: Random, language: Language, vocabulary: Vocabulary) -> Asked:
    return TEXTS[language]["suggestion"], suggestion(scene, language).instruction


_ASKERS: dict[str, Callable[[Scene, Random, Language, Vocabulary], Asked]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "size": _size,
    "background": _background,
    "presence": _presence,
    "suggestion": _suggestion,
}
