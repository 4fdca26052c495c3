"""The judge of the small world reads drawings without a mistake, and what is counted with it is what happened."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from lance_core.config import LanceConfig, Resolution, Resolutions
from lance_core.errors import LanceError
from lance_core.tiny import TINY_TEXT, TINY_VISION, random_lance
from lance_core.world import accuracy
from lance_core.world.accuracy import Cases
from lance_core.world.judge import (
    moved,
    psnr,
    read_clip,
    read_picture,
    read_scene,
    unchanged,
)
from lance_core.world.render import SIDE, draw, draw_clip
from lance_core.world.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    SIZES,
    Clip,
    Scene,
    Thing,
)
from lance_core.world.shares import Mean, Share, gather

COUNT = 12  # cases of each measurement: every operation and topic


@st.composite
def scenes(draw_from, most: int = 3) -> Scene:
    things = st.builds(Thing, *map(st.sampled_from, (PLACES, tuple(COLOURS), SHAPES, tuple(SIZES))))
    apart = (lambda thing: thing.place, lambda thing: thing.kind)
    drawn = draw_from(st.lists(things, min_size=1, max_size=most, unique_by=apart))
    return Scene(draw_from(st.sampled_from(tuple(BACKGROUNDS))), tuple(drawn))


@st.composite
def clips(draw_from) -> Clip:
    scene = draw_from(scenes(most=2))
    mover = draw_from(st.sampled_from(scene.things))
    ways = [Clip(scene, mover, direction, cells) for direction in DIRECTIONS for cells in (1, 2)]
    resting = {thing.place for thing in scene.without(mover).things}
    free = [way for way in ways if way.end in PLACES and not resting & set(way.path)]
    return draw_from(st.sampled_from(free))


def blurred(frames: Tensor, sigma: float) -> Tensor:
    """Frames `[F, H, W, 3]` under a Gaussian of so many pixels."""
    offsets = torch.arange(-4.0, 5.0)
    line = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    planes = F.pad(frames.permute(0, 3, 1, 2), (4, 4, 4, 4), mode="replicate").flatten(0, 1)[:, None]
    soft = F.conv2d(planes, torch.outer(line, line)[None, None])
    return soft.unflatten(0, (len(frames), 3))[:, :, 0].permute(0, 2, 3, 1)


def noisy(frames: Tensor, decibels: float) -> Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return (frames + noise * 10 ** (-decibels / 20)).clamp(0, 1)


def plain_picture(background: str = "white") -> Tensor:
    return (torch.tensor(BACKGROUNDS[background]) / 255).expand(SIDE, SIDE, 3).clone()


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_a_drawing_is_read_as_what_was_drawn(scene):
    assert read_scene(draw(scene)[0]) == scene


@settings(max_examples=60, deadline=None)
@given(scenes(), st.sampled_from([partial(noisy, decibels=28), partial(blurred, sigma=0.7)]))
def test_noise_and_blur_do_not_mislead(scene, spoil):
    assert read_scene(spoil(draw(scene))[0]) == scene


@settings(max_examples=10, deadline=None)
@given(scenes(), st.sampled_from((48, 96)))
def test_other_sizes_are_read_too(scene, side):
    assert read_scene(draw(scene, side)[0]) == scene


def test_a_thing_between_two_places_is_found_but_is_no_scene():
    thing = Thing((1, 0), "red", "circle")
    picture = draw(Scene("white", (thing,)))[0].roll(10, dims=1)
    (found,) = read_picture(picture).found
    assert (found.thing.colour, found.thing.shape) == ("red", "circle")
    assert found.centre == pytest.approx((0.18 + 10 / SIDE, 0.5), abs=0.01) and read_scene(picture) is None


@pytest.mark.parametrize("colour", [(0, 230, 230), (222, 40, 46)])
def test_what_has_no_shape_or_no_known_colour_is_stray(colour):
    picture = draw(Scene("white", (Thing((0, 0), "blue", "star"),)))[0]
    picture[30:34, 22:62] = torch.tensor(colour) / 255
    reading = read_picture(picture)
    assert reading.stray and reading.scene is None and [one.shape for one in reading.things] == ["star"]


def test_pictures_of_nothing_known_are_no_scene():
    assert read_scene(plain_picture("gray")) == Scene("gray", ())
    assert read_picture(torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))).background is None
    assert read_scene(torch.full((SIDE, SIDE, 3), 0.3)) is None


@settings(max_examples=40, deadline=None)
@given(clips(), st.sampled_from([lambda frames: frames, partial(blurred, sigma=0.7)]))
def test_a_clip_is_read_with_the_way_of_its_mover(clip, spoil):
    own = read_clip(spoil(draw_clip(clip, 5)))
    assert (own.direction, own.cells) == (clip.direction, clip.cells)
    assert own.first.scene == clip.scene and own.last.scene == clip.scene.changed(clip.mover, place=clip.end)


def test_without_exactly_one_mover_there_is_no_way():
    a, b = Thing((0, 0), "red", "circle"), Thing((2, 2), "blue", "star")
    before = read_picture(draw(Scene("black", (a, b)))[0])
    both = read_picture(draw(Scene("black", (Thing((0, 1), "red", "circle"), Thing((2, 1), "blue", "star"))))[0])
    other = read_picture(draw(Scene("black", (Thing((0, 0), "red", "square"), b)))[0])
    gone = read_picture(draw(Scene("black", (b,)))[0])
    slanting = read_picture(draw(Scene("black", (Thing((1, 1), "red", "circle"), b)))[0])
    assert not any(moved(before, after) for after in (before, both, other, gone, slanting))


def test_a_way_is_seen_whatever_becomes_of_what_moves():
    star, square = Thing((0, 0), "yellow", "star", "small"), Thing((2, 2), "blue", "square")
    clip = Clip(Scene("white", (star, square)), star, "right", 2)
    frames = draw_clip(clip)
    frames[-1] = draw(Scene("white", (Thing((0, 2), "orange", "circle"), replace(square, shape="triangle"))))[0]
    own = read_clip(frames)
    assert (own.direction, own.cells) == ("right", 2) and own.start == pytest.approx((0.18, 0.18), abs=0.02)
    assert accuracy.goes(own, clip) and not accuracy.film_shows(own, clip)


def test_the_wrong_thing_s_way_is_wrong():
    circle, square = Thing((0, 0), "red", "circle"), Thing((2, 0), "blue", "square")
    scene = Scene("white", (circle, square))
    own = read_clip(draw_clip(Clip(scene, square, "right", 1)))
    assert not accuracy.goes(own, Clip(scene, circle, "right", 1))
    assert accuracy.goes(own, Clip(scene, square, "right", 2)) and own.direction == "right"


def test_psnr_is_that_of_the_pixels_asked_for():
    a, b = torch.zeros(4, 4, 3), torch.zeros(4, 4, 3)
    b[0] = 0.1
    mask = torch.zeros(4, 4, dtype=torch.bool)
    assert psnr(a, b) == pytest.approx(20 + 10 * math.log10(4)) and math.isnan(psnr(a, b, mask))
    mask[1:] = True
    assert psnr(a, b, mask) == math.inf and psnr(a, b, ~mask) == pytest.approx(20)


def test_a_true_edit_leaves_all_that_counts_as_unchanged():
    scene = Scene("white", (Thing((0, 0), "red", "circle"), Thing((2, 2), "blue", "star")))
    before, recoloured = draw(scene), draw(scene.changed(scene.things[0], colour="green"))
    mask = unchanged(before, recoloured)
    assert mask.shape == (1, SIDE, SIDE) and psnr(recoloured, before, mask) == math.inf
    assert not mask[0, 2:16, 8].any() and mask[0, 20:].all() and mask[0, :, 20:].all()
    inside = unchanged(before, draw(Scene("black", scene.things)))
    assert inside[0, 8, 8] and inside[0, 39, 39] and inside.float().mean() < 0.1


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(0, 10, (0.0, 0.2775)), (50, 100, (0.4038, 0.5962)), (10, 10, (0.7225, 1.0)), (0, 0, (0.0, 1.0))],
)
def test_intervals_are_wilson_s(right, count, interval):
    assert Share(right, count).interval == pytest.approx(interval, abs=1e-4)


def test_shares_are_of_the_cases_that_say_something():
    found = gather([{"English": True, "a": True, "x": 30.0}, {"a": False, "x": 40.0}, {"x": math.inf}])
    assert found == {"a": Share(1, 2), "x": Mean(35.0, 30.0, 2), "English": Share(1, 1)}
    assert list(found)[-1] == "English"


def test_perfect_work_is_right_in_everything():
    """The drawings as if they had been painted, and the true answers."""
    cases, few = Cases(COUNT, seed=3), Cases(4, seed=3)
    everything = {
        "paintings": accuracy.paintings(lambda _, n: draw(accuracy.caption_case(cases, n)[0]), cases),
        "answers": accuracy.answers(lambda *case: accuracy.question_case(cases, case[-1])[1].answer, cases),
        "changes": accuracy.changes(lambda *case: draw(accuracy.edit_case(cases, case[-1])[0].after), cases),
        "clip changes": accuracy.clip_changes(
            lambda *case: draw_clip(accuracy.clip_edit_case(few, case[-1])[0].after), few
        ),
        "films": accuracy.films(lambda *case: draw_clip(accuracy.clip_case(cases, case[-1])[0]), cases),
        "copies": accuracy.copies(lambda frames: frames, cases),
    }
    for name, found in everything.items():
        shares = {row: share.value for row, share in found.items() if isinstance(share, Share)}
        assert set(shares.values()) == {1.0}, (name, shares)


def test_an_edit_that_changes_nothing_or_everything_else_is_wrong():
    cases = Cases(COUNT)

    def untouched(before: Tensor, *_) -> Tensor:
        return before

    def dimmed(before: Tensor, _: str, number: int) -> Tensor:
        return 0.9 * draw(accuracy.edit_case(cases, number)[0].after)

    same, dim = accuracy.changes(untouched, cases), accuracy.changes(dimmed, cases)
    assert same["right"].right == 0 and same["PSNR outside, dB"].count == 0  # infinite everywhere
    assert dim["right"].value == 1 and dim["PSNR outside, dB"].least < 30
    assert dim["right, and the rest unchanged"].value < 0.7


@pytest.mark.parametrize("ghost", [0.3, 0.45])
def test_what_has_gone_by_half_is_still_there(ghost):
    cases = Cases(6 * COUNT)

    def half_done(before: Tensor, _: str, number: int) -> Tensor:
        return (1 - ghost) * draw(accuracy.edit_case(cases, number)[0].after) + ghost * before

    found = accuracy.changes(half_done, cases)
    assert (found["remove"].right, found["move"].right) == (0, 0)


def test_an_edit_that_changes_the_size_is_wrong():
    cases = Cases(6 * COUNT)

    def shrunk(before: Tensor, _: str, number: int) -> Tensor:
        edit, _ = accuracy.edit_case(cases, number)
        return draw(replace(edit.after, things=tuple(replace(thing, size="small") for thing in edit.after.things)))

    right = sum(all(thing.size == "small" for thing in accuracy.edit_case(cases, n)[0].after.things) for n in range(72))
    assert accuracy.changes(shrunk, cases)["right"].right == right < 36


def test_a_model_that_has_learnt_nothing_is_hardly_ever_right():
    small = Resolution(64, 56)
    lance = random_lance(LanceConfig(TINY_TEXT, TINY_VISION, Resolutions(small, small)))
    seen = []
    one, two = (Cases(count, progress=lambda *done: seen.append(done)) for count in (1, 2))
    quick = {"steps": 2}
    results = {
        "shape, colour and position": accuracy.generation(lance, two, **quick),
        "answers": accuracy.questions(lance, Cases(5)),
        "right, and the rest unchanged": accuracy.edits(lance, two, **quick) | accuracy.clip_edits(lance, one, **quick),
        "direction": accuracy.clips(lance, one, **quick) | accuracy.clips_from_pictures(lance, one, **quick),
        "pictures read as drawn": accuracy.reconstruction(lance, Cases(4)),
    }
    assert {name: found[name].right for name, found in results.items()} == dict.fromkeys(results, 0)
    assert seen[:2] == [(1, 2), (2, 2)] and results["pictures read as drawn"]["clips, dB"].value < 32


def test_the_same_seed_finds_the_same_and_more_cases_begin_with_the_fewer():
    one, more, other = Cases(COUNT, 1), Cases(2 * COUNT, 1), Cases(COUNT, 2)
    cases = [accuracy.edit_case(one, number) for number in range(COUNT)]
    assert cases == [accuracy.edit_case(more, number) for number in range(COUNT)]
    assert cases != [accuracy.edit_case(other, number) for number in range(COUNT)]
    assert {edit.operation for edit, _ in cases} == {"recolour", "move", "remove", "add", "replace", "background"}
    assert {language for _, language in cases} == {"en", "zh"}


def test_no_cases_are_refused():
    with pytest.raises(LanceError, match="count is 0"):
        Cases(0)
