"""Learning rate and averaging, as functions of the step alone: a run that goes on needs to remember neither."""

from __future__ import annotations

import math

from .config import Training


def learning_rate(training: Training, step: int) -> float:
    """Of a step, counted from 1: rising over the warm-up, then constant or falling along half a cosine."""
    if step <= training.warmup or training.schedule == "constant":
        return training.learning_rate * min(1.0, step / max(1, training.warmup))
    fall = cosine(step, training.warmup, training.steps)
    return training.min_learning_rate + (training.learning_rate - training.min_learning_rate) * fall


def cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the highest rate: rising to 1 over `warmup` steps, then falling to 0 along half a cosine."""
    if step <= warmup:
        return step / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))


def decay(training: Training, step: int) -> float:
    """Of the average after a step: shorter at first, so that the weights at the start are soon forgotten."""
    return min(training.ema, (1 + step) / (10 + step))
