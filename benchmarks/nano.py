"""How often a model is right in the small world: `python benchmarks/nano.py [--checkpoint PATH] [--count N]`.

The built-in model is measured unless another one is given, on scenes held out from its training, by a judge that reads
pixels (`lance_core/world/judge.py`). Shares stand with their 95 % interval (Wilson), means with the least value.

--ablate paints the same captions and edits with other settings, one changed at a time, instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from measuring import markdown, told
from tqdm import tqdm

from lance_core.checkpoint import Lance, load_lance
from lance_core.flow import RENORMS, Sampling
from lance_core.layout import BUILT_IN_FOLDER
from lance_core.world import accuracy
from lance_core.world.accuracy import Cases, OnCase
from lance_core.world.shares import Results

MEASUREMENTS: dict[str, Callable[..., Results]] = {
    "generation": accuracy.generation,
    "questions": accuracy.questions,
    "edits": accuracy.edits,
    "clips": accuracy.clips,
    "clips from pictures": accuracy.clips_from_pictures,
    "clip edits": accuracy.clip_edits,
    "reconstruction": accuracy.reconstruction,
}
UNSAMPLED = ("questions", "reconstruction")
TARGETS = {
    "generation": {"shape, colour and position": "90 %"},
    "questions": {"answers": "95 %"},
    "edits": {"right, and the rest unchanged": "85 %", "PSNR outside, dB": "30"},
    "clips": {"direction": "85 %"},
    "clips from pictures": {"direction": "85 %"},
    "reconstruction": {"pictures, dB": "32", "clips, dB": "32"},
}
ABLATED = {
    "guidance": (1.0, 2.0, 4.0, 6.0),
    "shift": (1.0, 2.0, 3.5, 6.0),
    "steps": (4, 8, 15, 30, 50),
    "renorm": RENORMS,
}
OFFICIAL = {name: getattr(Sampling(), name) for name in ABLATED}


def rows(found: Results, targets: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Cells of a table by the names of its rows."""
    return {name: {"found": value, "of": value.count, "target": targets.get(name, "")} for name, value in found.items()}


def measured(lance: Lance, name: str, count: int, seed: int, sampling: Mapping[str, object]) -> Results:
    options = {} if name in UNSAMPLED else sampling
    with progress(name) as report:
        return MEASUREMENTS[name](lance, Cases(count, seed, progress=report), **options)


def ablations() -> dict[str, dict[str, object]]:
    """Settings by the names of their rows: the official ones, and these with one changed."""
    ways = {f"official ({', '.join(f'{name} {value}' for name, value in OFFICIAL.items())})": OFFICIAL}
    for name, values in ABLATED.items():
        ways |= {f"{name} {value}": OFFICIAL | {name: value} for value in values if value != OFFICIAL[name]}
    return ways


def ablated(lance: Lance, count: int, seed: int) -> dict[str, dict[str, object]]:
    found = {}
    for way, sampling in ablations().items():
        pictures = measured(lance, "generation", count, seed, sampling)["shape, colour and position"]
        edits = measured(lance, "edits", count, seed, sampling)
        found[way] = {
            "pictures": pictures,
            "edits": edits["right"],
            "edits, the rest unchanged": edits["right, and the rest unchanged"],
        }
    return found


@contextmanager
def progress(name: str) -> Iterator[OnCase]:
    """Inside, what shows on a terminal how many cases are done."""
    with tqdm(desc=name, disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=BUILT_IN_FOLDER, help="default: the built-in model")
    parser.add_argument("--count", type=int, default=200, help="cases of every measurement (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0)")
    parser.add_argument("--only", nargs="+", choices=tuple(MEASUREMENTS), default=tuple(MEASUREMENTS))
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ablate", action="store_true", help="other guidance, shift, steps and renorm instead")
    args = parser.parse_args()
    lance = load_lance(args.checkpoint, device=args.device, dtype=args.dtype)
    with torch.inference_mode():
        if args.ablate:
            print(markdown(f"right of {args.count}", ablated(lance, args.count, args.seed)))
            return
        for name in args.only:
            found = measured(lance, name, args.count, args.seed, {"steps": args.steps})
            print(markdown(name, rows(found, TARGETS.get(name, {}))), end="\n\n", flush=True)


if __name__ == "__main__":
    told(main)
