"""Shortcuts: fewer passes, a bounded error, and nothing of it unless it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from goldens import TINY
from hypothesis import given, settings, strategies as st
from parity import lance
from torch import Tensor

from lance_core import flow, stages
from lance_core.__main__ import main, read_latent
from lance_core.errors import LanceError
from lance_core.flow import Sampling
from lance_core.shortcuts import shortened
from lance_core.workflow_nodes import Model, set_guidance

EXACT = Sampling()
PASSES = 56  # of 30 steps in the official interval: 26 guided ones and 4 others
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4)
SIZE = {"width": 48, "height": 32}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Smooth:
    """Velocities that turn smoothly with time and place, and the number of branches computed at each call.

    speeds: how fast each sample's velocity changes.
    """

    def __init__(self, speeds: Sequence[float] = (1.0,), seed: int = 0):
        self.speeds = torch.tensor(speeds)[:, None, None]
        self.target, self.other, self.turn = drawn(3, len(speeds), 6, 48, seed=seed)
        self.counts: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        self.counts.append(count)
        common = 0.2 * torch.tanh(x) + torch.sin(3 * self.speeds * t) * self.turn
        return [common + self.target, common * 0.8 + self.other][:count]

    @property
    def passes(self) -> int:
        return sum(self.counts)


def painted(model: Smooth, sampling: Sampling, frozen_rows: int = 0) -> Tensor:
    times = flow.schedule(sampling.steps, sampling.shift)
    velocity = flow.guided_velocity(shortened(model, sampling, times, frozen_rows), sampling)
    guided = flow.guided_steps(times, sampling.interval)
    return flow.sample(velocity, drawn(len(model.speeds), 6, 48, seed=9), times, guided, frozen_rows)


def error(model: Smooth, sampling: Sampling) -> float:
    """Relative L2 distance from the exact result; the model's passes are those with the shortcut."""
    exact = painted(model, replace(sampling, guidance_every=1, cache_threshold=0.0))
    model.counts.clear()
    return float((painted(model, sampling) - exact).norm() / exact.norm())


class Passes:
    """The branches that a real model computes, step by step."""

    def __init__(self, monkeypatch):
        self.counts: list[int] = []
        original = type(lance().transformer).velocities

        def velocities(transformer, rows, t, branches, **options):
            self.counts.append(len(branches))
            return original(transformer, rows, t, branches, **options)

        monkeypatch.setattr(type(lance().transformer), "velocities", velocities)


def test_nothing_is_in_between_unless_asked_for():
    model = Smooth()
    assert shortened(model, EXACT, flow.schedule(30, 3.5)) is model
    assert (EXACT.guidance_every, EXACT.cache_threshold) == (1, 0.0)


def test_the_defaults_said_aloud_are_the_same_bits(monkeypatch):
    passes = Passes(monkeypatch)
    plain = stages.generate(lance(), "a fox", steps=6, **SIZE)
    assert passes.counts == 6 * [2]
    said = stages.generate(lance(), "a fox", steps=6, guidance_every=1, cache_threshold=0, **SIZE)
    assert torch.equal(plain, said)


@pytest.mark.parametrize(("every", "passes"), [(2, 43), (3, 39), (4, 37), (100, 31)])
def test_guidance_is_computed_on_every_nth_guided_step(every, passes):
    model = Smooth()
    assert error(model, Sampling(guidance_every=every)) > 0
    assert model.passes == passes
    assert model.counts[:26] == [2 if i % every == 0 else 1 for i in range(26)]


def test_a_difference_that_stays_may_be_reused_without_error():
    class Parallel(Smooth):
        def __call__(self, x: Tensor, t: Tensor, count: int) -> list[Tensor]:
            (cond,) = super().__call__(x, t, 1)
            return [cond, cond - self.other][:count]

    assert error(Parallel(), Sampling(guidance_every=5)) < 1e-5


def test_reused_guidance_is_nearer_than_none():
    for seed in range(5):
        model = Smooth(seed=seed)
        exact, reused = painted(model, EXACT), painted(model, Sampling(guidance_every=2))
        dropped = painted_with_guidance_dropped(model)
        assert (reused - exact).norm() < 0.5 * (dropped - exact).norm()


def painted_with_guidance_dropped(model: Smooth) -> Tensor:
    """As exact painting, but every other guided step is not guided at all."""
    times = flow.schedule(EXACT.steps, EXACT.shift)
    guided = [flag and i % 2 == 0 for i, flag in enumerate(flow.guided_steps(times, EXACT.interval))]
    return flow.sample(flow.guided_velocity(model, EXACT), drawn(1, 6, 48, seed=9), times, guided)


def test_a_line_is_predicted_exactly():
    class Straight(Smooth):
        def __call__(self, x: Tensor, t: Tensor, count: int) -> list[Tensor]:
            super().__call__(x, t, count)
            return [self.target + t * self.turn, self.other - t * self.turn][:count]

    model = Straight()
    assert error(model, Sampling(cache_threshold=1.0)) < 1e-5
    assert model.passes < PASSES / 2


def test_a_line_is_followed_no_further_than_twice_its_own_length():
    """The first two steps and the last one are computed, however little changes."""
    steps: list[float] = []

    def constant(x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        steps.append(float(t))
        return count * [torch.ones_like(x)]

    times = flow.schedule(32, 1.0)  # even steps
    velocities = shortened(constant, Sampling(cache_threshold=1e-6), times)
    for t in times[:-1]:
        velocities(drawn(1, 6, 48), t, 1)
    assert steps == [float(times[i]) for i in (0, 1, 4, 11, 26, 31)]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_all_computed(steps):
    assert error(Smooth(), Sampling(steps=steps, cache_threshold=0.05)) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), speed=st.floats(0.1, 2.0))
def test_the_error_stays_near_the_threshold_or_below(seed, speed):
    model = Smooth((speed,), seed)
    for threshold in THRESHOLDS:
        assert error(model, Sampling(cache_threshold=threshold)) < 2 * threshold
        assert 5 <= model.passes <= PASSES


def test_a_higher_threshold_computes_less_and_errs_more():
    models = [Smooth(seed=seed) for seed in range(8)]
    errors, passes = [], []
    for threshold in THRESHOLDS:
        settings = Sampling(cache_threshold=threshold)
        errors.append(sum(error(model, settings) for model in models))
        passes.append(sum(model.passes for model in models))
    assert errors == sorted(errors) and errors[0] < errors[-1] / 4
    assert passes == sorted(passes, reverse=True) and passes[-1] < passes[0] / 2


def test_a_velocity_that_turns_at_every_step_is_always_computed():
    flips = iter(range(1000))

    def turning(x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        return count * [(-1) ** next(flips) * torch.ones_like(x)]

    times = flow.schedule(30, 3.5)
    velocities = shortened(turning, Sampling(cache_threshold=0.2), times)
    for t in times[:-1]:
        velocities(drawn(1, 6, 48), t, 1)
    assert next(flips) == 30


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_nothing_is_predicted_from_zero_or_nan(value):
    calls = []

    def broken(x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        calls.append(count)
        return count * [torch.full_like(x, value)]

    times = flow.schedule(10, 3.5)
    velocities = shortened(broken, Sampling(cache_threshold=1.0), times)
    for t in times[:-1]:
        velocities(drawn(1, 6, 48), t, 2)
    assert calls == 10 * [2]


def test_the_fastest_sample_of_a_batch_decides():
    slow, fast, calls = Smooth((0.1,)), Smooth((2.0,)), []

    def both(x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        calls.append(count)
        return [torch.cat(pair) for pair in zip(slow(x[:1], t, count), fast(x[1:], t, count))]

    times, start = flow.schedule(30, 3.5), drawn(1, 6, 48, seed=9)
    guided = flow.guided_steps(times, EXACT.interval)
    sampling = Sampling(cache_threshold=0.1)
    velocity = flow.guided_velocity(shortened(both, sampling, times), sampling)
    together = flow.sample(velocity, torch.cat((start, start)), times, guided)
    counts = {}
    for model in (slow, fast):
        model.counts.clear()
        alone = painted(model, sampling)
        counts[model] = model.passes
    assert counts[slow] < counts[fast] == sum(calls)
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("interval", [(0.4, 1.0), (0.3, 0.8), (0.0, 0.6), (0.5, 0.5)])
@pytest.mark.parametrize("shortcut", [{"guidance_every": 2}, {"cache_threshold": 0.1}])
def test_guidance_may_begin_and_end_anywhere(interval, shortcut):
    model = Smooth()
    sampling = Sampling(interval=interval, **shortcut)
    exact = 30 + sum(flow.guided_steps(flow.schedule(30, 3.5), interval))
    assert error(model, sampling) < 0.1
    assert model.passes < exact or interval == (0.5, 0.5) and "guidance_every" in shortcut


def test_both_shortcuts_compute_less_than_either():
    model, passes = Smooth(), {}
    for every, threshold in ((2, 0.0), (1, 0.1), (2, 0.1)):
        assert error(model, Sampling(guidance_every=every, cache_threshold=threshold)) < 0.1
        passes[every, threshold] = model.passes
    assert passes[2, 0.1] < min(passes[2, 0.0], passes[1, 0.1])


def test_rows_that_stay_do_not_count():
    """A first frame, whose velocity is large and always the same, would hide how fast the others change."""

    class Still(Smooth):
        def __call__(self, x: Tensor, t: Tensor, count: int) -> list[Tensor]:
            velocities = super().__call__(x, t, count)
            return [torch.cat((torch.full_like(v[:, :2], 100.0), v[:, 2:]), dim=1) for v in velocities]

    sampling = Sampling(cache_threshold=0.1, renorm="none")
    frozen, all_rows = Still(), Still()
    painted(frozen, sampling, frozen_rows=2)
    painted(all_rows, sampling)
    assert frozen.passes > all_rows.passes


@pytest.mark.parametrize("shortcut", [{"guidance_every": 2}, {"cache_threshold": 0.15}])
def test_pictures_clips_and_edits_are_near_the_exact_ones(shortcut, monkeypatch):
    passes = Passes(monkeypatch)
    first = drawn(1, 48, 1, 2, 3)
    seen = stages.encode_semantic(lance(), torch.full((1, 56, 56, 3), 0.5), resolution=None)
    ways = {
        "picture": lambda **options: stages.generate(lance(), "a fox", seed=[1, 2], **SIZE, **options),
        "clip": lambda **options: stages.generate(lance(), "a fox", frames=9, first_frame=first, **options),
        "edit": lambda **options: stages.edit(lance(), seen, drawn(1, 48, 1, 3, 3), "a fox", **options),
        "late": lambda **options: stages.generate(lance(), "a", guidance_interval=(0.3, 0.9), **SIZE, **options),
    }
    for name, paint in ways.items():
        exact = paint(steps=20)
        computed = sum(passes.counts)
        passes.counts.clear()
        near = paint(steps=20, **shortcut)
        assert 0 < (near - exact).norm() < 0.05 * exact.norm(), name
        assert sum(passes.counts) < 0.85 * computed, name
        passes.counts.clear()
        if name == "clip":
            assert torch.equal(near[:, :, :1], first)


@pytest.mark.parametrize("options", [{"prompt": ""}, {"guidance": 1.0}])
def test_one_branch_is_predicted_and_has_no_guidance_to_reuse(options, monkeypatch):
    passes = Passes(monkeypatch)
    options = {"prompt": "a fox", "steps": 20, **SIZE, **options}
    exact = stages.generate(lance(), **options)
    assert passes.counts == 20 * [1]
    assert torch.equal(stages.generate(lance(), guidance_every=3, **options), exact)
    passes.counts.clear()
    near = stages.generate(lance(), cache_threshold=0.15, **options)
    assert len(passes.counts) < 18 and set(passes.counts) == {1}
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()


def test_a_stopped_painting_leaves_nothing_for_the_next():
    class Stop(Exception):
        pass

    def stop(step: int, steps: int, estimate: Tensor) -> None:
        if step == 7:
            raise Stop

    options = {"steps": 12, "guidance_every": 2, "cache_threshold": 0.1, **SIZE}
    before = stages.generate(lance(), "a fox", **options)
    with pytest.raises(Stop):
        stages.generate(lance(), "another", seed=5, on_step=stop, **options)
    assert torch.equal(stages.generate(lance(), "a fox", **options), before)


def test_the_shell_and_workflows_take_the_same_shortcuts(tmp_path):
    options = {"steps": 8, "guidance_every": 2, "cache_threshold": 0.1}
    expected = stages.generate(lance(), "a fox", seed=3, **SIZE, **options)
    words = [part for name, value in {**SIZE, **options}.items() for part in (f"--{name.replace('_', '-')}", value)]
    file = tmp_path / "a.safetensors"
    command = ["generate", "a fox", "--model", TINY, "--dtype", "fp32", "--device", "cpu", "--seed", 3]
    assert main([str(word) for word in (*command, *words, "--output", file)]) == 0
    assert torch.equal(read_latent(file), expected)

    (model,) = set_guidance(None, Model(lance()), 0.4, 1.0, "global", 0.0, 2)
    assert Sampling(interval=model.guidance.pop("guidance_interval"), **model.guidance) == Sampling(guidance_every=2)


def test_every_step_is_reported():
    seen = []
    stages.generate(
        lance(), "a", steps=8, cache_threshold=1.0, on_step=lambda step, steps, x: seen.append((step, steps)), **SIZE
    )
    assert seen == [(i + 1, 8) for i in range(8)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_every": 0}, "guidance_every is 0: give a whole number of at least 1."),
        ({"guidance_every": 1.5}, "guidance_every is 1.5: give a whole number of at least 1."),
        ({"guidance_every": True}, "guidance_every is True: give a whole number of at least 1."),
        ({"cache_threshold": -0.1}, "cache_threshold is -0.1: give a number from 0 to 1."),
        ({"cache_threshold": 1.1}, "cache_threshold is 1.1: give a number from 0 to 1."),
        ({"cache_threshold": float("nan")}, "cache_threshold is nan: give a number from 0 to 1."),
        ({"cache_threshold": None}, "cache_threshold is None: give a number from 0 to 1."),
    ],
)
def test_mistakes_get_a_sentence(options, sentence):
    with pytest.raises(LanceError) as caught:
        stages.generate(lance(), "a", **SIZE, **options)
    assert str(caught.value) == sentence
