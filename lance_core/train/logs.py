"""The log of a run: a line of JSON every few steps, and TensorBoard's files where it is installed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LanceError
from ..media import replacing

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG = "log.jsonl"


class Log:
    """Collects what steps report, and writes their mean. On one process of several it writes, on the others not."""

    def __init__(self, folder: Path, accelerator: Accelerator, start: int):
        """start: the step after which the run goes on; lines about later ones are of a run that was cut off."""
        self.accelerator = accelerator
        self.path = folder / LOG
        self.board = None
        self.began = self.last = time.monotonic()
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.tokens = 0
        if accelerator.is_main_process:
            kept = _lines_until(self.path, start)
            with replacing(self.path) as part:
                part.write_text("".join(kept), encoding="utf-8")
            self.board = _board(folder, start)

    def add(self, values: dict[str, Tensor], tokens: int) -> None:
        """What one batch reports. A part of the loss that is 0 stands for one that the batch had nothing for."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value
            there = torch.ones_like(value) if name == "loss" else value != 0
            self.counts[name] = self.counts.get(name, 0) + there
        self.tokens += tokens

    def write(self, step: int, learning_rate: float) -> dict[str, float]:
        """The means since the last line, of all processes, as a new line. Raises LanceError where the loss is lost."""
        names = sorted(self.totals)
        sums = torch.stack([*(self.totals[n].float() for n in names), *(self.counts[n].float() for n in names)])
        sums = torch.cat((sums, sums.new_tensor([self.tokens])))
        *sums, tokens = self.accelerator.reduce(sums, "sum").tolist()
        means = {n: total / count for n, total, count in zip(names, sums, sums[len(names) :]) if count}
        now = time.monotonic()
        speed = tokens / max(now - self.last, 1e-9)
        values = {**means, "learning_rate": learning_rate, "tokens_per_second": speed, "seconds": now - self.began}
        self.totals, self.counts, self.tokens, self.last = {}, {}, 0, now
        if not math.isfinite(means.get("loss", math.nan)):
            raise lost(step)
        if self.accelerator.is_main_process:
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            _append(self.path, json.dumps({"step": step, **rounded}) + "\n")
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
        return values

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def lost(step: int) -> LanceError:
    return LanceError(f"the loss is not a number any more at step {step}: lower train.learning_rate.")


def _append(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise LanceError(f"{path} cannot be written ({error.strerror}): make room and start again.") from None


def _lines_until(path: Path, step: int) -> list[str]:
    """The complete lines of a log about steps up to that one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    try:
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError):
        raise LanceError(f"{path} is not the log of a run: name another output.") from None


def _board(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
