"""Painting with fewer passes through the model: faster, and not quite the same picture. Never on by default.

Sources: steps are predicted while little changes as in TeaCache (arXiv 2411.19108) and EasyCache (arXiv 2507.02860),
along a line as in TaylorSeer (arXiv 2503.06923); the difference between the branches is reused as in FasterCache
(arXiv 2410.19355).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .flow import Sampling, Velocities

REACH = 2  # times the way between its two points, how far a line is followed: where it bends, a slope soon misleads


def shortened(evaluate: Velocities, sampling: Sampling, times: Tensor, frozen_rows: int = 0) -> Velocities:
    """Velocities for one painting along `times`, by the shortcuts of a sampling; without any, `evaluate` itself.

    The result is to be called once per step, in their order. frozen_rows: as in `flow.sample`.
    """
    if sampling.guidance_every > 1:
        evaluate = rarely_guided(evaluate, Difference(sampling.guidance_every))
    if sampling.cache_threshold > 0:
        evaluate = StepCache(evaluate, times.tolist(), sampling.cache_threshold, frozen_rows)
    return evaluate


class Difference:
    """What separates the two branches in one painting: computed on every n-th guided step, and reused in between."""

    def __init__(self, every: int):
        self.every = every
        self.steps = 0
        self.last: Tensor | None = None  # conditional - unconditional velocity

    def branches(self, evaluate: Callable[[int], list[Tensor]], unit: Tensor | float = 1.0) -> list[Tensor]:
        """The conditional and the unconditional result of a guided step; evaluate(n) computes the first n of them.

        unit: what a difference of velocities is multiplied with to become one of results, where these are others.
        """
        is_due = self.steps % self.every == 0
        self.steps += 1
        if is_due:
            cond, uncond = evaluate(2)
            self.last = (cond - uncond) / unit
            return [cond, uncond]
        (cond,) = evaluate(1)
        return [cond, cond - self.last * unit]


def rarely_guided(evaluate: Velocities, difference: Difference) -> Velocities:
    """Velocities whose second branch is computed as seldom as `difference` says."""

    def velocities(x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        if count == 1:
            return evaluate(x, t, 1)
        return difference.branches(lambda n: evaluate(x, t, n))

    return velocities


@dataclass(frozen=True)
class Line:
    """Velocities of the branches at a time, and their change per unit of time; `[B, N, 48]` each."""

    time: float
    span: float  # of time, from the computed velocities before these
    velocities: list[Tensor]
    slopes: list[Tensor]  # of the branches that were computed before, too
    rate: float  # the largest of the slopes' lengths, relative to the velocities'

    def at(self, time: float, count: int) -> list[Tensor]:
        """Prediction for the first so many branches."""
        return [v + slope * (time - self.time) for v, slope in zip(self.velocities[:count], self.slopes)]

    def holds(self, time: float, count: int, threshold: float) -> bool:
        """Whether the first so many branches can be predicted, and have changed by no more than the threshold."""
        ahead = self.time - time
        return count <= len(self.slopes) and ahead <= REACH * self.span and self.rate * ahead <= threshold


class StepCache:
    """Velocities of one painting: predicted, while a line through the last two computed ones changes little.

    The first, the second and the last step are computed. All branches and samples are computed or predicted together:
    the one that changes fastest decides. A computed step costs one number read on the host, a predicted one none.
    """

    def __init__(self, evaluate: Velocities, times: list[float], threshold: float, frozen_rows: int):
        self.evaluate, self.times, self.threshold, self.frozen_rows = evaluate, times, threshold, frozen_rows
        self.steps = 0
        self.line: Line | None = None

    def __call__(self, x: Tensor, t: Tensor, count: int) -> list[Tensor]:
        time = self.times[self.steps]
        self.steps += 1
        is_last = self.steps + 1 == len(self.times)
        if self.line is not None and not is_last and self.line.holds(time, count, self.threshold):
            return self.line.at(time, count)
        velocities = self.evaluate(x, t, count)
        if not is_last:
            self.line = self.line_from(time, velocities)
        return velocities

    def line_from(self, time: float, velocities: list[Tensor]) -> Line:
        """The line through the velocities at a time and those computed before them."""
        if self.line is None:
            return Line(time, 0.0, velocities, [], inf)
        span = self.line.time - time
        slopes = [(before - v) / span for v, before in zip(velocities, self.line.velocities)]
        rates = [self.lengths(slope) / self.lengths(v) for v, slope in zip(velocities, slopes)]
        return Line(time, span, velocities, slopes, torch.stack(rates).max().item())

    def lengths(self, rows: Tensor) -> Tensor:
        """Of every sample's moving rows, `[B]`."""
        return torch.linalg.vector_norm(rows[:, self.frozen_rows :], dim=(-2, -1))
