"""Tensors of a checkpoint's files as ComfyUI reads them: mapped, so that weights stay on disk until they are needed."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.utils
from torch import Tensor

from ..lance_core.storage import Stored


def read_weights(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors by the names that a network has for them, from whichever files hold them."""
    files = {file: comfy.utils.load_torch_file(str(file), safe_load=True) for file in {s.file for s in stored.values()}}
    return {name: files[entry.file][entry.name] for name, entry in stored.items()}
