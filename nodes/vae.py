"""The Wan 2.2 VAE of a Lance checkpoint as core's VAE, of whatever widths its weights have."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ..lance_core.checkpoint import load_vae
from ..lance_core.config import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ..lance_core.errors import LanceError
from ..lance_core.layout import find_checkpoint
from ..lance_core.vae import WanVAE
from .model import PATCHER

SCALE = (TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION, SPATIAL_COMPRESSION)


class FirstStage(WanVAE):
    """Our VAE with the signatures that core's VAE calls: encoding gives the mean alone."""

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels)[0]


class LanceVAE(comfy.sd.VAE):
    """Core's VAE around `FirstStage`.

    Core's own constructor recognises a Wan 2.2 VAE by its keys and builds it in the release's widths only. So it is
    given no weights, for which it sets its defaults and returns, and what this VAE has different follows. Encoding,
    decoding, tiling and memory management are core's.
    """

    def __init__(self, network: FirstStage, dtype: torch.dtype):
        with core_silent():
            super().__init__(sd={})
        self.first_stage_model = network
        self.vae_dtype = dtype
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = PATCHER(network, load_device=self.device, offload_device=offload_device)

        self.latent_dim = 3
        self.latent_channels = LATENT_CHANNELS
        self.output_channels = 3
        self.upscale_ratio = (lambda t: max(0, t * SCALE[0] - SCALE[0] + 1), *SCALE[1:])
        self.upscale_index_formula = SCALE
        self.downscale_ratio = (lambda f: max(0, (f + SCALE[0] - 1) // SCALE[0]), *SCALE[1:])
        self.downscale_index_formula = SCALE
        # As core estimates this VAE in the release's widths.
        size_of = comfy.model_management.dtype_size
        self.memory_used_encode = lambda shape, dtype: 3300 * shape[3] * shape[4] * size_of(dtype)
        self.memory_used_decode = lambda shape, dtype: 8000 * shape[3] * shape[4] * SCALE[1] * SCALE[2] * size_of(dtype)
        self.model_size()


@contextmanager
def core_silent() -> Iterator[None]:
    """Keeps core from warning of the weights that it is not given."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def load_lance_vae(path: str) -> LanceVAE | None:
    """The VAE of a checkpoint; None where it has none."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), [torch.bfloat16, torch.float32])
    network = load_vae(
        find_checkpoint(path),
        device=comfy.model_management.vae_offload_device(),
        dtype=dtype,
        operations=comfy.ops.disable_weight_init,
        network=FirstStage,
    )
    return None if network is None else LanceVAE(network, dtype)


def require_vae(vae: comfy.sd.VAE | None) -> comfy.sd.VAE:
    """A VAE for Lance's latents; raises LanceError for none and for other kinds."""
    if vae is None:
        raise LanceError(
            "this checkpoint has no VAE: put Wan2.2_VAE.pth beside the language model's folder, or load"
            " wan2.2_vae.safetensors with Load VAE."
        )
    if getattr(vae, "latent_channels", None) != LATENT_CHANNELS or getattr(vae, "latent_dim", None) != 3:
        raise LanceError("the VAE on this wire is not Wan 2.2's: connect the VAE of Load Lance.")
    return vae
