"""Tensors in files: what a header says of them, reading them piece by piece to where they belong, and writing them.

Nothing is memory-mapped as a whole: the mapped pages of a 28 GB file would count as this process's memory.
"""

from __future__ import annotations

import errno
import json
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import gguf
from .errors import LanceError
from .layout import REPOSITORY, VAE_WEIGHTS

STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PACKED_TYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8}  # of quantised weights
FILE_TYPES = STORED_TYPES | PACKED_TYPES
CHUNK = 2**23  # elements that are read at once: 32 MB of float32
GGUF_CHUNK = 2**20  # the same of a GGUF file, whose numbers need several times their size while they are unpacked
MAPPED = 2**28  # bytes of a `.pth` that are mapped before its pages are given back


class Stored(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    file: Path
    name: str
    dtype: str  # "F32", "BF16", ...: the names of safetensors, or those of GGUF
    shape: tuple[int, ...]
    offset: int | None  # of its first byte in the file; None in a `.pth`


def read_header(path: str | Path, cure: str = "download it again") -> dict[str, Stored]:
    """Every tensor of a `.safetensors`, `.gguf` or `.pth` file, by name, without reading its data.

    A `.pth` is unpickled with `weights_only`: nothing in it runs. cure: what a message about a damaged file advises.
    Raises LanceError for a file that is missing, cut off, damaged, or whose header contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise LanceError(f"{path} does not exist; download it into {path.parent}.")
    if path.suffix == ".gguf":
        return {e.name: Stored(path, e.name, e.type, e.shape, e.offset) for e in gguf.read_entries(path, cure)}
    return _pickle_header(path) if path.suffix == ".pth" else _safetensors_header(path, cure)


def _safetensors_header(path: Path, cure: str) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt"):  # checks types, shapes and offsets against each other and the file
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise LanceError(f"{path} cannot be read, it is cut off or damaged ({brief(error)}); {cure}.") from None
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


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that others may read as any other file; OSError where it cannot be written."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, brief(error)) from None
    path.chmod(mode)  # newer versions of safetensors let its owner alone read it


def is_float(stored: Stored) -> bool:
    """Whether a tensor can be read as floating point numbers as it is."""
    return stored.file.suffix == ".gguf" or stored.dtype in STORED_TYPES


def fill(places: Iterable[tuple[Tensor, Stored]]) -> None:
    """Reads stored tensors into given ones of the same shape, converting to their dtype and device on the way.

    A single stored number fills a tensor of any shape.
    """
    by_file: dict[Path, list[tuple[Tensor, Stored]]] = defaultdict(list)
    for target, stored in places:
        by_file[stored.file].append((target, stored))
    for path, group in by_file.items():
        (_fill_from_pickle if path.suffix == ".pth" else _fill_in_order)(path, group)


def _fill_in_order(path: Path, places: Sequence[tuple[Tensor, Stored]]) -> None:
    with reading(path) as file:
        for target, stored in sorted(places, key=lambda place: place[1].offset):
            rest = target.view(-1)
            for piece in pieces(file, stored):
                part = rest[: len(piece)] if prod(stored.shape) > 1 else rest
                part.copy_(piece)
                rest = rest[len(piece) :]


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file, open; raises LanceError where it ends early or cannot be read."""
    try:
        with open(path, "rb") as file:
            yield file
    except EOFError:
        raise LanceError(f"{path} ended while it was read; download it again.") from None
    except OSError as error:
        raise LanceError(f"{path} could not be read to its end ({error.strerror}); download it again.") from None


def pieces(file: BinaryIO, stored: Stored) -> Iterator[Tensor]:
    """A tensor of a safetensors file, or floats of a GGUF file, as flat pieces that share their memory.

    Raises EOFError where the file ends early.
    """
    file.seek(stored.offset)
    left = prod(stored.shape)
    if stored.file.suffix == ".gguf":
        numbers, size = gguf.block(stored.dtype)
        raw = np.empty(min(left, GGUF_CHUNK) // numbers * size, np.uint8)
        while left:
            part = raw[: left // numbers * size]
            _read(file, part)
            yield torch.from_numpy(gguf.dequantize(part, stored.dtype))
            left -= len(part) // size * numbers
        return
    buffer = torch.empty(min(left, CHUNK), dtype=FILE_TYPES[stored.dtype])
    while left:
        piece = buffer[:left]
        _read(file, piece.view(torch.uint8).numpy())
        yield piece
        left -= len(piece)


def _read(file: BinaryIO, raw: np.ndarray) -> None:
    if file.readinto(raw) < raw.nbytes:
        raise EOFError


def _fill_from_pickle(path: Path, places: Sequence[tuple[Tensor, Stored]]) -> None:
    tensors, mapped = _open_pickle(path), 0
    for target, stored in places:
        source = tensors[stored.name]
        target.copy_(source)
        mapped += source.numel() * source.element_size()
        if mapped > MAPPED:
            del source
            tensors, mapped = _open_pickle(path), 0
