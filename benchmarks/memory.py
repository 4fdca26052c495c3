"""What the released model needs in device memory, by task and budget: `python benchmarks/memory.py`.

Weights are bytes of their tensors. Working memory is what `lance_core.memory` says beforehand; with --count it is
counted beside that in a run of the whole code, all layers and all frames, without data on the meta device (a minute).
--training: what training a LoRA takes instead, the table of docs/lora.md.
Nothing here runs on a GPU: the libraries' workspaces and the allocator's rounding are not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import measuring
import torch
from released import Form

from lance_core import memory
from lance_core.checkpoint import Lance
from lance_core.errors import LanceError
from lance_core.needs import Job, Phase, needs, plan
from lance_core.placement import GIB, model_parts
from lance_core.quantized import quantize_model
from lance_core.tiny import tokenizer_specification
from lance_core.tokenizer import Tokenizer
from lance_core.train.config import TrainConfig, Training
from lance_core.train.lora import LoraConfig
from lance_core.train.plan import training_needs
from lance_core.transformer import LanceTransformer
from lance_core.vae import VAEConfig, WanVAE
from lance_core.vit import VisionTower

JOBS = {
    "text to image 768x768": Job("generate", 768, 768),
    "image edit 768x768": Job("edit", 768, 768, references=1),
    "text to video 848x480, 49 frames": Job("generate", 848, 480, 49),
    "text to video 848x480, 121 frames": Job("generate", 848, 480, 121),
    "image to video 848x480, 121 frames": Job("generate", 848, 480, 121, references=1),
    "video edit 848x480, 49 frames": Job("edit", 848, 480, 49, references=1),
    "question about a 768 picture": Job("understand", 768, 768, references=1),
}
BUDGETS = (6.1, 8.0, 11.5, 13.0, 24.0)
FORMATS = (None, "int8", "nf4")
LORAS = ((None, True, 4096), (None, True, 16384), (None, False, 4096), ("int8", True, 4096), ("nf4", True, 4096))


def empty_model(format: str | None = None) -> Lance:
    """The released model without data, in bfloat16 or with a format of quantised weights."""
    config, empty = Form(torch.device("meta")).config, {"dtype": torch.bfloat16, "device": "meta"}
    transformer = LanceTransformer(config.text, **empty)
    if format:
        quantize_model(transformer, format)
    parts = transformer, VisionTower(config.vision, **empty), WanVAE(VAEConfig(), **empty)
    tokenizer = Tokenizer(tokenizer_specification())
    return Lance(config, *parts, tokenizer, torch.device("meta"), torch.bfloat16)


def fitted(lance: Lance, phases: list[Phase], budget: float) -> dict[str, object]:
    """A row: what the phases of a request take with so many GiB, the hungriest last; '-' where they do not fit."""
    parts = model_parts(lance.transformer, lance.vision, lance.vae, present=False)
    try:
        plans = [(plan(parts, phase, int(budget * GIB)), phase) for phase in phases]
    except LanceError:
        return {}
    main, phase = max(plans, key=lambda pair: len(pair[1].parts))
    return {
        "weights": main.resident / GIB,
        "streamed per step": main.streamed / GIB,
        "K and V": phase.context / GIB,
        "working": phase.working / GIB,
        "peak": max(plan.peak for plan, _ in plans) / GIB,
    }


def counted(lance: Lance, job: Job) -> list[Phase]:
    """The phases with every layer and every frame run."""
    with patch.object(memory, "STEADY_LAYERS", 10**6), patch.object(memory, "STEADY_FRAMES", 10**6):
        return list(needs(lance, job))


def rows(formats: tuple[str | None, ...]) -> Iterator[tuple[str, dict[str, object]]]:
    for format in formats:
        lance = empty_model(format)
        for name, job in JOBS.items():
            phases = list(needs(lance, job))
            for budget in BUDGETS:
                row = fitted(lance, phases, budget)
                yield f"{name}, {format or 'bf16'}, {budget:g} GiB", row
                if row and not row["streamed per step"]:
                    break  # more memory changes nothing


def training_rows() -> Iterator[tuple[str, float]]:
    for format, checkpointing, tokens in LORAS:
        training = Training(method="lora", checkpointing=checkpointing, tokens=tokens)
        config = TrainConfig(Path("run"), train=training, lora=LoraConfig())
        again = "checkpointing" if checkpointing else "no checkpointing"
        yield f"{format or 'bf16'}, {again}, {tokens:,} tokens", training_needs(config, empty_model(format)).total / GIB


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", action="store_true", help="run all layers and frames, to check the estimates")
    options.add_argument("--training", action="store_true", help="what training a LoRA takes, instead")
    asked = options.parse_args()
    if asked.training:
        print(measuring.table({"GiB": dict(training_rows())}))
        return
    if asked.count:
        lance, columns = empty_model(), {"estimated": {}, "counted": {}}
        for name, job in JOBS.items():
            for column, phases in zip(columns.values(), (needs(lance, job), counted(lance, job))):
                column.update({f"{name}, {phase.name}": phase.working / GIB for phase in phases})
        print(measuring.table(columns))
        return
    found = dict(rows(FORMATS))
    titles = list(next(row for row in found.values() if row))
    print("GiB of device memory")
    print(measuring.table({t: {name: row.get(t, "-") for name, row in found.items()} for t in titles}))


if __name__ == "__main__":
    main()
