"""What many cases come to: shares of what was right with their intervals, means of figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from .words import Language

LANGUAGES: dict[Language, str] = {"en": "English", "zh": "Chinese"}
Z = 1.959964  # standard deviations within which 95 % of a normal distribution lie

Outcome = Mapping[str, bool | float]  # what a case says of every row it belongs to


@dataclass(frozen=True)
class Share:
    """So many of the cases; in words the percentage and its interval."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval of 95 %: between what shares such a result is usual."""
        if not self.count:
            return 0.0, 1.0
        spread = Z**2 / self.count
        middle = (self.value + spread / 2) / (1 + spread)
        half = Z / (1 + spread) * math.sqrt(self.value * (1 - self.value) / self.count + spread / self.count / 4)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{self.value:.1%} ({low:.0f}-{high:.0f})"


@dataclass(frozen=True)
class Mean:
    """The mean of a figure, and the least of it."""

    value: float
    least: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1f} (least {self.least:.1f})"


Results = dict[str, Share | Mean]  # by the names of rows


def gather(outcomes: Iterable[Outcome]) -> Results:
    """Shares of what is true or false, means of what is a number; of the cases that say anything about it.

    Languages come last. Infinite and missing (NaN) numbers do not count.
    """
    columns: dict[str, list[bool | float]] = {}
    for outcome in outcomes:
        for name, value in outcome.items():
            columns.setdefault(name, []).append(value)
    names = sorted(columns, key=lambda name: name in LANGUAGES.values())
    return {name: _summary(columns[name]) for name in names}


def _summary(values: list[bool | float]) -> Share | Mean:
    if all(isinstance(value, bool) for value in values):
        return Share(sum(values), len(values))
    known = [value for value in values if math.isfinite(value)]
    return Mean(fmean(known), min(known), len(known)) if known else Mean(math.nan, math.nan, 0)
