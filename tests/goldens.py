"""The recorded data of the official model, by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

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
}


@cache
def golden(section: int) -> dict[str, Tensor]:
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
