"""What a picture of the small world shows: one to three coloured shapes in a grid of nine places, or one that moves.

Everything here is plain data, drawn by chance from a `random.Random`, so that a seed always gives the same scenes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Literal

from ..errors import LanceError

COLOURS = {
    "red": (222, 40, 46),
    "green": (30, 150, 70),
    "blue": (40, 84, 222),
    "yellow": (244, 208, 36),
    "purple": (150, 60, 190),
    "orange": (250, 130, 30),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (16, 16, 16)}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = {"small": 0.11, "big": 0.155}  # radius as a share of the picture's side
PLACES = tuple((row, column) for row in range(3) for column in range(3))
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
CENTRES = (0.18, 0.5, 0.82)  # of a row or column, as a share of the picture's side

# What nano-Lance has never seen, so that fine-tuning can teach it.
NEW_COLOURS, NEW_SHAPES = ("orange",), ("heart",)
KNOWN_COLOURS = tuple(name for name in COLOURS if name not in NEW_COLOURS)
KNOWN_SHAPES = tuple(name for name in SHAPES if name not in NEW_SHAPES)
HELD_OUT_SHARE = 0.1
COUNTS = (0.25, 0.5, 0.25)  # how often a scene of one, two or three things is tried

Place = tuple[int, int]  # row and column, 0..2 from the top left
Kind = tuple[str, str]  # colour and shape
Split = Literal["train", "test"]


@dataclass(frozen=True, order=True)
class Thing:
    """One shape. place comes first, so that things sort as one reads: from the top left to the bottom right."""

    place: Place
    colour: str
    shape: str
    size: str = "big"

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Things on a background: no two in one place, no two of one colour and shape; in reading order."""

    background: str
    things: tuple[Thing, ...]

    def __post_init__(self):
        object.__setattr__(self, "things", tuple(sorted(self.things)))

    def with_things(self, things: Sequence[Thing]) -> Scene:
        return replace(self, things=tuple(things))

    def without(self, thing: Thing) -> Scene:
        return self.with_things([other for other in self.things if other != thing])

    def changed(self, thing: Thing, **values) -> Scene:
        """The scene with other values in one of its things."""
        return self.with_things([replace(other, **values) if other == thing else other for other in self.things])

    @property
    def free_places(self) -> list[Place]:
        taken = {thing.place for thing in self.things}
        return [place for place in PLACES if place not in taken]


@dataclass(frozen=True)
class Clip:
    """A scene whose `mover`, one of its things, travels `cells` (1 or 2) in a direction while all else rests."""

    scene: Scene
    mover: Thing
    direction: str
    cells: int

    @property
    def end(self) -> Place:
        """Where the mover arrives."""
        row, column = DIRECTIONS[self.direction]
        return self.mover.place[0] + row * self.cells, self.mover.place[1] + column * self.cells

    @property
    def path(self) -> list[Place]:
        """The places through which it comes."""
        row, column = DIRECTIONS[self.direction]
        return [(self.mover.place[0] + row * i, self.mover.place[1] + column * i) for i in range(self.cells + 1)]

    @property
    def scenes(self) -> list[Scene]:
        """What it shows, with the mover in each place through which it comes."""
        return [self.scene.changed(self.mover, place=place) for place in self.path]


@dataclass(frozen=True)
class Vocabulary:
    """The kinds that scenes are drawn from. new: one of the colours or shapes, which every scene shows."""

    colours: tuple[str, ...] = KNOWN_COLOURS
    shapes: tuple[str, ...] = KNOWN_SHAPES
    new: str | None = None

    @property
    def kinds(self) -> list[Kind]:
        return [(colour, shape) for colour in self.colours for shape in self.shapes]

    @property
    def whole(self) -> Vocabulary:
        """All of it alike: scenes may show the new one or not."""
        return replace(self, new=None)

    @property
    def without_new(self) -> Vocabulary:
        colours, shapes = (tuple(name for name in names if name != self.new) for names in (self.colours, self.shapes))
        return Vocabulary(colours, shapes)

    @property
    def only_new(self) -> Vocabulary:
        """The kinds of the new colour or shape."""
        return replace(self, **{"colours" if self.new in self.colours else "shapes": (self.new,)})

    def sample(self, random: Random, count: int) -> list[Kind]:
        """So many kinds, all different, the first of them new."""
        if self.new is None:
            return random.sample(self.kinds, count)
        first = random.choice(self.only_new.kinds)
        return [first, *random.sample([kind for kind in self.kinds if kind != first], count - 1)]


def with_new(name: str) -> Vocabulary:
    """What nano-Lance knows, and one colour or shape that it does not; raises LanceError for any other name."""
    if name in NEW_COLOURS:
        return Vocabulary((*KNOWN_COLOURS, name), KNOWN_SHAPES, name)
    if name in NEW_SHAPES:
        return Vocabulary(KNOWN_COLOURS, (*KNOWN_SHAPES, name), name)
    raise LanceError(f"{name!r} is nothing new to the small world: choose {' or '.join(NEW_COLOURS + NEW_SHAPES)}.")


def held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the test set: it shows a combination that no training scene shows.

    A combination is a pair of kinds, wherever they stand and whatever else is there ("red circle, blue star"); of a
    scene with one thing it is the kind and its place. About a tenth of either is held out, by a checksum of the names.
    """
    if len(scene.things) == 1:
        (thing,) = scene.things
        return _chosen((*thing.kind, *map(str, thing.place)))
    pairs = combinations(sorted(thing.kind for thing in scene.things), 2)
    return any(_chosen((*a, *b)) for a, b in pairs)


def _chosen(names: Sequence[str]) -> bool:
    return zlib.crc32(" ".join(names).encode()) % 1000 < HELD_OUT_SHARE * 1000


def random_scene(
    random: Random,
    split: Split | None = "train",
    vocabulary: Vocabulary = Vocabulary(),
    counts: Sequence[float] = COUNTS,
) -> Scene:
    """One to three things, of the split asked for or of either (None). counts: how often one, two, three are tried."""
    while True:
        count = random.choices((1, 2, 3), counts)[0]
        kinds, places = vocabulary.sample(random, count), random.sample(PLACES, count)
        things = [Thing(place, *kind, size=random.choice(tuple(SIZES))) for place, kind in zip(places, kinds)]
        scene = Scene(random.choice(tuple(BACKGROUNDS)), tuple(things))
        if split is None or held_out(scene) == (split == "test"):
            return scene


def random_clip(random: Random, split: Split | None = "train", vocabulary: Vocabulary = Vocabulary()) -> Clip:
    """One thing that moves, of the new kind if there is one, and half of the time one that rests.

    Of the split "test", what it shows first is held out; of "train", nothing is that it shows on its way.
    """
    while True:
        kinds = vocabulary.sample(random, random.choice((1, 2)))
        mover = Thing(random.choice(PLACES), *kinds[0], size=random.choice(tuple(SIZES)))
        ways = [(direction, cells) for direction in DIRECTIONS for cells in (1, 2) if _inside(mover, direction, cells)]
        background = random.choice(tuple(BACKGROUNDS))
        clip = Clip(Scene(background, (mover,)), mover, *random.choice(ways))
        if len(kinds) > 1:
            place = random.choice([place for place in PLACES if place not in clip.path])
            other = Thing(place, *kinds[1], size=random.choice(tuple(SIZES)))
            clip = replace(clip, scene=Scene(background, (mover, other)))
        first, *others = map(held_out, clip.scenes)
        if split is None or (first if split == "test" else not any((first, *others))):
            return clip


def _inside(mover: Thing, direction: str, cells: int) -> bool:
    return Clip(Scene("white", (mover,)), mover, direction, cells).end in PLACES


def scenes(seed: int, split: Split | None = "train", vocabulary: Vocabulary = Vocabulary()) -> Iterator[Scene]:
    """Endless, the same for the same seed."""
    random = Random(seed)
    while True:
        yield random_scene(random, split, vocabulary)
