"""Flow matching at inference: schedule, guidance and Euler steps, as pure functions.

Source: modeling/lance/lance.py (validation_gen_KVcache) of bytedance/Lance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number, check_whole
from .errors import LanceError

Renorm = Literal["global", "channel", "none"]
RENORMS = ("global", "channel", "none")


@dataclass(frozen=True)
class Sampling:
    """How a latent is painted; the defaults are the official ones. Raises LanceError where a value makes no sense.

    guidance_every and cache_threshold are shortcuts (see `shortcuts`): with others than the defaults the result is
    not quite the same.
    """

    steps: int = 30
    guidance: float = 4.0  # 1: none
    shift: float = 3.5
    interval: tuple[float, float] = (0.4, 1.0)  # times between which guidance acts
    renorm: Renorm = "global"
    renorm_min: float = 0.0
    guidance_every: int = 1  # on every n-th guided step the unconditional branch is computed
    cache_threshold: float = 0.0  # change of the velocity, relative to it, up to which steps are predicted

    def __post_init__(self):
        check_whole("steps", self.steps, 1)
        check_number("guidance", self.guidance, 1.0)
        check_number("shift", self.shift, 0.0)
        if self.shift == 0:
            raise LanceError("shift is 0: give a positive number, 1 for an even schedule.")
        if not isinstance(self.interval, (tuple, list)) or len(self.interval) != 2:
            raise LanceError(f"guidance_interval is {self.interval!r}: give two times, such as (0.4, 1.0).")
        for value in self.interval:
            check_number("guidance_interval", value, 0.0, 1.0)
        if self.interval[0] > self.interval[1]:
            raise LanceError(
                f"guidance_interval is {tuple(self.interval)}: give the smaller time first, then the larger one."
            )
        if self.renorm not in RENORMS:
            raise LanceError(f"renorm is {self.renorm!r}; give one of {', '.join(RENORMS)}.")
        check_number("renorm_min", self.renorm_min, 0.0, 1.0)
        check_whole("guidance_every", self.guidance_every, 1)
        check_number("cache_threshold", self.cache_threshold, 0.0, 1.0)


# (rows x `[B, N, 48]`, t `[]`, guided?) -> velocity `[B, N, 48]` float32, from data to noise
Velocity = Callable[[Tensor, Tensor, bool], Tensor]
# (rows x `[B, N, 48]`, t `[]`, n) -> velocities on the first n branches, of which the first is the conditional one
Velocities = Callable[[Tensor, Tensor, int], list[Tensor]]


def schedule(steps: int, shift: float) -> Tensor:
    """Times from 1 (noise) to 0 (data), `[steps + 1]` float32: s·u / (1 + (s - 1)·u) of evenly spaced u."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def guided_steps(times: Tensor, interval: tuple[float, float]) -> list[bool]:
    """For every step of a schedule, whether its time is guided."""
    return is_guided(times[:-1], interval).tolist()


def is_guided(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Whether guidance acts at times t: low < t <= high, compared in float32."""
    low, high = interval
    return (t > low) & (t <= high)


def guide(cond: Tensor, uncond: Tensor, scale: float, renorm: Renorm = "global", renorm_min: float = 0.0) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) whose result is not longer than the conditional velocity.

    cond, uncond `[B, N, 48]` -> `[B, N, 48]`; renorm, renorm_min: as in `renormalize`.
    """
    return renormalize(uncond + scale * (cond - uncond), cond, renorm, renorm_min)


def renormalize(v: Tensor, cond: Tensor, renorm: Renorm, renorm_min: float) -> Tensor:
    """Guided velocities v, shortened to the length of the conditional ones where they are longer; `[B, N, 48]`.

    renorm 'global' compares the lengths of whole samples, 'channel' those of single rows; the factor stays within
    renorm_min..1. 'none': v.
    """
    if renorm == "none":
        return v
    dims = (-2, -1) if renorm == "global" else (-1,)
    ratio = torch.linalg.vector_norm(cond, dim=dims, keepdim=True) / (
        torch.linalg.vector_norm(v, dim=dims, keepdim=True) + 1e-8
    )
    return v * ratio.clamp(min=renorm_min, max=1.0)


def guided_velocity(evaluate: Velocities, sampling: Sampling) -> Velocity:
    """The velocity by which a step is made, from those of the branches."""

    def velocity(x: Tensor, t: Tensor, guided: bool) -> Tensor:
        if not guided:
            return evaluate(x, t, 1)[0]
        return guide(*evaluate(x, t, 2), sampling.guidance, sampling.renorm, sampling.renorm_min)

    return velocity


def sample(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    guided: list[bool],
    frozen_rows: int = 0,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Euler's method from noise x `[B, N, 48]` (float32, normalised) along `times`; the first rows stay as they are.

    on_step(step, steps, estimate) after every step, from 1; the estimate is of clean rows, `[B, N, 48]`.
    """
    steps = len(guided)
    times = times.to(x.device)
    frozen, moving = x[:, :frozen_rows], x[:, frozen_rows:]
    for i in range(steps):
        v = velocity(torch.cat((frozen, moving), dim=1), times[i], guided[i])[:, frozen_rows:]
        if on_step is not None:
            estimate = torch.cat((frozen, moving - v * times[i]), dim=1)
        moving = moving - v * (times[i] - times[i + 1])
        if on_step is not None:
            on_step(i + 1, steps, estimate)
    return torch.cat((frozen, moving), dim=1)
