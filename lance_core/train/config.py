"""What a training run is told, as one TOML file: every key has a name here, and no other key is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..checks import check_number, check_seed, check_whole
from ..errors import LanceError
from ..flow import Sampling
from .needed import needed
from .objective import Objective

Part = Literal["understanding", "generation", "vision"]
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
# What a run's weights are and what they have seen: it cannot go on with others. The rest may change on the way.
ESSENTIALS = ("seed", "model", "lora", "objective", "data", "small_world")
ESSENTIAL_TRAINING = ("method", "optimizer", "parts", "tokens", "accumulate")


@dataclass(frozen=True)
class Model:
    """checkpoint: what `load_lance` takes, such as "models/lance/Lance_3B", or "nano"."""

    checkpoint: str = "nano"


@dataclass(frozen=True)
class Training:
    """How long, how fast and of what.

    method: "full" trains the weights themselves, "lora" small matrices beside them. steps: updates of the weights.
    tokens: of a batch of one process, of all its examples together; a single longer example makes a batch of its own.
    accumulate: batches per step. learning_rate: the highest, after `warmup` steps; with "cosine" it falls to
    min_learning_rate at the end. optimizer: "muon" for the layers' matrices, with AdamW for the rest. betas: AdamW's.
    weight_decay: of matrices. clip: of the gradient's norm; 0: none. ema: decay per step of the averaged weights, which
    are what is kept in the end; 0: none. precision: of the computation; "auto" is bf16 on CUDA and fp32 elsewhere.
    Trained weights are float32 always. checkpointing: layers are computed again in the backward pass instead of kept, a
    third slower for a fraction of the memory. parts: of the model, with "full". shard: several processes share the
    weights among them (FSDP2) instead of having all of them each. log_every: steps between two lines of the log.
    """

    method: Literal["full", "lora"] = "full"
    steps: int = 1000
    tokens: int = 4096
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.999
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpointing: bool = False
    parts: tuple[Part, ...] = ("understanding", "generation", "vision")
    shard: bool = False
    log_every: int = 10

    def __post_init__(self):
        for name in ("steps", "tokens", "accumulate", "log_every"):
            check_whole(f"train.{name}", getattr(self, name), 1)
        check_whole("train.warmup", self.warmup, 0)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip"):
            check_number(f"train.{name}", getattr(self, name), 0.0)
        for name, value in (("ema", self.ema), *(("betas", beta) for beta in self.betas)):
            check_number(f"train.{name}", value, 0.0, 1 - 1e-9)
        if self.min_learning_rate > self.learning_rate:
            raise LanceError("train.min_learning_rate is above train.learning_rate: make it smaller.")
        if self.min_learning_rate and self.schedule == "constant":
            raise LanceError('train.min_learning_rate is for train.schedule "cosine": leave it out, or choose that.')
        for name, hint in get_type_hints(Training).items():
            if get_origin(hint) is Literal:
                value_of(hint, getattr(self, name), f"train.{name}")
        if self.optimizer == "muon" and self.shard:
            raise LanceError('train.optimizer "muon" needs whole matrices: set train.shard = false, or choose "adamw".')
        if not self.parts:
            raise LanceError('train.parts is empty: name at least one of "understanding", "generation", "vision".')


@dataclass(frozen=True)
class Question:
    """A question about a picture or a clip, asked again with every set of samples."""

    media: str
    question: str


@dataclass(frozen=True)
class Samples:
    """Pictures painted, and questions answered, with the averaged weights every so many steps (0: never).

    They are written to `output/samples`. frames: 1 for pictures, 4k+1 for clips. The rest is as in `generate`.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    width: int = 768
    height: int = 768
    frames: int = 1
    steps: int = Sampling.steps
    guidance: float = Sampling.guidance
    shift: float = Sampling.shift
    seed: int = 42
    max_new_tokens: int = 64

    def __post_init__(self):
        check_whole("samples.every", self.every, 0)
        check_seed(self.seed)
        for name in ("width", "height"):
            check_whole(f"samples.{name}", getattr(self, name), 16)
            if getattr(self, name) % 16:
                raise LanceError(f"samples.{name} is {getattr(self, name)}: give a multiple of 16.")
        if self.frames < 1 or self.frames % 4 != 1:
            raise LanceError(f"samples.frames is {self.frames}: give 1, 5, 9, 13 ...")
        for name in ("steps", "max_new_tokens"):
            check_whole(f"samples.{name}", getattr(self, name), 1)
        try:
            Sampling(steps=self.steps, guidance=self.guidance, shift=self.shift)
        except LanceError as error:
            raise LanceError(f"samples: {error}") from None
        if self.every and not (self.prompts or self.questions):
            raise LanceError("samples.every is given but no samples.prompts or samples.questions: name what to make.")
        if (self.prompts or self.questions) and not self.every:
            raise LanceError("samples.prompts or samples.questions are given but no samples.every: say how often.")


@dataclass(frozen=True)
class Saving:
    """every: steps between two states from which the run can go on. keep: so many of the newest stay.

    dtype: of the checkpoint that a full training writes in the end.
    """

    every: int = 500
    keep: int = 2
    dtype: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self):
        check_whole("save.every", self.every, 1)
        check_whole("save.keep", self.keep, 1)


@dataclass(frozen=True)
class TrainConfig:
    """One run. output: its folder, for everything that it writes. seed: of everything random.

    data: a tuple of `data.DataConfig`. small_world: weight of the built-in small world among them; 0: not used.
    lora: a `lora.LoraConfig` where train.method is "lora".
    """

    output: Path
    seed: int = 0
    model: Model = Model()
    train: Training = field(default_factory=Training)  # its check needs what is defined below
    lora: Any = None
    objective: Objective = field(default_factory=Objective)
    data: tuple[Any, ...] = ()
    small_world: float = 0.0
    samples: Samples = Samples()
    save: Saving = Saving()

    def __post_init__(self):
        check_seed(self.seed)
        if self.lora is not None and self.train.method != "lora":
            raise LanceError('[lora] is given but train.method is "full": choose method = "lora", or leave [lora] out.')
        if self.train.method == "lora" and self.lora is None:
            raise LanceError('train.method is "lora" and [lora] is missing: add it.')
        if self.train.method == "lora" and self.train.parts != Training.parts:
            raise LanceError("train.parts is for whole models: leave it out, and choose lora.experts instead.")
        if self.train.shard and self.samples.every:
            raise LanceError(
                "samples cannot be made from sharded weights: set train.shard = false or samples.every = 0."
            )

    def essentials(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as flat JSON: `{"train.method": "full", ...}`."""
        values = {name: getattr(self, name) for name in ESSENTIALS}
        values["train"] = {name: getattr(self.train, name) for name in ESSENTIAL_TRAINING}
        values["ema"] = self.train.ema > 0
        return flat(values)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables and lists as one of plain values, by names with dots."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, (tuple, list)):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, Mapping):
        parts = (flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
        return {key: item for part in parts for key, item in part.items()}
    return {name: value if isinstance(value, (bool, int, float, str, NoneType)) else str(value)}


def read_config(path: str | Path) -> TrainConfig:
    """The run described by a TOML file; its paths are relative to where the command is started.

    Raises LanceError, naming the file and the key, for whatever is unknown, of the wrong type or contradictory.
    """
    path = Path(path)
    try:
        return config_from(_read_toml(path))
    except LanceError as error:
        raise LanceError(f"{path}: {error}") from None


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """The run described by the tables of such a file."""
    hints: dict[str, Any] = {"output": Path}
    values = dict(values)
    if "output" not in values:
        raise LanceError("there is no 'output': name the folder that the run writes to.")
    training = values.get("train")
    if isinstance(training, Mapping) and training.get("method") == "lora":
        values.setdefault("lora", {})
    if "lora" in values:
        from .lora import LoraConfig

        hints["lora"] = LoraConfig
    if "small_world" in values:
        raise LanceError("'small_world' is at the top of the file: write it into a table of its own, [[data]].")
    entries = values.pop("data", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LanceError("'data' is not a list of tables: begin each with [[data]].")
    named = {f"data[{index}]": entry for index, entry in enumerate(entries)}
    worlds = {place: entry for place, entry in named.items() if entry.get("small_world")}
    values["small_world"] = sum(read(World, entry, place).weight for place, entry in worlds.items())
    values["data"] = ()
    if len(worlds) < len(named):
        from .data import DataConfig

        values["data"] = tuple(read(DataConfig, entry, place) for place, entry in named.items() if place not in worlds)
    return read(TrainConfig, values, "", hints)


@dataclass(frozen=True)
class World:
    """A `[[data]]` entry that stands for the built-in small world."""

    small_world: bool = True
    weight: float = 1.0

    def __post_init__(self):
        check_number("data.weight", self.weight, 0.0)


def read(cls: type, table: Any, place: str, hints: Mapping[str, Any] | None = None) -> Any:
    """An instance of a dataclass from a TOML table; LanceError for what it does not know or cannot take.

    place: the table's name in messages. hints: types of fields instead of the annotated ones.
    """
    if not isinstance(table, Mapping):
        raise LanceError(f"'{place}' is not a table: begin it with [{place}].")
    hints = {**get_type_hints(cls), **(hints or {})}
    known = [entry.name for entry in fields(cls) if entry.init]
    where = f"[{place}]" if place else "the top of the file"
    for key in table:
        if key not in known:
            raise LanceError(f"{where} has no '{key}': it knows {', '.join(known)}.")
    for entry in fields(cls):
        if entry.init and entry.name not in table and entry.default is MISSING and entry.default_factory is MISSING:
            raise LanceError(f"{where} lacks '{entry.name}': add it.")
    return cls(**{key: value_of(hints[key], value, f"{place}.{key}" if place else key) for key, value in table.items()})


def value_of(hint: Any, value: Any, place: str) -> Any:
    """A TOML value as that type; raises LanceError where it is none."""
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return value if isinstance(value, hint) else read(hint, value, place)
    if origin is Literal:
        if value not in options:
            raise LanceError(f"{place} is {value!r}: choose one of {', '.join(map(repr, options))}.")
        return value
    if origin in (Union, UnionType):
        return _one_of(options, value, place)
    if origin in (tuple, list):
        return _items(options, value, place)
    right = {float: (int, float), Path: (str, Path)}.get(hint, hint)
    if not isinstance(value, right) or isinstance(value, bool) and hint is not bool:
        raise LanceError(f"{place} is {value!r}: give {KINDS.get(hint, hint)}.")
    return Path(value).expanduser() if hint is Path else hint(value)


def _one_of(options: tuple[Any, ...], value: Any, place: str) -> Any:
    if NoneType in options and value is None:
        return None
    problems = []
    for option in options:
        try:
            return value_of(option, value, place)
        except LanceError as error:
            problems.append(str(error).partition(": ")[2].rstrip("."))
    raise LanceError(f"{place} is {value!r}: {', or '.join(problems)}.")


def _items(options: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    endless = len(options) == 1 or options[-1] is Ellipsis
    if not isinstance(value, (list, tuple)) or not endless and len(value) != len(options):
        raise LanceError(f"{place} is {value!r}: give a list{'' if endless else f' of {len(options)}'}.")
    kinds = (options[0],) * len(value) if endless else options
    return tuple(value_of(kind, item, f"{place}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value)))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        with needed():
            import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LanceError(f"it cannot be read ({error.strerror}); check the name and the folder.") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise LanceError(f"it is not valid TOML ({str(error).rstrip('.')}); correct it.") from None
