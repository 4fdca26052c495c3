"""A checkpoint written again with other tensors, one by one: memory is needed for one of them at a time."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import MODEL_PREFIX, examine, shards
from .errors import LanceError
from .layout import (
    LANGUAGE_FOLDERS,
    VAE_WEIGHTS,
    VISION_CONFIG,
    VISION_WEIGHTS,
    WEIGHTS,
    CheckpointFiles,
    find_checkpoint,
    remedy_of,
)
from .packing import stored_formats
from .saving import check_replaceable, replacing_folder
from .storage import FILE_TYPES, STORED_TYPES, Stored, pieces, read_header, reading

BESIDE = (  # files of the language model's folder other than its weights
    *("llm_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass(frozen=True)
class Rewritten:
    """What `rewrite_checkpoint` wrote, and the bytes of the checkpoint before and after."""

    folder: Path
    before: int
    after: int


Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # stored type and shape of tensors, by name
NewTensors = Iterable[tuple[str, Iterable[Tensor]]]  # by name, in pieces that are used before the next one is asked for
Rewrite = Callable[[Mapping[str, Stored]], tuple[Entries, NewTensors]]


def rewrite_checkpoint(source: str | Path, folder: str | Path, rewrite: Rewrite, overwrite: bool = False) -> Rewritten:
    """Writes the checkpoint at `source` (see `find_checkpoint`) into `folder`; its other files are copied.

    rewrite: what is written instead of the tensors of the language model's files. The folder has the release's layout
    and appears complete or not at all. Raises LanceError for a checkpoint that cannot be loaded or is quantised, a
    folder that holds something (with `overwrite`: more than a checkpoint) or the source itself, and a disk with too
    little room.
    """
    files, folder = find_checkpoint(source), Path(folder).expanduser()
    _, contents, _ = examine(files)
    if stored_formats(contents.language):
        raise LanceError(f"{files.language_model} is quantised already; give the checkpoint that it was made from.")
    parts = shards(files.language_model)
    copies = _copies(files)
    _check_apart(Path(source).expanduser(), [*parts, *copies], folder)
    check_replaceable(folder, overwrite)

    headers = (read_header(part, remedy_of(files, part)) for part in parts)
    entries, tensors = rewrite({name.removeprefix(MODEL_PREFIX): e for header in headers for name, e in header.items()})
    before, same = (sum(path.stat().st_size for path in paths) for paths in ([*parts, *copies], copies))
    _check_room(folder, same + sum(_size(entry) for entry in entries.values()))
    with replacing_folder(folder, overwrite) as fresh:
        language = fresh / LANGUAGE_FOLDERS[files.variant]
        language.mkdir(parents=True)
        write_tensors(language / WEIGHTS, entries, tensors)
        for path, name in copies.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, fresh / name)
    return Rewritten(folder, before, same + (folder / LANGUAGE_FOLDERS[files.variant] / WEIGHTS).stat().st_size)


def _copies(files: CheckpointFiles) -> dict[Path, str]:
    """The files that are copied, and their names in the new folder."""
    own = {files.folder / name: f"{LANGUAGE_FOLDERS[files.variant]}/{name}" for name in BESIDE}
    vae = VAE_WEIGHTS if files.vae is None or files.vae.suffix == ".pth" else "Wan2.2_VAE.safetensors"
    shared = {files.vision: VISION_WEIGHTS, files.vision_config: VISION_CONFIG, files.vae: vae}
    return {path: name for path, name in (own | shared).items() if path is not None and path.is_file()}


def _check_apart(source: Path, paths: Iterable[Path], folder: Path) -> None:
    """Refuses a folder inside the source, or one whose replacement would remove files of the source."""
    target, origin = folder.resolve(), source.resolve()
    inside = origin.is_dir() and (target == origin or origin in target.parents)
    if inside or any(target in path.resolve().parents for path in paths):
        raise LanceError(f"{folder} is where the checkpoint itself is; name a folder apart from {source}.")


def _check_room(folder: Path, size: int) -> None:
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < size:
        raise LanceError(
            f"{folder} needs {size / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; free some, or name a folder"
            " on another disk."
        )


def converted(stored: Stored, dtype: torch.dtype) -> Iterator[Tensor]:
    """A stored tensor in that dtype, in flat pieces."""
    with reading(stored.file) as file:
        for piece in pieces(file, stored):
            yield piece.to(dtype)


def kept_type(stored: Stored) -> str:
    """The type in which a tensor that stays as it is, or nearly, is written."""
    return stored.dtype if stored.dtype in STORED_TYPES else "BF16"  # bf16: what GGUF has in fewer bits


def write_tensors(path: Path, entries: Entries, tensors: NewTensors) -> None:
    """Writes a safetensors file from tensors that come in any order, each in pieces."""
    header, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: (-FILE_TYPES[item[1][0]].itemsize, item[0])):
        offsets[name], end = end, end + _size(entry)
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every number lies where its type needs it
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, parts in tensors:
            file.seek(8 + len(text) + offsets[name])
            for piece in parts:
                file.write(piece.contiguous().view(torch.uint8).numpy())


def _size(entry: tuple[str, tuple[int, ...]]) -> int:
    type, shape = entry
    return prod(shape) * FILE_TYPES[type].itemsize
