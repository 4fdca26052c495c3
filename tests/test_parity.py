"""Every recorded result of the official model is met within 1e-5."""

from __future__ import annotations

import pytest
import torch
from goldens import golden, values
from parity import TABLE, answer, bf16_errors, lance

from lance_core import flow, text

COUNTS = {"single layers": 8, "one step": 30, "first step": 10, "sampling": 34, "pixels": 5, "answers": 5}


@pytest.mark.parametrize("part", TABLE)
def test_errors_are_below_1e_5(part):
    errors = dict(TABLE[part]())
    assert len(errors) == COUNTS[part]
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def test_every_recorded_sampling_is_measured():
    measured = {name.split(" ")[0] for name, _ in TABLE["sampling"]()}
    recorded = {name for name in golden(5) if name.endswith("final_latent") and "nocache" not in name}
    assert recorded <= measured


@pytest.mark.parametrize("steps", [4, 6, 30])
def test_schedule_is_the_official_one(steps):
    times = flow.schedule(steps, 3.5)
    assert torch.allclose(times[:-1], golden(5)[f"t2i.steps{steps}.timesteps"], atol=1e-7)
    if steps < 30:
        assert torch.allclose(-times.diff(), golden(5)[f"t2i.steps{steps}.dts"], atol=1e-7)


def test_official_defaults_make_26_guided_steps():
    guided = flow.guided_steps(flow.schedule(30, 3.5), (0.4, 1.0))
    assert sum(guided) == 26 and guided[:26] == [True] * 26


@pytest.mark.parametrize("raw, cleaned", list(values()["normalize_understanding_answer"].items()))
def test_answers_are_cleaned_as_officially(raw, cleaned):
    assert text.clean(raw) == cleaned


@pytest.mark.parametrize("name", ["x2t_image.en", "x2t_image.zh", "x2t_video.en", "x2t_video.zh"])
def test_answers_read_as_recorded(name):
    ids, _ = answer(lance(), name, 24)
    assert text.clean(lance().tokenizer.decode(ids)) == values()[f"{name}.answer"]


def test_bf16_is_as_near_to_float32_as_the_official_code_in_bf16():
    errors = {name: (ours, official) for name, ours, official in bf16_errors()}
    assert len(errors) == 8
    assert {name: pair for name, pair in errors.items() if not pair[0] < 1.1 * pair[1]} == {}
