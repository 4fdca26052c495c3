"""The Wan 2.2 VAE of a Lance checkpoint as core's VAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ..lance_core.checkpoint import Contents, checked_vae_config, parameter_shapes, read_config, read_contents
from ..lance_core.config import LATENT_CHANNELS, TEMPORAL_COMPRESSION, Resolutions
from ..lance_core.errors import LanceError
from ..lance_core.layout import VAE_NAMES, find_checkpoint
from ..lance_core.vae import VAEConfig, WanVAE
from .weights import read_weights


class ScaledVAE(comfy.sd.VAE):
    """Core's VAE around core's Wan 2.2 network in other widths than the release's.

    Core builds this network in the release's widths, whatever the weights' are. So core is shown the release's shapes,
    without storage, from which it takes all its settings; the network of these weights then takes the place of that
    empty one.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: VAEConfig):
        release = parameter_shapes(WanVAE(device="meta"))
        with torch.device("meta"):
            super().__init__(sd={name: torch.empty(shape) for name, shape in release.items()})
        network = comfy.ldm.wan.vae2_2.WanVAE(
            dim=config.encoder_width,
            dec_dim=config.decoder_width,
            z_dim=config.latent_channels,
            dim_mult=list(config.multipliers),
            num_res_blocks=config.blocks,
            temperal_downsample=list(config.time_downsample),
        )
        self.first_stage_model = network.eval().to(self.vae_dtype)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        places = {"load_device": self.patcher.load_device, "offload_device": self.patcher.offload_device}
        self.patcher = type(self.patcher)(self.first_stage_model, **places)
        self.first_stage_model.load_state_dict(weights, assign=self.patcher.is_dynamic())
        self.size = comfy.model_management.module_size(self.first_stage_model)


def load_lance_vae(path: str) -> comfy.sd.VAE | None:
    """The VAE of a checkpoint, or, where that has none, Wan 2.2's in models/vae; None where there is neither."""
    contents = vae_contents(path)
    config = checked_vae_config(contents)
    if config is None:
        return None
    weights = read_weights(contents.vae)
    vae = comfy.sd.VAE(sd=weights) if config == VAEConfig() else ScaledVAE(weights, config)
    vae.patcher.cached_patcher_init = (reload_patcher, (path,))
    vae.lance_resolutions = read_config(find_checkpoint(path)).resolutions
    return vae


def resolutions_of(vae: comfy.sd.VAE) -> Resolutions:
    """Those of the checkpoint that a VAE was loaded with; the release's for a VAE of another loader."""
    return getattr(vae, "lance_resolutions", Resolutions())


def reload_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The VAE once more, with weights of its own, for another GPU; called by core."""
    return load_lance_vae(path).patcher


def vae_contents(path: str) -> Contents:
    files = find_checkpoint(path)
    contents = read_contents(files)
    if contents.vae:
        return contents
    shared = shared_vae()
    return contents if shared is None else read_contents(dataclasses.replace(files, vae=shared))


def shared_vae() -> Path | None:
    """Wan 2.2's VAE in models/vae, where checkpoints without one find it."""
    path = next(filter(None, (folder_paths.get_full_path("vae", name) for name in VAE_NAMES)), None)
    return None if path is None else Path(path)


def require_vae(vae: comfy.sd.VAE | None) -> comfy.sd.VAE:
    """A VAE for Lance's latents; raises LanceError for none and for other kinds."""
    if vae is None:
        raise LanceError(
            "this checkpoint has no VAE: put Wan2.2_VAE.pth beside the language model's folder, or"
            " wan2.2_vae.safetensors into models/vae."
        )
    channels = getattr(vae, "latent_channels", None)
    if channels != LATENT_CHANNELS or getattr(vae, "latent_dim", None) != 3:
        raise LanceError(
            f"the VAE on this wire is another model's, its latents have {channels} channels and not a clip's"
            f" {LATENT_CHANNELS}: connect the VAE of Load Lance, or wan2.2_vae.safetensors from Load VAE."
        )
    return vae


def encode(vae: comfy.sd.VAE, frames: Tensor) -> Tensor:
    """Frames `[F, H, W, 3]` in 0..1 as a latent `[1, 48, T, h, w]`, with a progress bar."""
    with progress_shown(vae.first_stage_model.encoder, 1 + (len(frames) - 1) // TEMPORAL_COMPRESSION):
        return vae.encode(frames)


def decode(vae: comfy.sd.VAE, latent: Tensor) -> Tensor:
    """Latent `[B, 48, T, h, w]` as frames `[B, F, H, W, 3]` in 0..1, with a progress bar."""
    with progress_shown(vae.first_stage_model.decoder, latent.shape[0] * latent.shape[2]):
        return vae.decode(latent)


@contextmanager
def progress_shown(network: nn.Module, total: int) -> Iterator[None]:
    """A bar of `total` latent frames, of which each pass through `network` makes one per sample of its batch."""
    bar = comfy.utils.ProgressBar(total)

    def advance(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
        if not torch.compiler.is_compiling():
            bar.update(len(output))

    hook = network.register_forward_hook(advance)
    try:
        yield
    finally:
        hook.remove()
