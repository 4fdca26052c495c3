"""A guided step with both branches as one batch and in turn, on a CPU: `python benchmarks/branches.py`.

From this `stages.TOGETHER` is chosen. `gpu.py --branches` prints the same for the released model on a GPU.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median

import torch
from device import durations
from measuring import table
from workload import PROMPT, SIZES, both_branches, drawn, model

from lance_core import stages
from lance_core.checkpoint import COMPUTE_TYPES, Lance
from lance_core.sequence import Grid

GRIDS = ((1, 4, 4), (1, 8, 8), (1, 16, 16), (1, 32, 32), (1, 48, 48))


def together_or_in_turn(lance: Lance, grid: Grid, repeats: int) -> dict[str, float]:
    """Milliseconds of a guided step both ways, in turn; medians."""
    spans: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode(), lance.placement.use(*stages.PAINTING):
        sides = both_branches(lance, stages.Request("generate", PROMPT), grid)
        t, h, w = grid
        x, time = drawn(1, t * h * w, 48).to(lance.device), torch.ones(1, 1, device=lance.device)
        step = partial(lance.transformer.velocities, x, time, sides)
        for _ in range(repeats):
            for together, found in spans.items():
                found += durations(partial(step, together=together), 1, lance.device)
    both, turns = (1e3 * median(found) for found in spans.values())
    return {"together, ms": both, "in turn, ms": turns, "together / in turn": both / turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5, help="how often every time is taken (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["a", "b"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.sizes:
        lance = model(SIZES[name], COMPUTE_TYPES[options.dtype])
        print(f"{SIZES[name].layers} layers x {SIZES[name].hidden}, {options.dtype}; tokens of one branch")
        columns = {f"{h * w:,}": together_or_in_turn(lance, (1, h, w), options.repeats) for _, h, w in GRIDS}
        print(table(columns))


if __name__ == "__main__":
    main()
