"""What a checkpoint holds and what it lacks, without loading it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .checkpoint import (
    Contents,
    checked_tokenizer,
    checked_vae_config,
    language_problems,
    read_config,
    shards,
    sorted_contents,
    tensor_files,
    vision_problems,
)
from .config import TextConfig
from .errors import LanceError
from .layout import VAE_WEIGHTS, VISION_WEIGHTS, find_checkpoint, remedy, remedy_of
from .packing import stored_formats
from .storage import Stored, read_header


@dataclass(frozen=True)
class Inspection:
    """What a folder holds, from headers alone; `str()` makes a table of it."""

    folder: Path
    variant: str
    files: tuple[tuple[Path, int, str], ...]  # path, bytes, stored types
    formats: tuple[str, ...]  # of quantised weights
    parameters: Mapping[str, int]  # by part of the model
    position_rows: int | None
    tokens: int | None
    problems: tuple[str, ...]  # what is missing or wrong, a sentence each

    def __str__(self) -> str:
        root = self.folder.parent
        rows = [(os.path.relpath(path, root), f"{size / 1e6:,.1f} MB", types) for path, size, types in self.files]
        rows += [("", "", "")]
        rows += [(part, f"{count / 1e6:,.3f} M", "parameters") for part, count in self.parameters.items()]
        rows += [("total", f"{sum(self.parameters.values()) / 1e6:,.3f} M", "parameters"), ("", "", "")]
        if self.formats:
            rows.append(("quantised", ", ".join(self.formats), "weights"))
        if self.position_rows is not None:
            rows.append(("position table", f"{self.position_rows:,}", "rows"))
        if self.tokens is not None:
            rows.append(("tokenizer", f"{self.tokens:,}", "tokens"))
        left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"Lance, {self.variant} variant: {self.folder}", ""]
        lines += [f"{a:<{left}}  {b:>{middle}}  {c}".rstrip() for a, b, c in rows]
        lines += ["", *(self.problems or ("complete",))]
        return "\n".join(lines)


def inspect(path: str | Path) -> Inspection:
    """What the checkpoint at `path` holds and what it lacks, without loading it.

    Raises LanceError only where `find_checkpoint` does: a missing or damaged file is one of the problems.
    """
    files = find_checkpoint(path)
    problems: list[str] = []

    def attempt(step: Callable, default):
        try:
            return step()
        except LanceError as error:
            problems.append(str(error))
            return default

    parts = attempt(lambda: shards(files.language_model), [])
    headers = {
        path: attempt(lambda: read_header(path, remedy_of(files, path)), None) for path in tensor_files(files, parts)
    }
    readable = {path: header for path, header in headers.items() if header is not None}
    contents = sorted_contents(files, readable)
    config = attempt(lambda: read_config(files), None)
    if config and (files.language_model is None or parts and readable.keys() >= set(parts)):
        problems += attempt(lambda: list(language_problems(files, contents, config)), [])
    formats = attempt(lambda: stored_formats(contents.language), {})
    if config:
        problems += attempt(lambda: list(vision_problems(files, contents, config)), [])
    attempt(lambda: checked_vae_config(contents), None)
    tokenizer = attempt(lambda: checked_tokenizer(files, config.text if config else TextConfig()), None)
    if not files.llm_config:
        problems.append(f"{files.folder / 'llm_config.json'} is missing; {remedy(files, 'llm_config.json')}.")
    if not files.vision and not contents.vision:
        problems.append(f"The vision tower is missing: Lance cannot see; {remedy(files, VISION_WEIGHTS)}.")
    if not files.vae and not contents.vae:
        problems.append(f"The VAE is missing: Lance cannot read or make pictures; {remedy(files, VAE_WEIGHTS)}.")
    return Inspection(
        folder=files.folder,
        variant=files.variant,
        files=tuple((file, _size(file), _types(header)) for file, header in headers.items()),
        formats=tuple(sorted(set(formats.values()))),
        parameters=_count(contents, formats),
        position_rows=contents.position_table.shape[0] if contents.position_table else None,
        tokens=len(tokenizer) if tokenizer else None,
        problems=tuple(dict.fromkeys(problems)),
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _types(header: Mapping[str, Stored] | None) -> str:
    return "unreadable" if header is None else ", ".join(sorted({stored.dtype for stored in header.values()}))


def _count(contents: Contents, formats: Mapping[str, str]) -> dict[str, int]:
    """Parameters by part of the model; formats: of quantised layers.

    Scales and markers are none; inputs that fill up a group of four-bit weights are.
    """
    parts = dict.fromkeys(("embeddings", "understanding expert", "generation expert", "lm_head", "connectors"), 0)
    for name, stored in contents.language.items():
        layer, _, part = name.rpartition(".")
        if layer not in formats or part in ("weight", "bias"):
            packed = part == "weight" and formats.get(layer) in ("int4", "nf4")  # two in a byte
            parts[_part(name)] += prod(stored.shape) * (2 if packed else 1)
    parts["vision tower"] = sum(prod(stored.shape) for stored in contents.vision.values())
    parts["VAE"] = sum(prod(stored.shape) for stored in contents.vae.values())
    return parts


def _part(name: str) -> str:
    if not name.startswith("language_model."):
        return "connectors"
    if "embed_tokens" in name:
        return "embeddings"
    if "lm_head" in name:
        return "lm_head"
    return "generation expert" if "_moe_gen" in name else "understanding expert"
