"""A run as a file describes it: the model, the data, and the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Lance, load_lance, resolve_device
from ..errors import LanceError
from .config import TrainConfig, read_config
from .data import Mixture, open_data
from .examples import Examples
from .needed import needed
from .parallel import first, own_device
from .trainer import CACHE, Result, finished, train

OnProgress = Callable[[int, int, dict[str, float]], None]


def train_from(
    path: str | Path, on_step: OnProgress | None = None, *, fresh: bool = False, device: str = "auto"
) -> Result:
    """Trains as a TOML file says (see `config`); otherwise as `train`, but for on_step(step, steps, values).

    Of several processes one calls on_step.
    """
    with needed():
        import accelerate  # noqa: F401 (before anything is loaded)
    config = read_config(path)
    if not (config.data or config.small_world):
        raise LanceError(f"{path}: there is no data: add a [[data]] with a path, or with small_world = true.")
    lance = load_model(config, device)

    def told(step: int, values: dict[str, float]) -> None:
        if on_step is not None and first():
            on_step(step, config.train.steps, values)

    examples = () if finished(config) and not fresh else open_examples(config, lance)  # the data may be gone by then
    return train(config, lance, examples, told, fresh=fresh)


def plan_of(path: str | Path) -> str:
    """What the run of that file needs in memory, as a table."""
    from .plan import training_plan

    return training_plan(read_config(path))


def load_model(config: TrainConfig, device: str = "auto") -> Lance:
    """The model to train: in float32 with "full"; the frozen base of a LoRA in the precision of the computation."""
    chosen = resolve_device(own_device(device))
    dtype = "fp32" if config.train.method == "full" else config.train.precision
    if dtype == "auto" and chosen.type != "cuda":
        dtype = "fp32"
    return load_lance(config.model.checkpoint, device=chosen, dtype=dtype, memory=None)


def open_examples(config: TrainConfig, lance: Lance) -> Examples:
    """All data of the run together."""
    sources: list[Examples] = []
    weights: list[float] = []
    if config.data:
        sources.append(open_data(config.data, lance, seed=config.seed, cache=config.output / CACHE))
        weights.append(sum(entry.weight for entry in config.data))
    if config.small_world:
        from ..world.examples import SmallWorld

        sources.append(SmallWorld(lance, config.seed))
        weights.append(config.small_world)
    return sources[0] if len(sources) == 1 else Mixture(tuple(sources), tuple(weights), config.seed)
