"""The recorded data of the official model, by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny_a"
FILES = {
    0: "0_inputs",
    1: "1_sequence",
    2: "2_vit",
    3: "3_vae",
    4: "4_step",
    5: "5_sampling",
    6: "6_understanding",
    7: "7_units",
    8: "8_rope_bf16_invfreq",
    "bf16": "5_sampling_bf16",  # the official code in bf16 on a CPU
}


@cache
def golden(section: int | str) -> dict[str, Tensor]:
    """The tensors of one section."""
    return load_file(DATA / "golden" / f"{FILES[section]}.safetensors")


@cache
def values() -> dict:
    """The recorded strings and numbers."""
    return json.loads((DATA / "golden" / "values.json").read_text(encoding="utf-8"))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| in L2; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Same shape, and a relative error within the tolerance."""
    assert ours.shape == theirs.shape
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"relative L2 error {error:.2e}"


class Recorder(TorchDispatchMode):
    """Counts operations and keeps the number of elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result
