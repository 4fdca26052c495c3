"""Batches of one process, the same for the same place in the data, made while the step before is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Generic, TypeVar

import torch

from ..errors import LanceError
from .examples import Example, Examples

MOST_BAD = 1000  # records in a row that could not be read: there is nothing to train on then

B = TypeVar("B")
Pack = Callable[[list[Example], torch.Generator], B]


@dataclass(frozen=True)
class Share:
    """Which of so many processes this one is; each takes every `count`-th example."""

    rank: int = 0
    count: int = 1


@dataclass(frozen=True, eq=False)
class Drawn(Generic[B]):
    """A batch. cursor: how many examples this process has been through with it. tokens: in it."""

    batch: B
    cursor: int
    tokens: int


@dataclass
class Batches(Generic[B]):
    """Draws batch after batch.

    budget: tokens of a batch. measure: tokens of an example. cursor, number: examples and batches of this process that
    came before. All that is random in a batch depends on the seed and on the batch's number among all processes.
    """

    examples: Examples
    pack: Pack[B]
    measure: Callable[[Example], int]
    budget: int
    seed: int
    share: Share = Share()
    cursor: int = 0
    number: int = 0
    waiting: Example | None = field(default=None, init=False)  # read, but did not fit any more

    def draw(self) -> Drawn[B]:
        chosen = [self.next()]
        tokens = self.measure(chosen[0])
        while tokens < self.budget:
            self.waiting = self.next()
            more = self.measure(self.waiting)
            if tokens + more > self.budget:
                self.cursor -= 1
                break
            chosen.append(self.waiting)
            self.waiting = None
            tokens += more
        batch = self.pack(chosen, self.generator())
        self.number += 1
        return Drawn(batch, self.cursor, tokens)

    def next(self) -> Example:
        """The next example that could be read."""
        if self.waiting is not None:
            example, self.waiting = self.waiting, None
            self.cursor += 1
            return example
        for _ in range(MOST_BAD):
            example = self.examples[self.cursor * self.share.count + self.share.rank]
            self.cursor += 1
            if example is not None:
                return example
        raise LanceError(f"{MOST_BAD} records in a row could not be used: see the warnings, and correct the data.")

    def generator(self) -> torch.Generator:
        number = self.number * self.share.count + self.share.rank
        return torch.Generator().manual_seed(seed_of(self.seed, number))


def seed_of(*numbers: int) -> int:
    """A seed that is as good as random, the same for the same numbers."""
    name = " ".join(map(str, numbers)).encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") >> 1


@contextmanager
def ahead(batches: Batches[B]) -> Iterator[Callable[[], Drawn[B]]]:
    """`draw`, but the next batch is always being made already, by another thread."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batches.draw)

        def draw() -> Drawn[B]:
            nonlocal coming
            drawn = coming.result()
            coming = pool.submit(batches.draw)
            return drawn

        try:
            yield draw
        finally:
            coming.cancel()
