"""Tensors in files: what a header says of them, and reading them piece by piece to where they belong.

Nothing is memory-mapped as a whole: the mapped pages of a 28 GB file would count as this process's memory.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import LanceError
from .layout import REPOSITORY, VAE_WEIGHTS

STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 2**23  # elements that are read at once: 32 MB of float32
MAPPED = 2**28  # bytes of a `.pth` that are mapped before its pages are given back


class Stored(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    file: Path
    name: str
    dtype: str  # "F32", "BF16", "F16": the names of safetensors
    shape: tuple[int, ...]
    offset: int | None  # of its first byte in the file; None in a `.pth`


def read_header(path: str | Path, cure: str = "download it again") -> dict[str, Stored]:
    """Every tensor of a `.safetensors` or `.pth` file, by name, without reading its data.

    A `.pth` is unpickled with `weights_only`: nothing in it runs. cure: what a message about a damaged file advises.
    Raises LanceError for a file that is missing, cut off, damaged, or whose header contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise LanceError(f"{path} does not exist; download it into {path.parent}.")
    return _pickle_header(path) if path.suffix == ".pth" else _safetensors_header(path, cure)


def _safetensors_header(path: Path, cure: str) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt"):  # checks types, shapes and offsets against each other and the file
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise LanceError(
            f"{path} cannot be read, it is cut off or damaged ({brief(error)}); {cure}."
        ) from None
    return {
        name: Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _pickle_header(path: Path) -> dict[str, Stored]:
    types = {dtype: name for name, dtype in STORED_TYPES.items()}
    return {
        name: Stored(path, name, types.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), None)
        for name, tensor in _open_pickle(path).items()
    }


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, memory-mapped."""
    remedy = f"use {VAE_WEIGHTS} of {REPOSITORY}"
    try:
        archive = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if archive else None
    except pickle.UnpicklingError:
        raise LanceError(f"{path} was refused: it holds more than tensors and could run code; {remedy}.") from None
    except Exception as error:  # a damaged archive makes torch raise whatever its parsers meet first
        raise LanceError(f"{path} cannot be read, it is damaged ({brief(error)}); {remedy}.") from None
    if not archive:
        raise LanceError(f"{path} was not opened: it is cut off, or no archive of tensors; {remedy}.")
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors.values()):
        raise LanceError(f"{path} is not a table of named tensors; {remedy}.")
    return tensors


def brief(error: Exception) -> str:
    """The first sentence of an error, to stand inside one of ours."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def fill(places: Iterable[tuple[Tensor, Stored]]) -> None:
    """Reads stored tensors into given ones of the same shape, converting to their dtype and device on the way."""
    by_file: dict[Path, list[tuple[Tensor, Stored]]] = defaultdict(list)
    for target, stored in places:
        by_file[stored.file].append((target, stored))
    for path, group in by_file.items():
        (_fill_from_pickle if path.suffix == ".pth" else _fill_from_safetensors)(path, group)


def _fill_from_safetensors(path: Path, places: Sequence[tuple[Tensor, Stored]]) -> None:
    buffers = {name: torch.empty(CHUNK, dtype=STORED_TYPES[name]) for name in {stored.dtype for _, stored in places}}
    try:
        with open(path, "rb") as file:
            for target, stored in sorted(places, key=lambda place: place[1].offset):
                file.seek(stored.offset)
                for part in target.view(-1).split(CHUNK):
                    piece = buffers[stored.dtype][: part.numel()]
                    raw = piece.view(torch.uint8).numpy()
                    if file.readinto(raw) < raw.nbytes:
                        raise LanceError(f"{path} ended while it was read; download it again.")
                    part.copy_(piece)
    except OSError as error:
        raise LanceError(f"{path} could not be read to its end ({error.strerror}); download it again.") from None


def _fill_from_pickle(path: Path, places: Sequence[tuple[Tensor, Stored]]) -> None:
    tensors, mapped = _open_pickle(path), 0
    for target, stored in places:
        source = tensors[stored.name]
        target.copy_(source)
        mapped += source.numel() * source.element_size()
        if mapped > MAPPED:
            del source
            tensors, mapped = _open_pickle(path), 0
