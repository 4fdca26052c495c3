"""How one speaks of the small world, in English and Chinese: the names of what it shows, captions, references.

Few words and few turns of phrase, so that a very small model can learn them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from .scene import DIRECTIONS, PLACES, Clip, Place, Scene, Thing

Language = Literal["en", "zh"]
CHINESE = 0.25  # share of what is said

COLOUR_NAMES = {
    "en": {name: name for name in ("red", "green", "blue", "yellow", "purple", "orange")},
    "zh": {
        "red": "红色",
        "green": "绿色",
        "blue": "蓝色",
        "yellow": "黄色",
        "purple": "紫色",
        "orange": "橙色",
    },
}
SHAPE_NAMES = {
    "en": {name: name for name in ("circle", "square", "triangle", "star", "heart")},
    "zh": {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "heart": "心形"},
}
SIZE_NAMES = {"en": {"small": "small", "big": "big"}, "zh": {"small": "小", "big": "大"}}
BACKGROUND_NAMES = {
    "en": {"white": "white", "gray": "gray", "black": "black"},
    "zh": {"white": "白色", "gray": "灰色", "black": "黑色"},
}
DIRECTION_NAMES = {
    "en": {name: name for name in DIRECTIONS},
    "zh": {"up": "上", "down": "下", "left": "左", "right": "右"},
}


def _by_place(*names: str) -> dict[Place, str]:
    return dict(zip(PLACES, names))


PLACE_NAMES = {
    "en": _by_place(
        *("top left", "top", "top right"), *("left", "center", "right"), *("bottom left", "bottom", "bottom right")
    ),
    "zh": _by_place("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"),
}
# Where something is ("on the left") and where it comes from or goes: "to the left side", for "to the left" would be a
# direction.
_PREPOSITIONS = {(1, 0): "on", (1, 1): "in", (1, 2): "on"}
AT = {place: f"{_PREPOSITIONS.get(place, 'at')} the {name}" for place, name in PLACE_NAMES["en"].items()}
SPOTS = {
    "en": {
        place: f"the {name} side" if name in DIRECTIONS else f"the {name}" for place, name in PLACE_NAMES["en"].items()
    },
    "zh": PLACE_NAMES["zh"],
}

CAPTIONS = {
    "en": (
        "{things}, on a {background} background.",
        "On a {background} background, {things}.",
        "A {background} background with {things}.",
    ),
    "zh": ("{things}，背景是{background}。", "{background}背景上，{things}。"),
}
CLIP_CAPTIONS = {
    "en": (
        "{mover} moves {direction}, starting {at}{rest}, on a {background} background.",
        "On a {background} background, {mover} moves {direction} from {start} to {end}{rest}.",
    ),
    "zh": (
        "{mover}从{start}向{direction}移动{rest}，背景是{background}。",
        "{background}背景上，{mover}从{start}向{direction}移动到{end}{rest}。",
    ),
}
RESTS = {"en": ", and {thing} rests {at}", "zh": "，{at}有{thing}静止不动"}
UNSIZED_SHARE = 0.2  # of the captions of pictures leave out the sizes


def caption(scene: Scene, random: Random, language: Language = "en") -> str:
    """A sentence that names every thing, with its place and mostly its size, and the background."""
    sized = random.random() >= UNSIZED_SHARE
    things = [_placed(thing, language, sized) for thing in random.sample(scene.things, len(scene.things))]
    background = BACKGROUND_NAMES[language][scene.background]
    template = random.choice(CAPTIONS[language])
    return capital(template.format(things=_listed(things, language), background=background))


def clip_caption(clip: Clip, random: Random, language: Language = "en") -> str:
    """A sentence that names the mover, its way and where it starts, the thing that rests if any, and the background."""
    rest = "".join(
        RESTS[language].format(thing=one(thing, language), at=at(thing.place, language))
        for thing in clip.scene.without(clip.mover).things
    )
    text = random.choice(CLIP_CAPTIONS[language]).format(
        mover=one(clip.mover, language),
        direction=DIRECTION_NAMES[language][clip.direction],
        at=at(clip.mover.place, language),
        start=SPOTS[language][clip.mover.place],
        end=SPOTS[language][clip.end],
        rest=rest,
        background=BACKGROUND_NAMES[language][clip.scene.background],
    )
    return capital(text)


def refer(scene: Scene, thing: Thing, random: Random, language: Language = "en") -> str:
    """Words that mean this thing of the scene and no other: "the red circle", or by shape or colour alone if unique."""
    ways = [full_reference(thing, language)]
    if unique(scene, "shape", thing.shape):
        ways.append(shape_reference(thing, language))
    if unique(scene, "colour", thing.colour):
        ways.append(colour_reference(thing, language))
    return random.choice(ways)


def full_reference(thing: Thing, language: Language) -> str:
    colour, shape = COLOUR_NAMES[language][thing.colour], SHAPE_NAMES[language][thing.shape]
    return f"the {colour} {shape}" if language == "en" else f"{colour}的{shape}"


def shape_reference(thing: Thing, language: Language) -> str:
    shape = SHAPE_NAMES[language][thing.shape]
    return f"the {shape}" if language == "en" else shape


def colour_reference(thing: Thing, language: Language) -> str:
    colour = COLOUR_NAMES[language][thing.colour]
    return f"the {colour} shape" if language == "en" else f"{colour}的图形"


def place_reference(thing: Thing, language: Language) -> str:
    """Right for every thing of every scene."""
    return f"the shape {AT[thing.place]}" if language == "en" else f"{PLACE_NAMES['zh'][thing.place]}的图形"


def name_of(look: str, language: Language) -> str:
    """Of a colour or a shape."""
    return {**COLOUR_NAMES[language], **SHAPE_NAMES[language]}[look]


def unique(scene: Scene, attribute: str, value: str) -> bool:
    """Whether exactly one thing of the scene has the value."""
    return sum(getattr(thing, attribute) == value for thing in scene.things) == 1


def one(thing: Thing, language: Language, sized: bool = True) -> str:
    """The thing with an article: "a big red circle"."""
    size, colour = SIZE_NAMES[language][thing.size], COLOUR_NAMES[language][thing.colour]
    shape = SHAPE_NAMES[language][thing.shape]
    if language == "en":
        return with_article(f"{size} {colour} {shape}" if sized else f"{colour} {shape}")
    return f"一个{size}的{colour}{shape}" if sized else f"一个{colour}{shape}"


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def at(place: Place, language: Language) -> str:
    return AT[place] if language == "en" else PLACE_NAMES["zh"][place]


def hue(random: Random) -> str:
    """Either spelling of the word."""
    return random.choice(("colour", "color"))


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _placed(thing: Thing, language: Language, sized: bool) -> str:
    named, where = one(thing, language, sized), at(thing.place, language)
    return f"{named} {where}" if language == "en" else f"{where}有{named}"


def _listed(parts: Sequence[str], language: Language) -> str:
    if language == "zh" or len(parts) == 1:
        return "，".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
