"""The small world: what its seeds promise, that pictures show it, and that its words, edits and answers are true."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lance_core.world import edits, questions, words
from lance_core.world.examples import join_scenes
from lance_core.world.render import SIDE, draw, draw_clip
from lance_core.world.scene import (
    BACKGROUNDS,
    CENTRES,
    COLOURS,
    DIRECTIONS,
    NEW_COLOURS,
    NEW_SHAPES,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    Vocabulary,
    held_out,
    random_clip,
    random_scene,
    scenes,
)

EVERYTHING = Vocabulary(tuple(COLOURS), SHAPES)
REACH = 1.1 * max(SIZES.values()) * SIDE + 2  # pixels from the middle of the largest shape to its outermost one
seeds = st.integers(0, 2**32)
splits = st.sampled_from(["train", "test"])
languages = st.sampled_from(["en", "zh"])
few = settings(max_examples=40, deadline=None)
many = settings(max_examples=150, deadline=None)


def pixel(place) -> tuple[int, int]:
    """The row and column of the middle of a place."""
    return round(CENTRES[place[0]] * SIDE), round(CENTRES[place[1]] * SIDE)


def shows(frame, place, rgb) -> bool:
    row, column = pixel(place)
    return torch.equal((frame[row, column] * 255).round().int(), torch.tensor(rgb, dtype=torch.int32))


def around(places) -> torch.Tensor:
    """`[side, side]`: whether a pixel can belong to a thing in one of the places."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    near = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for y, x in (pixel(place) for place in places):
        near |= ((rows - y).abs() <= REACH) & ((columns - x).abs() <= REACH)
    return near


# Scenes


@many
@given(seeds, splits)
def test_a_seed_gives_the_same_things_again(seed, split):
    def told(random: Random):
        scene, clip = random_scene(random, split), random_clip(random, split)
        edit, question = edits.random_edit(scene, random, split=split), questions.random_question(scene, random)
        return scene, clip, edit, question, words.caption(scene, random), words.clip_caption(clip, random)

    assert told(Random(seed)) == told(Random(seed))


@many
@given(seeds, splits)
def test_scenes_and_clips_keep_to_their_split_and_their_rules(seed, split):
    random = Random(seed)
    clip = random_clip(random, split)
    for scene in (random_scene(random, split), clip.scene):
        assert held_out(scene) == (split == "test")
        assert 1 <= len(scene.things) <= 3
        assert len({thing.kind for thing in scene.things}) == len({thing.place for thing in scene.things})
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        assert list(scene.things) == sorted(scene.things)
        assert not {thing.colour for thing in scene.things} & set(NEW_COLOURS)
        assert not {thing.shape for thing in scene.things} & set(NEW_SHAPES)
    assert split == "test" or not any(map(held_out, clip.scenes))
    assert clip.end in PLACES and clip.end == clip.path[-1] and clip.path[0] == clip.mover.place
    assert not {thing.place for thing in clip.scene.without(clip.mover).things} & set(clip.path)


@few
@given(seeds)
def test_what_is_held_out_hangs_on_the_combination_alone(seed):
    random = Random(seed)
    scene = random_scene(random, None)
    assert all(held_out(replace(scene, background=name)) == held_out(scene) for name in BACKGROUNDS)
    places = random.sample(PLACES, len(scene.things))
    if len(scene.things) > 1:
        moved = [replace(thing, place=place, size="small") for thing, place in zip(scene.things, places)]
        assert held_out(scene.with_things(moved)) == held_out(scene)


def test_a_small_share_of_the_combinations_is_held_out():
    kinds = Vocabulary().kinds
    alone = [Scene("white", (Thing(place, *kind),)) for kind in kinds for place in PLACES]
    pairs = [
        Scene("white", (Thing((0, 0), *a), Thing((0, 1), *b))) for i, a in enumerate(kinds) for b in kinds[i + 1 :]
    ]
    drawn = list(islice(scenes(0, None), 1000))
    for group in (alone, pairs, drawn):
        assert 0.05 <= sum(map(held_out, group)) / len(group) <= 0.3


# Pictures and clips


@few
@given(seeds)
def test_a_picture_shows_each_thing_in_its_place_and_the_background_elsewhere(seed):
    scene = random_scene(Random(seed), None, EVERYTHING)
    (picture,) = draw(scene)
    assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == torch.float32
    assert all(shows(picture, thing.place, COLOURS[thing.colour]) for thing in scene.things)
    assert all(shows(picture, place, BACKGROUNDS[scene.background]) for place in scene.free_places)
    background = torch.tensor(BACKGROUNDS[scene.background]) / 255
    outside = picture[~around(thing.place for thing in scene.things)]
    assert torch.equal(outside, background.expand_as(outside))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_big_shape_covers_more_than_a_small_one_and_looks_like_no_other(shape):
    def covered(size: str, shape: str) -> torch.Tensor:
        scene = Scene("white", (Thing((1, 1), "red", shape, size),))
        return (draw(scene) != draw(replace(scene, things=()))).any(dim=-1)

    assert covered("big", shape).sum() > 1.3 * covered("small", shape).sum()
    others = [covered("big", other) for other in SHAPES if other != shape]
    assert all((covered("big", shape) != other).sum() > 20 for other in others)


@few
@given(seeds, st.sampled_from([9, 13, 17]))
def test_a_clip_begins_and_ends_where_it_says_while_all_else_rests(seed, frames):
    clip = random_clip(Random(seed), None)
    drawn = draw_clip(clip, frames)
    arrived = clip.scene.changed(clip.mover, place=clip.end)
    assert drawn.shape == (frames, SIDE, SIDE, 3)
    # Big neighbours can overlap in a pixel at their tips, and the mover is painted over what rests.
    for frame, scene in ((drawn[0], clip.scene), (drawn[-1], arrived)):
        assert (frame != draw(scene)[0]).any(dim=-1).sum() <= 2
    still = ~around(clip.path)
    assert torch.equal(drawn[:, still], drawn[:1, still].expand_as(drawn[:, still]))
    assert all(not torch.equal(a, b) for a, b in zip(drawn, drawn[1:]))


# Words


def test_every_name_of_a_language_means_one_thing():
    shown = (
        (words.COLOUR_NAMES, COLOURS),
        (words.SHAPE_NAMES, SHAPES),
        (words.SIZE_NAMES, SIZES),
        (words.BACKGROUND_NAMES, BACKGROUNDS),
        (words.DIRECTION_NAMES, DIRECTIONS),
        (words.PLACE_NAMES, PLACES),
    )
    for names, things in shown:
        for table in names.values():
            assert set(table) == set(things) and len(set(table.values())) == len(table)


@many
@given(seeds, languages)
def test_a_caption_names_every_thing_exactly_once(seed, language):
    random = Random(seed)
    scene = random_scene(random, None, EVERYTHING)
    written = words.caption(scene, random, language)
    text = written.lower()
    assert written[0] == text[0].upper() and written[-1] in ".。"
    sized = any(name in text for name in words.SIZE_NAMES[language].values())
    colours, shapes = words.COLOUR_NAMES[language], words.SHAPE_NAMES[language]
    for thing in scene.things:
        named = words.one(thing, language, sized)
        parts = {
            "en": f"{named} {words.at(thing.place, language)}",
            "zh": f"{words.at(thing.place, language)}有{named}",
        }
        assert text.count(parts[language]) >= 1
    joint = {"en": " ", "zh": ""}[language]
    named = [kind for kind in EVERYTHING.kinds if colours[kind[0]] + joint + shapes[kind[1]] in text]
    assert set(named) == {thing.kind for thing in scene.things}
    assert sum(text.count(name) for name in shapes.values()) == len(scene.things)
    background = words.BACKGROUND_NAMES[language][scene.background]
    assert {"en": f"{background} background", "zh": background}[language] in text


@many
@given(seeds, languages)
def test_a_clip_s_caption_names_its_things_its_way_and_its_start(seed, language):
    random = Random(seed)
    clip = random_clip(random, None)
    text = words.clip_caption(clip, random, language).lower()
    assert all(words.one(thing, language) in text for thing in clip.scene.things)
    assert text.count(words.BACKGROUND_NAMES[language][clip.scene.background]) == 1
    direction, start = words.DIRECTION_NAMES[language][clip.direction], clip.mover.place
    assert {"en": f" moves {direction}", "zh": f"向{direction}移动"}[language] in text
    begins = {"en": (f"starting {words.at(start, 'en')}", f"from {words.SPOTS['en'][start]}")}
    assert any(part in text for part in begins.get(language, (f"从{words.PLACE_NAMES['zh'][start]}",)))


@many
@given(seeds)
def test_a_reference_fits_one_thing_only(seed):
    random = Random(seed)
    scene = random_scene(random, None)
    for thing in scene.things:
        said = words.refer(scene, thing, random).split()
        fits = [t for t in scene.things if all(word in ("the", "shape", t.colour, t.shape) for word in said)]
        assert fits == [thing]


# Edits


@many
@given(seeds, splits, languages)
def test_an_edit_does_what_it_says_and_nothing_else(seed, split, language):
    random = Random(seed)
    before = random_scene(random, split)
    edit = edits.random_edit(before, random, language, split=split)
    after = edit.after
    gone, come = set(before.things) - set(after.things), set(after.things) - set(before.things)
    assert edit.before == before and after != before and 1 <= len(after.things) <= 3
    assert len({thing.kind for thing in after.things}) == len({t.place for t in after.things}) == len(after.things)
    assert split == "test" or not held_out(after)
    assert (after.background == before.background) == (edit.operation != "background")
    counts = {"remove": (1, 0), "add": (0, 1), "background": (0, 0)}
    assert (len(gone), len(come)) == counts.get(edit.operation, (1, 1))
    alone = {"recolour": "colour", "move": "place", "replace": "shape"}.get(edit.operation)
    for old, new in zip(gone, come):
        assert [name for name in vars(old) if getattr(old, name) != getattr(new, name)] == [alone]
    said = {
        "recolour": [words.COLOUR_NAMES[language][thing.colour] for thing in come],
        "move": [words.SPOTS[language][thing.place] for thing in come],
        "remove": [],
        "add": [said for thing in come for said in (words.one(thing, language), words.at(thing.place, language))],
        "replace": [words.SHAPE_NAMES[language][thing.shape] for thing in come],
        "background": [words.BACKGROUND_NAMES[language][after.background]],
    }
    assert all(part in edit.instruction for part in said[edit.operation])


@few
@given(seeds)
def test_an_edit_leaves_the_pixels_outside_its_places_alone(seed):
    random = Random(seed)
    edit = edits.random_edit(random_scene(random), random)
    same = (draw(edit.before) == draw(edit.after))[0].all(dim=-1)
    if edit.operation == "background":
        taken = [thing.place for thing in edit.before.things]
        assert edit.places == () and all(same[pixel(place)] == (place in taken) for place in PLACES)
    else:
        assert same[~around(edit.places)].all() and not same.all()


@pytest.mark.parametrize("operation", edits.OPERATIONS)
def test_each_operation_can_be_asked_for(operation):
    random = Random(operation)
    pair = next(scene for scene in scenes(1) if len(scene.things) == 2)
    assert edits.random_edit(pair, random, operation=operation, split=None).operation == operation


@many
@given(seeds)
def test_two_pictures_join_in_one_of_the_training_split(seed):
    first, second, text, joined = join_scenes(Random(seed))
    (added,) = set(joined.things) - set(second.things)
    (thing,) = first.things
    assert added == replace(thing, place=added.place) and joined == second.with_things((*second.things, added))
    assert added.place in second.free_places and thing.kind not in {other.kind for other in second.things}
    assert thing.shape in text and f" {words.AT[added.place]} of the second" in text
    assert not any(map(held_out, (first, second, joined)))


def test_an_impossible_edit_is_refused():
    alone = Scene("white", (Thing((0, 0), "red", "circle"),))
    full = next(scene for scene in scenes(1) if len(scene.things) == 3)
    for scene, operation in ((alone, "remove"), (full, "add")):
        with pytest.raises(ValueError, match=operation):
            edits.random_edit(scene, Random(0), operation=operation)


def test_instructions_come_in_both_spellings_with_and_without_the_last_sentence():
    random = Random(0)
    made = [edits.random_edit(scene, random).instruction for scene in islice(scenes(2), 400)]
    kept = sum(text.endswith(edits.KEEP["en"]) for text in made)
    assert any("colour" in text for text in made) and any("color" in text for text in made)
    assert 0.2 < kept / len(made) < 0.4


@many
@given(seeds, languages)
def test_a_clip_s_edit_recolours_the_mover_or_the_background(seed, language):
    random = Random(seed)
    clip = random_clip(random)
    edit = edits.clip_edit(clip, random, language)
    scene, after = edit.after.scene, edit.after
    assert after.mover in scene.things and not any(map(held_out, after.scenes))
    assert (after.path, after.direction) == (clip.path, clip.direction)
    if edit.operation == "recolour":
        assert after.mover == replace(clip.mover, colour=after.mover.colour) != clip.mover
        assert scene == clip.scene.changed(clip.mover, colour=after.mover.colour)
        assert words.COLOUR_NAMES[language][after.mover.colour] in edit.instruction
    else:
        assert scene == replace(clip.scene, background=scene.background) != clip.scene
        assert words.BACKGROUND_NAMES[language][scene.background] in edit.instruction


def test_the_suggestion_is_a_rule_of_the_scene():
    red, sun = Thing((0, 0), "red", "circle"), Thing((0, 1), "yellow", "circle")
    blue = Thing((2, 2), "blue", "star")
    cases = {
        Scene("white", (blue, red)): "Make the red circle yellow.",
        Scene("white", (red, sun, blue)): "Make the blue star yellow.",
        Scene("white", (sun,)): "Change the background to black.",
        Scene("black", (red, sun)): "Change the background to white.",
    }
    for scene, text in cases.items():
        assert edits.suggestion(scene).instruction == text
    assert edits.suggestion(Scene("white", (red,)), "zh").instruction == "把红色的圆形变成黄色。"


# Questions


def meant(scene: Scene, text: str) -> list[Thing]:
    """The things that fit every colour, shape and place an English question names."""
    said = text.rstrip("?").split()
    at = next((place for place in PLACES if text.rstrip("?").endswith(words.AT[place])), None)
    colour = next((name for name in COLOURS if name in said), None)
    shape = next((name for name in SHAPES if name in said or name + "s" in said), None)
    return [
        thing
        for thing in scene.things
        if at in (None, thing.place) and colour in (None, thing.colour) and shape in (None, thing.shape)
    ]


@pytest.mark.parametrize("topic", questions.TOPICS)
@few
@given(seed=seeds)
def test_an_answer_is_what_the_scene_shows(topic, seed):
    random = Random(seed)
    scene = random_scene(random, None, EVERYTHING)
    question = questions.random_question(scene, random, topic=topic)
    things = meant(scene, question.text)
    assert question.topic == topic
    if topic in ("colour", "shape", "position", "size"):
        (thing,) = things
        where = words.PLACE_NAMES["en"][thing.place]
        truth = {"colour": thing.colour, "shape": thing.shape, "position": where, "size": thing.size}[topic]
    elif topic == "suggestion":
        truth = edits.suggestion(scene).instruction
    else:
        truth = {
            "count": str(len(things)),
            "background": scene.background,
            "presence": "yes" if things else "no",
        }[topic]
    assert question.answer == truth


def test_answers_are_even_where_they_can_be():
    random = Random(0)
    asked = [questions.random_question(scene, random, topic="presence") for scene in islice(scenes(3), 600)]
    assert 0.4 < sum(question.answer == "yes" for question in asked) / len(asked) < 0.6
    counted = {questions.random_question(scene, random, topic="count").answer for scene in islice(scenes(4), 600)}
    assert counted == {"0", "1", "2", "3"}


@many
@given(seeds, languages)
def test_a_clip_s_answer_is_what_the_clip_shows(seed, language):
    random = Random(seed)
    clip = random_clip(random, None)
    truth = {
        "direction": words.DIRECTION_NAMES[language][clip.direction],
        "colour": words.COLOUR_NAMES[language][clip.mover.colour],
        "shape": words.SHAPE_NAMES[language][clip.mover.shape],
        "background": words.BACKGROUND_NAMES[language][clip.scene.background],
    }
    made = {topic: questions.clip_question(clip, random, language, topic).answer for topic in questions.CLIP_TOPICS}
    assert made == truth


@many
@given(seeds)
def test_the_chinese_question_and_answer_hold_no_english(seed):
    random = Random(seed)
    scene = random_scene(random, None, EVERYTHING)
    question = questions.random_question(scene, random, "zh")
    assert not any(letter.isascii() and letter.isalpha() for letter in question.text + question.answer)
