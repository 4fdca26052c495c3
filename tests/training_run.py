"""A small training run that tests start as a process of its own, to be killed or to be one of several.

python -m tests.training_run OUTPUT NAME=VALUE... where names are those of `[train]` and `[save]`, and `stop`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from lance_core.config import LanceConfig, TextConfig, VisionConfig
from lance_core.errors import LanceError
from lance_core.tiny import random_lance
from lance_core.train.config import Saving, TrainConfig, Training
from lance_core.train.examples import Example
from lance_core.train.lora import LoraConfig
from lance_core.train.trainer import train

TEXT = TextConfig(
    vocab_size=640,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(2, 3, 3),
)
VISION = VisionConfig(
    depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, fullatt_block_indexes=(0,)
)
STEPS = 8


class Handful:
    """Pictures to paint at even places, questions to answer at odd ones; four of each, again and again."""

    def __getitem__(self, index: int) -> Example:
        number = index % 8
        if number % 2:
            return Example("understand", f"What is {number}?", answer=f"It is {number * 11}.")
        generator = torch.Generator().manual_seed(number)
        return Example("generate", f"Picture {number}", target=torch.randn(48, 1, 2, 3, generator=generator))


def small_lance():
    return random_lance(LanceConfig(TEXT, VISION))


def configuration(output: Path, **options) -> TrainConfig:
    """One example per batch; everything else is small, fast and float32."""
    usual = {"steps": STEPS, "tokens": 1, "learning_rate": 1e-3, "warmup": 2, "log_every": 1, "precision": "fp32"}
    saving = {"every": options.pop("every", 2), "dtype": "fp32"}
    lora = LoraConfig(rank=4) if options.get("method") == "lora" else None
    return TrainConfig(output, train=Training(**{**usual, **options}), save=Saving(**saving), lora=lora)


def linger(folder: Path) -> None:
    """Says which process this is, and stays, deaf to the SIGINT that torch sends orphans, as within a training step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def refuse(folder: Path) -> None:
    raise LanceError("no room")


def stop(folder: Path) -> None:
    raise KeyboardInterrupt


def count_signals(folder: Path) -> None:
    """Says every SIGINT of two seconds after the first one."""
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append("SIGINT"))
    time.sleep(1)  # until it is done with starting, the process that started this one knows of none to tell
    (folder / str(os.getpid())).touch()
    while not came:
        time.sleep(0.05)
    time.sleep(2)
    print("\n".join(came), flush=True)
    raise KeyboardInterrupt


def main(output: str, *given: str) -> None:
    pairs = (option.partition("=") for option in given)
    options = {name: int(value) if value.isdigit() else value for name, _, value in pairs}
    stop = options.pop("stop", 0)
    options["shard"] = bool(options.get("shard"))

    def on_step(step: int, values: dict[str, float]) -> None:
        print(step, flush=True)
        if step == stop:
            raise KeyboardInterrupt

    try:
        train(configuration(Path(output), **options), small_lance(), Handful(), on_step)
    except KeyboardInterrupt as stopped:
        print(stopped)


if __name__ == "__main__":
    for run in " ".join(sys.argv[1:]).split(" , "):
        main(*run.split())
