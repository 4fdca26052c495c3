"""Latents of training media, made once and kept in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checks import warn
from ..errors import LanceError
from ..media import replacing
from ..storage import save_tensors
from ..vae import WanVAE

NAME = "latent"


@dataclass(frozen=True)
class LatentCache:
    """A folder of latents by key; several processes may share it, and any of them may be killed at any time.

    A file that cannot be written is a LanceWarning and one that cannot be read is made anew: the cache saves time and
    is never needed.
    """

    folder: Path

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The latent of that key, float32, made where it is not there yet."""
        path = self.folder / key[:2] / f"{key}.safetensors"
        try:
            return load_file(path)[NAME]
        except (OSError, SafetensorError, KeyError):
            latent = make()
        try:
            with replacing(path) as partial:
                save_tensors({NAME: latent}, partial)
        except LanceError as error:
            warn(f"a latent was not kept: {error}")
        return latent


def latent_key(content: bytes, *settings: object) -> str:
    """Another for another file or for other settings that a latent depends on; settings: told by their `repr`."""
    return hashlib.sha256(repr(settings).encode() + b"\0" + hashlib.sha256(content).digest()).hexdigest()


def fingerprint(vae: WanVAE) -> str:
    """Of the weights that encode, in the dtype they have: the same for equal weights alone."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.conv1):
        for name, parameter in part.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
