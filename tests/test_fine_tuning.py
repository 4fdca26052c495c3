"""A LoRA teaches the built-in model a colour or a shape that it has never seen, as docs/fine_tuning.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import fine_tuning
from fine_tuning import MEASUREMENTS, RECIPE, fine_tuned, recipe

from lance_core import LanceError
from lance_core.__main__ import main
from lance_core.adapters import apply_loras
from lance_core.checkpoint import Lance, load_lance
from lance_core.train.config import TrainConfig
from lance_core.train.data import open_data
from lance_core.train.objective import Trainee, pack
from lance_core.world import accuracy
from lance_core.world.accuracy import Cases
from lance_core.world.edits import OPERATIONS, drawn_edit
from lance_core.world.files import make_world
from lance_core.world.render import draw
from lance_core.world.scene import Scene, held_out, random_clip, random_scene, with_new
from lance_core.world.shares import Share
from lance_core.world.words import name_of

seeds = st.integers(0, 2**32)
news = st.sampled_from(["orange", "heart"])
splits = st.sampled_from(["train", "test"])
few = settings(max_examples=40, deadline=None)
STEPS = 12


def shows(scene: Scene, name: str) -> bool:
    return any(name in thing.kind for thing in scene.things)


# What is new


@few
@given(seeds, news, splits)
def test_every_scene_shows_what_is_new_and_keeps_to_its_split(seed, new, split):
    vocabulary = with_new(new)
    scene, clip = random_scene(Random(seed), split, vocabulary), random_clip(Random(seed), split, vocabulary)
    assert shows(scene, new) and new in clip.mover.kind
    assert held_out(scene) == held_out(clip.scene) == (split == "test")
    assert not shows(random_scene(Random(seed), split, vocabulary.without_new), new)


@few
@given(seeds, news, splits, st.sampled_from(OPERATIONS))
def test_edits_bring_what_is_new_or_begin_with_it(seed, new, split, operation):
    edit = drawn_edit(Random(seed), split, vocabulary=with_new(new), operation=operation)
    brings = operation in ("add", {"orange": "recolour", "heart": "replace"}[new])
    assert edit.operation == operation
    assert shows(edit.before, new) != brings
    assert shows(edit.after, new) or not brings
    assert brings == (new in edit.instruction and not shows(edit.before, new))
    if split == "train":
        assert not held_out(edit.before) and not held_out(edit.after)
    else:
        assert held_out(edit.after if brings else edit.before)


def test_what_is_known_or_unknown_is_not_new(tmp_path, capsys):
    for name in ("red", "blurple"):
        with pytest.raises(LanceError, match=f"'{name}' is nothing new to the small world: choose orange or heart"):
            with_new(name)
    assert main(["make-world", str(tmp_path / "world"), "--new", "red"]) == 2
    assert "nothing new" in capsys.readouterr().err and not (tmp_path / "world").exists()


def test_a_data_set_shows_what_is_new_and_what_is_not(tmp_path):
    """In the words alone, which do not always name it."""
    assert main(["make-world", str(tmp_path / "world"), "--new", "orange", "--count", "60"]) == 0
    lines = (tmp_path / "world/data.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [line["caption"] for line in map(json.loads, lines) if "caption" in line]
    named = sum(name_of("orange", language) in caption for caption in captions for language in ("en", "zh"))
    assert len(captions) > 10 and 0.5 < named / len(captions) < 1


def test_cases_are_right_and_told_apart_where_they_name_what_is_new():
    for vocabulary in (with_new("orange"), with_new("heart")):
        asked, painted, changed = (Cases(count, vocabulary=vocabulary) for count in (40, 8, 12))
        found = accuracy.answers(lambda *case, own=asked: accuracy.question_case(own, case[-1])[1].answer, asked)
        assert 10 < found[f"about {vocabulary.new}"].count < found["answers"].count == 40

        def paint(*case, own: Cases = painted) -> Tensor:
            return draw(accuracy.caption_case(own, case[-1])[0])

        def change(*case, own: Cases = changed) -> Tensor:
            return draw(accuracy.edit_case(own, case[-1])[0].after)

        for results in (accuracy.paintings(paint, painted), accuracy.changes(change, changed)):
            shares = [share.value for share in results.values() if isinstance(share, Share)]
            assert set(shares) == {1.0}


# The recipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[TrainConfig, Lance, Lance]:
    """A run of a few steps, and the model before and after it."""
    folder = tmp_path_factory.mktemp("tuned") / "orange"
    make_world(folder / "data", count=200, vocabulary=with_new("orange"))
    config = recipe(folder, STEPS)
    config = replace(config, train=replace(config.train, warmup=2, schedule="constant"))
    path = fine_tuned(config)
    base = load_lance("nano", device="cpu", dtype="fp32")
    return config, base, apply_loras(base, [(path, 1.0)])


@torch.no_grad()
def losses(lance: Lance, config: TrainConfig, folder: Path) -> dict[str, float]:
    """Of a data set, with the same noise for every model."""
    (entry,) = config.data
    examples = open_data([replace(entry, path=folder)], lance, seed=0)
    chosen = [examples[index] for index in range(20)]
    generator = torch.Generator().manual_seed(0)
    batch = pack(chosen, lance.tokenizer, lance.config, config.objective, generator)
    found = Trainee(lance.transformer, lance.vision, config.objective)(batch)
    return {name: float(value) for name, value in found.items()}


def test_the_loss_of_what_is_new_falls(tuned, tmp_path):
    """On combinations that it was not trained on."""
    config, base, after = tuned
    make_world(tmp_path / "test", count=20, split="test", vocabulary=with_new("orange"))
    first, last = (losses(lance, config, tmp_path / "test") for lance in (base, after))
    assert last["ce"] < 0.95 * first["ce"] and last["loss"] < first["loss"]


def test_the_model_is_as_it_was_without_the_lora(tuned):
    _, base, after = tuned
    fresh = load_lance("nano", device="cpu", dtype="fp32")
    for part in ("transformer", "vision", "vae"):
        own, shipped = (dict(getattr(lance, part).named_parameters()) for lance in (base, fresh))
        assert own.keys() == shipped.keys()
        assert all(torch.equal(weight, shipped[name]) for name, weight in own.items())
    trained = {name for name, _ in after.transformer.named_parameters() if "lora_" in name}
    assert any("moe_gen" in name for name in trained) and any("lm_head" in name for name in trained)


def test_the_benchmark_prints_what_was_right_before_and_after(tuned):
    """Of the run that is there."""
    folder = tuned[0].output.parent
    options = [f"--keep={folder.parent}", f"--steps={STEPS}", "--count=3", "--sampling-steps=1"]
    done = subprocess.run([sys.executable, fine_tuning.__file__, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    title, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines())
    assert title[0] == f"{STEPS} steps" and title[1:] == ["before", "after"]
    for world in ("orange", "old"):
        assert {f"{world}: {name}" for name in MEASUREMENTS} <= {name for name, *_ in rows}
    assert all("% (" in cell for _, *cells in rows for cell in cells)


def test_the_recipe_reads_what_the_commands_write():
    text = RECIPE.read_text(encoding="utf-8")
    assert 'output = "runs/orange"' in text and 'path = "orange"' in text


def test_a_short_run_teaches_a_colour(tmp_path):
    """To paint scenes with something orange, of combinations held out from the data."""
    vocabulary = with_new("orange")
    make_world(tmp_path / "data", count=300, vocabulary=vocabulary)
    path = fine_tuned(recipe(tmp_path, steps=100))
    base = load_lance("nano", device="cpu", dtype="fp32")
    cases, row = Cases(24, vocabulary=vocabulary), "shape, colour and position"
    tuned = apply_loras(base, [(path, 1.0)])
    before, after = (accuracy.generation(lance, cases, steps=8)[row].value for lance in (base, tuned))
    assert after >= before + 0.2, (before, after)
