"""What shortcuts save and what they cost: `python benchmarks/shortcuts.py [--checkpoint PATH] [--accuracy COUNT]`.

Every row paints the same picture or clip from the same noise. Passes are branches computed; the speed-up is of a whole
request's seconds, prefill included, to the exact one's; the error is the relative L2 error of the latent against the
exact one's, and PSNR that of the decoded pixels. Two rows, for comparison, save passes in ways that need no shortcut:
fewer steps, and a narrower guidance interval.

Without a checkpoint the weights are random, with the statistics of `quality.py`. They tell passes of guidance, seconds
and ratios. Errors and the passes of a threshold depend on how straight a model paints, which training decides: take
them from a real checkpoint only. What is near in numbers may still look different, and the other way round:
--accuracy counts, as in `quality.py`, what is right of so many pictures and edits of the small world.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from device import Clock
from measuring import table, told
from quality import error, random_model, right, usual_side
from torch import Tensor
from workload import PROMPT

from lance_core import stages
from lance_core.checkpoint import Lance, load_lance
from lance_core.world.judge import psnr


@dataclass(frozen=True)
class Painted:
    latent: Tensor  # [1, 48, T, h, w]
    pixels: Tensor  # [F, H, W, 3]
    passes: int
    seconds: float  # of the latent alone


def settings(steps: int) -> dict[str, dict[str, object]]:
    """Options of `generate`, by the names of their rows."""
    return {
        "exact": {},
        "guidance every 2": {"guidance_every": 2},
        "guidance every 3": {"guidance_every": 3},
        "guidance every 4": {"guidance_every": 4},
        "threshold 0.02": {"cache_threshold": 0.02},
        "threshold 0.05": {"cache_threshold": 0.05},
        "threshold 0.1": {"cache_threshold": 0.1},
        "threshold 0.2": {"cache_threshold": 0.2},
        "every 2, threshold 0.1": {"guidance_every": 2, "cache_threshold": 0.1},
        "half the steps": {"steps": max(1, steps // 2)},
        "guidance above 0.83": {"guidance_interval": (0.83, 1.0)},  # of 30 steps as many passes as with every 2
    }


def painted(lance: Lance, options: Mapping[str, object]) -> Painted:
    passes = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal passes
        passes += len(output)  # one row of the batch for each branch

    hook = lance.transformer.llm2vae.register_forward_hook(count)
    clock = Clock(lance.device)
    try:
        clock.mark()
        latent = stages.generate(lance, PROMPT, **options)
        clock.mark()
    finally:
        hook.remove()
    (seconds,) = clock.spans()
    return Painted(latent, stages.decode_video(lance, latent), passes, seconds)


def columns(lance: Lance, options: Mapping[str, object], repeats: int, count: int) -> dict[str, dict[str, object]]:
    """All settings in turn, as often as repeats says; medians of seconds. count: cases of the small world."""
    changes = settings(options["steps"])
    ways = {name: {**options, **own} for name, own in changes.items()}
    painted(lance, ways["exact"])  # warms up
    runs = [{name: painted(lance, way) for name, way in ways.items()} for _ in range(repeats)]
    results = runs[0]
    exact = results["exact"]
    seconds = {name: median(run[name].seconds for run in runs) for name in ways}
    counted = {name: right(lance, count, **{"steps": options["steps"], **own}) for name, own in changes.items()}
    return {
        "passes": {name: own.passes for name, own in results.items()},
        "seconds": seconds,
        "times faster": {name: seconds["exact"] / span for name, span in seconds.items()},
        "error": {name: error(own.latent, exact.latent) for name, own in results.items()},
        "PSNR, dB": {name: psnr(own.pixels, exact.pixels) for name, own in results.items()},
        **{title: {name: row[title] for name, row in counted.items()} for title in counted["exact"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a real one instead of random weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="of a checkpoint; random weights are on the CPU")
    parser.add_argument("--width", type=int, help="default: 256, or less where the model knows smaller pictures")
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=stages.SEED)
    parser.add_argument("--repeats", type=int, default=3, help="how often every time is taken (default: 3)")
    parser.add_argument("--accuracy", type=int, default=0, metavar="COUNT", help="also count what is right, of so many")
    args = parser.parse_args()
    with torch.no_grad():
        if args.checkpoint:
            lance = load_lance(args.checkpoint, device=args.device, dtype=args.dtype)
        else:
            lance = random_model("auto", args.dtype)
        sides = {name: getattr(args, name) or usual_side(lance) for name in ("width", "height")}
        options = sides | {name: getattr(args, name) for name in ("frames", "steps", "seed")}
        print(table(columns(lance, options, args.repeats, args.accuracy)))


if __name__ == "__main__":
    told(main)
