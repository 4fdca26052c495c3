"""Time and memory on a device: CUDA events and the allocator's counters on a GPU, a clock and the process on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from measuring import peak_gigabytes

from lance_core.checkpoint import Lance
from lance_core.placement import Placement

GIB = 2**30
# Dense bf16 products with float32 sums, FLOP/s, by the maker's data sheets; the first name that fits.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "3090": 71e12,
    "3060": 25.5e12,
}


class Clock:
    """Marks in time, on the device's own clock where it has one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list = []

    def mark(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds between marks that follow each other."""
        pairs = zip(self.marks, self.marks[1:])
        if self.device.type != "cuda":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def durations(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of every call after one that warms up."""
    clock = Clock(device)
    call()
    clock.mark()
    for _ in range(repeats):
        call()
        clock.mark()
    return clock.spans()


def dense_rate(device: torch.device, side: int, repeats: int = 10) -> float:
    """FLOP/s of one product of square bf16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    out = torch.empty_like(a)
    return 2 * side**3 / median(durations(lambda: torch.mm(a, b, out=out), repeats, device))


def peak_rate(name: str) -> float | None:
    """FLOP/s of the data sheet for a device of that name."""
    return next((rate for key, rate in PEAKS.items() if key in name), None)


class Watched(Placement):
    """A placement that, while `noting`, notes what its uses were said to need: weights there, and working memory.

    To know working memory takes time, which without a budget a request does not spend.
    """

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.noting = False
        self.working = 0
        self.estimates: list[int] = []

    @contextmanager
    def use(self, *names: str, working: Callable[[], int] = lambda: 0, at_most: int | None = None) -> Iterator[None]:
        needed = working() if self.noting else 0
        known = {"working": lambda: needed} if self.noting else {"working": working, "at_most": at_most}
        with super().use(*names, **known):
            self.working += needed
            self.estimates.append(self.resident() + self.working)
            try:
                yield
            finally:
                self.working -= needed


@dataclass(frozen=True)
class Reading:
    """One phase of a request: seconds, and bytes of memory. On a CPU there are only the process's."""

    seconds: float
    estimated: int
    allocated: int | None  # the most that tensors took on the device
    reserved: int | None  # the most that torch's allocator held for them
    used: int | None  # on the whole device, other programs and the CUDA context included, when the phase ended
    host: int  # the process's resident set when the phase ended
    pinned: int


class Watch:
    """Readings of phases, by their names."""

    def __init__(self, lance: Lance):
        self.lance = lance
        self.device = lance.device
        self.readings: dict[str, list[Reading]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Clock]:
        """Inside, marks may be made on the clock that is given."""
        clock, estimates = Clock(self.device), self.lance.placement.estimates
        estimates.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock.mark()
        yield clock
        clock.mark()
        self.readings.setdefault(name, []).append(self._read(sum(clock.spans()), max(estimates, default=0)))

    def _read(self, seconds: float, estimated: int) -> Reading:
        pinned = sum(p.size for part in self.lance.placement.parts.values() for p in part.pieces if p.pinned)
        if self.device.type != "cuda":
            return Reading(seconds, estimated, None, None, None, resident_bytes(), pinned)
        return Reading(
            seconds,
            estimated,
            torch.cuda.max_memory_allocated(self.device),
            torch.cuda.max_memory_reserved(self.device),
            used_bytes(self.device),
            resident_bytes(),
            pinned,
        )


def used_bytes(device: torch.device) -> int:
    """Memory used on the device by everybody: NVML's figure where pynvml is installed, else the driver's."""
    try:
        return torch.cuda.device_memory_used(device)
    except (AttributeError, ModuleNotFoundError, RuntimeError):
        free, total = torch.cuda.mem_get_info(device)
        return total - free


def resident_bytes() -> int:
    """The process's resident set now, on Linux; elsewhere its peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return int(peak_gigabytes() * 1e9)
