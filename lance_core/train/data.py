"""From data sets to examples: which record comes when, and what the model sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from torch import Tensor

from .. import stages
from ..checkpoint import Lance
from ..checks import MAX_FRAMES, check_grid, check_number, check_seed, warn
from ..config import VIDEO_FPS
from ..errors import LanceError
from ..media import MAX_SECONDS
from ..prompts import Kind
from ..request import check_length
from ..resize import RESOLUTION_CHOICES, resolution_of
from ..sequence import build
from ..vae import normalize
from ..vit import normalize_pixels
from .examples import Example, Examples
from .latents import LatentCache, fingerprint, latent_key
from .records import Media, Record, Records, content_of, frames_of, open_records

SLOTS = 1000  # examples in a row of which every data set has its share


@dataclass(frozen=True)
class DataConfig:
    """A data set and how it is used.

    path: a JSONL or Parquet file, or a folder of them or of captioned media. weight: its share of the examples,
    relative to the others'. resolution: one of `RESOLUTION_CHOICES`, as where the model is used. max_seconds: what a
    clip is sampled as if it lasted no longer. first_frame: the share of clips to be painted that begin with a given
    frame (image to video), beside those that say so themselves.
    """

    path: Path
    weight: float = 1.0
    resolution: str = "auto"
    max_seconds: float = MAX_SECONDS
    first_frame: float = 0.0

    def __post_init__(self):
        check_number("data.weight", self.weight, 0.001)
        check_number("data.max_seconds", self.max_seconds, 0.1, MAX_FRAMES / VIDEO_FPS)
        check_number("data.first_frame", self.first_frame, 0.0, 1.0)
        if self.resolution not in RESOLUTION_CHOICES:
            raise LanceError(f"data.resolution is {self.resolution!r}: give one of {', '.join(RESOLUTION_CHOICES)}.")


def open_data(configs: Sequence[DataConfig], lance: Lance, *, seed: int, cache: str | Path | None = None) -> Examples:
    """Examples of all data sets together, endless: the same for the same index, seed and files.

    cache: a folder in which latents are kept. What is wrong with a record is told once as a LanceWarning, and the
    example is None. Raises LanceError where a data set is missing or has no good record at all.
    """
    check_seed(seed)
    if not configs:
        raise LanceError("there is no data: name at least one data set.")
    encoder = Encoder(lance, LatentCache(Path(cache).expanduser()) if cache else None)
    sets = [(config, open_records(config.path)) for config in configs]
    for config, records in sets:
        _check_any(config, records, encoder)
    sources = (DataSet(*found, encoder, f"{seed} {number}") for number, found in enumerate(sets))
    return Mixture(tuple(sources), tuple(config.weight for config in configs), seed)


@dataclass(frozen=True, eq=False)
class Encoder:
    """Makes examples of records, as the stages would show the same media to the model."""

    lance: Lance
    cache: LatentCache | None = None
    vae: str = field(init=False, repr=False)

    def __post_init__(self):
        known = self.cache is not None and self.lance.vae is not None
        object.__setattr__(self, "vae", fingerprint(self.lance.vae) if known else "")

    def example(self, record: Record, config: DataConfig, first_frame: bool = False) -> Example:
        """first_frame: as in `Record`, for records that do not say. Raises LanceError for a bad record."""
        looked = [frames_of(media, config.max_seconds) for media in record.references]
        kind = "video" if "video" in {kind for _, kind in looked} else "image"
        record = record.settled(kind)
        self.check_length(record, kind)
        target = None if record.target is None else self.latent(record.target, config)
        is_clip = target is not None and target.shape[1] > 1
        if record.first_frame and not is_clip:
            raise LanceError("first_frame is for clips, but the target is one picture; leave it out.")
        return Example(
            task=record.task,
            text=record.text,
            answer=record.answer,
            system=record.system,
            kind=kind,
            pixels=tuple(self.pixels(frames, config) for frames, _ in looked),
            latents=() if target is None else self.latents(record, looked, config),
            target=target,
            first_frame=is_clip and (record.first_frame or first_frame and record.task == "generate"),
        )

    def pixels(self, frames: Tensor, config: DataConfig) -> Tensor:
        """Normalised pixels `[3, F', H, W]` as the vision tower takes them."""
        frames = stages.semantic_frames(self.lance.config, frames, resolution_of(config.resolution))
        return normalize_pixels(frames)

    def latents(self, record: Record, looked: Sequence[tuple[Tensor, Kind]], config: DataConfig) -> tuple[Tensor, ...]:
        return tuple(self.latent(media, config, frames) for media, (frames, _) in zip(record.references, looked))

    def latent(self, media: Media, config: DataConfig, frames: Tensor | None = None) -> Tensor:
        """The normalised latent `[48, T, h, w]`, float32; frames: of the medium, where they have been read."""

        def make() -> Tensor:
            seen = frames_of(media, config.max_seconds)[0] if frames is None else frames
            latent = stages.encode_latent(self.lance, seen, resolution=resolution_of(config.resolution))
            check_grid(*latent.shape[2:])
            return normalize(latent)[0].contiguous()

        if self.cache is None:
            return make()
        sizes = self.lance.config.resolutions if config.resolution == "auto" else config.resolution
        key = latent_key(content_of(media), self.vae, self.lance.dtype, sizes, config.max_seconds)
        return self.cache.get(key, make)

    def check_length(self, record: Record, kind: Kind) -> None:
        """Raises LanceError for texts that are too long for the model; visual blocks do not count."""
        seen = [(1, 1, 1)] * len(record.references)
        paints = record.target is not None
        sequence = build(
            self.lance.tokenizer,
            record.task,
            kind,
            record.text,
            semantics=seen,
            latents=seen if paints else (),
            target=(1, 1, 1) if paints else None,
            system=record.system,
            answer=record.answer,
        )
        check_length(sequence)


class DataSet:
    """The examples of a data set, endless: shuffled anew whenever all of it has been seen."""

    def __init__(self, config: DataConfig, records: Records, encoder: Encoder, seed: str):
        self.config, self.records, self.encoder, self.seed = config, records, encoder, seed
        self.told: set[str] = set()  # places of bad records that were named
        self.held = -1, np.empty(0)  # an epoch and its order

    def __getitem__(self, index: int) -> Example | None:
        record = self.record(index)
        first_frame = Random(f"first frame {self.seed} {index}").random() < self.config.first_frame
        try:
            return self.encoder.example(self.records[record], self.config, first_frame)
        except LanceError as error:
            self.tell(self.records.place(record), error)
            return None

    def record(self, index: int) -> int:
        """The number of the record that an example is made of."""
        epoch, place = divmod(index, len(self.records))
        held = self.held
        if held[0] != epoch:
            held = self.held = epoch, _order(self.records.blocks, f"{self.seed} {epoch}")
        return int(held[1][place])

    def tell(self, place: str, error: LanceError) -> None:
        if place not in self.told:
            self.told.add(place)
            warn(f"{place} is left out: {error}")


@dataclass(frozen=True, eq=False)
class Mixture:
    """Examples of several sources, each as often as its weight says, and each in its own order."""

    sources: tuple[Examples, ...]
    weights: tuple[float, ...]
    seed: int

    def __getitem__(self, index: int) -> Example | None:
        number, turn = turn_of(index, self.weights, self.seed)
        return self.sources[number][turn]


def turn_of(index: int, weights: tuple[float, ...], seed: int) -> tuple[int, int]:
    """Which of several sources an example is from, and how many before it were from there too."""
    if index < 0:
        raise IndexError(index)
    slots, counts, before = _slots(weights, seed)
    period, slot = divmod(index, SLOTS)
    return int(slots[slot]), int(period * counts[slots[slot]] + before[slot])


@lru_cache(maxsize=4)
def _slots(weights: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For SLOTS examples in a row: the data set of each, how many each set has, and how many of a slot's come before.

    Every set has its share to the nearest whole number, and one at least.
    """
    ends = np.cumsum(weights) / sum(weights) * (SLOTS - len(weights))
    counts = np.diff(np.round(ends), prepend=0).astype(int) + 1
    slots = np.repeat(np.arange(len(weights)), counts).tolist()
    Random(f"slots {seed}").shuffle(slots)
    seen, before = [0] * len(weights), []
    for number in slots:
        before.append(seen[number])
        seen[number] += 1
    return np.array(slots), counts, np.array(before)


def _order(blocks: Sequence[range], seed: str) -> np.ndarray:
    """All numbers of the blocks: the blocks in random order, and the numbers of each, as reading one after the other is
    what large files allow."""
    random = Random(seed)
    shuffled = random.sample(blocks, len(blocks))
    return np.array([number for block in shuffled for number in random.sample(block, len(block))])


def _check_any(config: DataConfig, records: Records, encoder: Encoder) -> None:
    """Raises LanceError where no record of a data set makes an example."""
    first = None
    for index in range(len(records)):
        try:
            encoder.example(records[index], config)
            return
        except LanceError as error:
            first = first or f"{records.place(index)}: {error}"
    if first is None:
        raise LanceError(f"the data {config.path} holds no records; add some, or name another file or folder.")
    raise LanceError(f"no record of the data {config.path} can be used; the first is {first}")
