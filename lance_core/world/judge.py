"""Reads from its pixels what a picture or clip of the small world shows: no network, only the drawings themselves.

A pixel is a blend of the background and one colour of the palette; what covers it is compared with every shape drawn in
every size. Exact drawings are read without a mistake, and so are blurred or noisy ones (`tests/test_judge.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from .render import FINER, Point, centre, outline
from .scene import BACKGROUNDS, CENTRES, COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES, Place, Scene, Thing

# Distances of colours are Euclidean in RGB of 0..1; black and white are 1.7 apart, red and orange 0.37.
BACKGROUND_TOLERANCE = 0.2
BACKGROUND_SHARE = 0.5  # of the pixels; the largest three things leave three quarters
COLOUR_TOLERANCE = 0.25  # from the nearest blend of the background and a colour
COVERED = 0.5  # share of a pixel from which it counts as covered
FAINT = 0.25  # … with its neighbours, from which it is stray away from all things: a ghost of what should be gone

# Lengths are shares of the picture's side.
REACH = 0.17  # from a thing's middle to its farthest point
INNER = 0.125  # from a thing's middle, where nothing else is
SLACK = 0.07  # of the middle of what is seen around a thing's centre, which is not the middle of a triangle
OFF_CENTRE = 0.07  # of a thing from its place; the next place is 0.32 away
LEAST_AREA = 0.005  # of the picture; the smallest thing covers 0.018
STRAY_AREA = 0.004
LEAST_FIT = 0.75
SCALES = (0.92, 1.0, 1.08)  # of a size, for what is painted a little too small or too large
PHASES = (0.0, 0.5)  # of a pixel
MARGIN = 2  # pixels around a change, where the VAE's blur reaches

RGB = torch.tensor(list(COLOURS.values())) / 255
GROUNDS = torch.tensor(list(BACKGROUNDS.values())) / 255


@dataclass(frozen=True)
class Found:
    """A thing read from pixels. centre: x and y as shares of the side; fit: how well its shape covers it, 0..1."""

    thing: Thing
    centre: Point
    fit: float

    @property
    def off(self) -> float:
        """From the middle of its place, as a share of the side."""
        return math.dist(self.centre, centre(self.thing))


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    stray: blobs that are no thing in a place - of no shape, between places, of odd colour. spots: the middles of all
    blobs, whatever they look like.
    """

    background: str | None
    found: tuple[Found, ...]
    stray: int
    spots: tuple[Point, ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(sorted(found.thing for found in self.found))

    @property
    def scene(self) -> Scene | None:
        """The scene, where the picture shows one and nothing else."""
        in_places = all(found.off <= OFF_CENTRE for found in self.found)
        one_each = len({thing.place for thing in self.things}) == len(self.things)
        if self.background is None or self.stray or not in_places or not one_each:
            return None
        return Scene(self.background, self.things)


@dataclass(frozen=True)
class ClipReading:
    """The first and last frame, and the way of the one blob that moved; None where there is not exactly one."""

    first: Reading
    last: Reading
    start: Point | None
    direction: str | None
    cells: int | None


def read_picture(picture: Tensor) -> Reading:
    """picture: `[side, side, 3]`, 0..1."""
    picture = picture.float().cpu()
    side = len(picture)
    distances = (picture[:, :, None] - GROUNDS).norm(dim=-1)
    shares = (distances < BACKGROUND_TOLERANCE).float().mean((0, 1))
    best = int(shares.argmax())
    if shares[best] < BACKGROUND_SHARE:
        return Reading(None, (), 0, ())
    cover, odd = covers(picture, GROUNDS[best])
    found = tuple(one for name, plane in zip(COLOURS, cover) for one in things_of(name, plane))
    spots = tuple(((x + 0.5) / side, (y + 0.5) / side) for y, x in middles(((cover.sum(0) > COVERED) | odd).float()))
    around = F.avg_pool2d(cover.sum(0)[None], 3, stride=1, padding=1)[0]  # noise is not a ghost
    besides = (around > FAINT) | odd
    for one in found:
        rows, columns = (window(share, side, REACH) for share in one.centre[::-1])
        besides[rows, columns] = False
    poor = sum(one.fit < LEAST_FIT for one in found)
    stray = poor + int(besides.sum() > STRAY_AREA * side**2)
    return Reading(tuple(BACKGROUNDS)[best], tuple(one for one in found if one.fit >= LEAST_FIT), stray, spots)


def read_scene(picture: Tensor) -> Scene | None:
    """The scene that a picture `[side, side, 3]` of 0..1 shows; None where it shows none, or anything else besides."""
    return read_picture(picture).scene


def read_clip(frames: Tensor) -> ClipReading:
    """frames: `[F, side, side, 3]`, 0..1."""
    first, last = read_picture(frames[0]), read_picture(frames[-1])
    way = moved(first, last)
    return ClipReading(first, last, *(way or (None, None, None)))


def moved(first: Reading, last: Reading) -> tuple[Point, str, int] | None:
    """Start, direction and places of the one blob that is elsewhere in the last reading, whatever becomes of its looks.

    None where several moved, one came or went, or the way is none of the four directions.
    """
    spacing = CENTRES[1] - CENTRES[0]

    def without(spots: Sequence[Point], others: Sequence[Point]) -> list[Point]:
        return [spot for spot in spots if all(math.dist(spot, other) > spacing / 2 for other in others)]

    left, reached = without(first.spots, last.spots), without(last.spots, first.spots)
    if len(left) != 1 or len(reached) != 1:
        return None
    columns, rows = (round((b - a) / spacing) for a, b in zip(left[0], reached[0]))
    cells = max(abs(rows), abs(columns))
    ways = {way: name for name, way in DIRECTIONS.items()}
    way = ways.get((rows / cells, columns / cells)) if cells else None
    return way and (left[0], way, cells)


def covers(picture: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """How much of every pixel each colour covers, `[colours, side, side]`, and where no colour explains it (bool)."""
    way = RGB - ground
    off = (picture - ground)[:, :, None]
    shares = ((off * way).sum(-1) / way.square().sum(-1)).clamp(0, 1)
    distances = (off - shares[..., None] * way).norm(dim=-1)
    least, nearest = distances.min(-1)
    own = F.one_hot(nearest, len(RGB)) * shares
    odd = least > COLOUR_TOLERANCE
    return (own * ~odd[..., None]).permute(2, 0, 1), odd


def things_of(colour: str, cover: Tensor) -> list[Found]:
    """The things of one colour, whose cover is `[side, side]`, in reading order."""
    solid = cover * (cover > COVERED)
    found = [best_shape(colour, cover, middle) for middle in middles(solid)]
    return sorted(found, key=lambda one: one.thing)


def middles(solid: Tensor) -> list[tuple[int, int]]:
    """The pixels, row and column, around which what covers `[side, side]` lies, in reading order."""
    near = {middle for place in PLACES if (middle := settled(solid, place)) is not None}
    return sorted(m for m in near if not any(math.dist(m, n) < REACH * len(solid) and n < m for n in near))


def settled(solid: Tensor, place: Place) -> tuple[int, int] | None:
    """The pixel, row and column, around which what is seen near a place lies; None where nothing is near."""
    side = len(solid)
    middle = tuple(round(CENTRES[i] * side - 0.5) for i in place)
    for _ in range(8):
        rows, columns = (window((i + 0.5) / side, side, INNER) for i in middle)
        part = solid[rows, columns]
        mass = float(part.sum())
        if mass < LEAST_AREA * side**2:
            return None
        down = float((part.sum(1) * torch.arange(rows.start, rows.stop)).sum()) / mass
        right = float((part.sum(0) * torch.arange(columns.start, columns.stop)).sum()) / mass
        before, middle = middle, (round(down), round(right))
        if middle == before:
            break
    return middle


def window(share: float, side: int, reach: float) -> slice:
    """The pixels of a row or column that are no farther from there; both are shares of the side."""
    middle, reach = share * side, reach * side
    return slice(max(0, round(middle - reach)), min(side, round(middle + reach)))


def best_shape(colour: str, cover: Tensor, middle: tuple[int, int]) -> Found:
    """The shape, size and centre whose drawing covers most like this, near a pixel."""
    side = len(cover)
    known = templates(side)
    slack = round(SLACK * side)
    reach = known.drawn.shape[-1] // 2 + slack
    rows, columns = (slice(i, i + 2 * reach + 1) for i in middle)
    near = F.pad(cover, (reach,) * 4)[None, rows, columns]
    common = F.conv2d(near, known.drawn[:, None])
    seen = F.conv2d(near.square(), known.around[:, None])
    fits = common / (known.drawn.square().sum((1, 2))[:, None, None] + seen - common)
    template, down, right = (int(i) for i in np.unravel_index(int(fits.argmax()), fits.shape))
    shape, size, (phase_x, phase_y) = known.names[template]
    x = (middle[1] + right - slack + 0.5 + phase_x) / side
    y = (middle[0] + down - slack + 0.5 + phase_y) / side
    return Found(Thing(nearest_place(x, y), colour, shape, size), (x, y), float(fits.max()))


@dataclass(frozen=True, eq=False)
class Templates:
    """Every shape in every size, drawn around the middle of n x n pixels.

    names: shape, size, and the offset from the middle in pixels. drawn: covers `[K, n, n]`. around: the pixels that
    tell them from others, 1 or 0, in the same shape: what lies farther off may be something else.
    """

    names: tuple[tuple[str, str, Point], ...]
    drawn: Tensor
    around: Tensor


@cache
def templates(side: int) -> Templates:
    """For pictures of so many pixels a side."""
    reach = math.ceil(1.1 * max(SIZES.values()) * max(SCALES) * side) + MARGIN
    names = tuple(product(SHAPES, SIZES, SCALES, product(PHASES, PHASES)))
    drawn = torch.stack([_cover(shape, SIZES[size] * scale * side, reach, at) for shape, size, scale, at in names])
    around = spread((drawn > 0).float())
    return Templates(tuple((shape, size, at) for shape, size, _, at in names), drawn, around)


def _cover(shape: str, radius: float, reach: int, offset: Point) -> Tensor:
    image = Image.new("L", ((2 * reach + 1) * FINER,) * 2)
    middle = [reach + 0.5 + share for share in offset]
    points = [tuple((m + radius * a) * FINER for m, a in zip(middle, point)) for point in outline(shape)]
    ImageDraw.Draw(image).polygon(points, fill=255)
    small = image.resize((2 * reach + 1,) * 2, Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float() / 255


def spread(marked: Tensor) -> Tensor:
    """What is marked with 1 in planes `[..., n, m]`, and all within MARGIN pixels of it."""
    return F.max_pool2d(marked, 2 * MARGIN + 1, stride=1, padding=MARGIN)


def nearest_place(x: float, y: float) -> Place:
    row, column = (min(range(3), key=lambda i: abs(CENTRES[i] - share)) for share in (y, x))
    return row, column


def psnr(own: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Decibels between pixels of 0..1, `[..., H, W, 3]`; infinite where both are the same.

    mask: `[..., H, W]`, the pixels that count; without any of them there is nothing to tell, and it is NaN.
    """
    squared = (own.clamp(0, 1) - reference.clamp(0, 1)).square().mean(-1)
    squared = squared if mask is None else squared[mask]
    if not squared.numel():
        return math.nan
    error = float(squared.mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def unchanged(before: Tensor, after: Tensor) -> Tensor:
    """The pixels that a true edit leaves as they are, `[..., H, W]` bool.

    before, after: both drawings, `[..., H, W, 3]`. What lies within two pixels of a change does not count.
    """
    return spread((before != after).any(-1).float()) == 0


def without_sizes(things: Sequence[Thing]) -> tuple[Thing, ...]:
    """Things to compare by place, colour and shape alone."""
    return tuple(sorted(replace(thing, size="") for thing in things))
