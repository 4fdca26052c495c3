"""GGUF files: what the header says, and their quantised numbers as floats, where the package `gguf` is installed.

Source of the format: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .errors import LanceError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = "general.alignment"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9  # the other types of a header's values
MAX_DIMENSIONS = 4


class Entry(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    type: str  # "F32", "Q8_0", ...: the names of gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # rows first
    offset: int  # of its first byte in the file


class Damaged(Exception):
    """What is wrong with a header, in a few words."""


def read_entries(path: Path, cure: str) -> list[Entry]:
    """The tensors of a file; cure: what a message about a damaged one advises.

    Raises LanceError for a file that is damaged or of an unknown kind, and where the package `gguf` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LanceError(f"{path} is a GGUF file, which needs one more package: run `pip install gguf`.") from None
    try:
        with open(path, "rb") as file:
            return _Header(file).entries()
    except (OSError, Damaged) as error:
        raise LanceError(f"{path} cannot be read, it is cut off or damaged ({error}); {cure}.") from None


def block(type: str) -> tuple[int, int]:
    """Numbers in a block of that type, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[type]]


def dequantize(raw: np.ndarray, type: str) -> np.ndarray:
    """Bytes of whole blocks `[n]` as float32 `[m]`; raises NotImplementedError for a type that `gguf` cannot read."""
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(raw[None], GGMLQuantizationType[type])[0]


class _Header:
    """Reads a header from its beginning; nothing that it claims is believed before the file is long enough for it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def entries(self) -> list[Entry]:
        if self.take(4) != MAGIC:
            raise Damaged("it does not begin with GGUF")
        if (version := self.number("I")) not in VERSIONS:
            raise Damaged(f"version {version}")
        tensors, values = self.number("Q"), self.number("Q")
        alignment = 32
        for _ in range(values):
            key, type = self.text(), self.number("I")
            value = self.value(type)
            if key == ALIGNMENT:
                alignment = value
        if not isinstance(alignment, int) or alignment <= 0:
            raise Damaged(f"an alignment of {alignment}")
        entries = [self.entry() for _ in range(self.believable(tensors, 24))]
        start = -(-self.file.tell() // alignment) * alignment
        entries = [entry._replace(offset=start + entry.offset) for entry in entries]
        for entry in entries:
            numbers, size = block(entry.type)
            if entry.offset + prod(entry.shape) // numbers * size > self.size:
                raise Damaged(f"the tensor '{entry.name}' ends behind the file")
        if len({entry.name for entry in entries}) < len(entries):
            raise Damaged("a tensor's name stands there twice")
        return entries

    def entry(self) -> Entry:
        name, dimensions = self.text(), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise Damaged(f"the tensor '{name}' has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if (type := readable_type(number)) is None:
            raise Damaged(f"the tensor '{name}' is of type {number}, which gguf cannot turn into numbers")
        if not shape or shape[-1] % block(type)[0]:
            raise Damaged(f"the tensor '{name}' of type {type} has the shape {list(shape)}")
        return Entry(name, type, shape, offset)

    def value(self, type: int) -> int | float | None:
        """A value of the header where it is a number; others are skipped."""
        if type in SCALARS:
            return self.number(SCALARS[type])
        if type == STRING:
            return self.skip(self.number("Q"))
        if type != ARRAY:
            raise Damaged(f"a value of type {type}")
        type, count = self.number("I"), self.number("Q")
        if type in SCALARS:
            return self.skip(count * struct.calcsize(SCALARS[type]))
        if type != STRING:
            raise Damaged(f"a list of type {type}")
        for _ in range(self.believable(count, 8)):
            self.skip(self.number("Q"))
        return None

    def number(self, code: str) -> int | float:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def take(self, count: int) -> bytes:
        return self.file.read(self.believable(count, 1))

    def skip(self, count: int) -> None:
        self.file.seek(self.believable(count, 1), os.SEEK_CUR)

    def believable(self, count: int, bytes_each: int) -> int:
        """That number of things, which all have to fit into the rest of the file."""
        if count * bytes_each > self.size - self.file.tell():
            raise Damaged("its header ends early")
        return count


@cache
def readable_type(number: int) -> str | None:
    """The name of a type by its number in files; None where `gguf` cannot turn it into floats."""
    from gguf import GGMLQuantizationType

    try:
        type = GGMLQuantizationType(number).name
        dequantize(np.zeros(block(type)[1], np.uint8), type)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return type
