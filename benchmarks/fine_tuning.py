"""What the built-in model learns, and forgets, by a LoRA: `python benchmarks/fine_tuning.py [--new heart] [--steps N]`.

The recipe of docs/fine_tuning.md: writes the data, trains the LoRA as docs/orange.toml says, and measures the model
without it and with it as benchmarks/nano.py does: on scenes that show what is new, of combinations held out from the
data, and on the old ones.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from measuring import markdown, seconds, told
from tqdm import tqdm

from lance_core.adapters import apply_loras
from lance_core.checkpoint import Lance
from lance_core.flow import Sampling
from lance_core.train.command import load_model, open_examples
from lance_core.train.config import TrainConfig, read_config
from lance_core.train.result import LORA
from lance_core.train.trainer import finished, train
from lance_core.world import accuracy
from lance_core.world.accuracy import Cases
from lance_core.world.files import make_world
from lance_core.world.scene import NEW_COLOURS, NEW_SHAPES, Vocabulary, with_new
from lance_core.world.shares import Mean, Share

RECIPE = Path(__file__).resolve().parent.parent / "docs/orange.toml"
MEASUREMENTS = {
    "painted": (accuracy.generation, "shape, colour and position"),
    "answered": (accuracy.questions, "answers"),
    "edited": (accuracy.edits, "right, and the rest unchanged"),
}


def recipe(folder: Path, steps: int | None = None) -> TrainConfig:
    """The run of docs/orange.toml, which reads `folder/data` and writes `folder/run`. steps: another number of them."""
    config = read_config(RECIPE)
    data = tuple(replace(entry, path=folder / "data") for entry in config.data)
    training = config.train if steps is None else replace(config.train, steps=steps)
    return replace(config, output=folder / "run", data=data, train=training)


def fine_tuned(config: TrainConfig) -> Path:
    """The LoRA's file, trained now or by an earlier run of the same folder."""
    lance = load_model(config, "cpu")
    with tqdm(desc="train", total=config.train.steps, disable=None, leave=False) as bar:
        return train(config, lance, open_examples(config, lance), lambda step, _: bar.update(step - bar.n)).path


def measured(lance: Lance, new: str, count: int, steps: int) -> dict[str, Share | Mean]:
    """How much is right of scenes that show what is new, and of the old ones."""
    found: dict[str, Share | Mean] = {}
    for world, vocabulary in ((new, with_new(new)), ("old", Vocabulary())):
        for name, (measure, row) in MEASUREMENTS.items():
            sampling = {} if measure is accuracy.questions else {"steps": steps}
            results = measure(lance, Cases(count, vocabulary=vocabulary), **sampling)
            found[f"{world}: {name}"] = results[row]
            if about := results.get(f"about {new}"):
                found[f"{world}: answered, of questions with that word"] = about
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", choices=(*NEW_COLOURS, *NEW_SHAPES), default="orange", help="default: orange")
    parser.add_argument("--steps", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--records", type=int, default=1000, help="of the data (default: 1000)")
    parser.add_argument("--count", type=int, default=100, help="cases of every measurement (default: 100)")
    parser.add_argument("--sampling-steps", type=int, default=Sampling.steps)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for data, states and LoRA; used again if it is there")
    args = parser.parse_args()
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, args.new)
        config = recipe(folder, args.steps)
        if not (folder / "data").exists():
            make_world(folder / "data", count=args.records, vocabulary=with_new(args.new))
        title = f"{config.train.steps} steps"
        if finished(config):
            fine_tuned(config)
        else:
            title += f" in {seconds(lambda: fine_tuned(config)):.0f} s"
        base = load_model(config, "cpu")
        tuned = apply_loras(base, [(config.output / LORA, 1.0)])
        with torch.inference_mode():
            before, after = (measured(lance, args.new, args.count, args.sampling_steps) for lance in (base, tuned))
    print(markdown(title, {name: {"before": value, "after": after[name]} for name, value in before.items()}))


if __name__ == "__main__":
    told(main)
