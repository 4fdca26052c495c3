"""Trains a small VAE of Wan 2.2's architecture, and puts its latents where the language model expects them.

The released VAE is never trained: it is for small models made from nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ..media import replacing
from ..vae import LATENT_MEAN, LATENT_STD, WanVAE
from .optimizers import check_muon
from .schedule import cosine

OnStep = Callable[[int, dict[str, float]], None]
Optimizers = Sequence[torch.optim.Optimizer]
LATENT_BIASES = ("conv1.bias", "conv2.bias")
BRANCH_END_NAME = re.compile(r"residual\.6\.|\.proj\.")
BIAS, BRANCH_END, LOG_VARIANCE = 0.03, 0.1, -5.0  # at the beginning
ABSOLUTE = 0.25  # weight of the absolute error beside ten times the squared one
MIN_SPREAD = 0.25  # of the widest channel's: channels that say little are not blown up to the size of the others


@dataclass(frozen=True)
class VAETraining:
    """How long and how fast it learns.

    kl: weight of the posterior's divergence from a standard normal, per element. save_every: steps between two states.
    """

    steps: int = 6000
    learning_rate: float = 2e-3
    warmup: int = 100
    kl: float = 1e-4
    save_every: int = 500


def initialize(vae: WanVAE, generator: torch.Generator) -> None:
    """Random weights that begin close to nothing but the shortcuts, so that all details are learned at once.

    Kernels keep the size of activations, by what a still picture uses of them: one time tap. The ends of residual
    branches are small, and the layer that gives the pixels is zero.
    """
    for name, parameter in vae.named_parameters():
        with torch.no_grad():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
            elif name.startswith("decoder.head.2.") or name in LATENT_BIASES:
                parameter.zero_()
            else:
                scale = BRANCH_END if BRANCH_END_NAME.search(name) else 1.0
                inputs = parameter.shape[1] * parameter.shape[-2:].numel() if parameter.ndim > 1 else BIAS**-2
                parameter.normal_(0, scale * inputs**-0.5, generator=generator)
    with torch.no_grad():
        vae.conv1.bias[vae.config.latent_channels :] = LOG_VARIANCE


def train_vae(
    vae: WanVAE,
    batches: Iterator[Tensor],
    training: VAETraining,
    seed: int = 0,
    on_step: OnStep | None = None,
    state: Path | None = None,
) -> None:
    """Trains in place what requires a gradient (all of a new VAE, nothing of a loaded model's), on batches of frames
    `[B, F, H, W, 3]` in 0..1, F = 4k+1.

    seed: of the posterior's noise. on_step(step, values) after every step, from 1; it may raise to stop. state: a file
    that is written every `save_every` steps and from which the training goes on, with the same result as if it had
    never stopped, given batches from their beginning and a VAE with the weights that it began with. Raises LanceError
    where torch lacks Muon or the file cannot be written.
    """
    check_muon()
    device = next(vae.parameters()).device
    kernels, others = _split(vae)
    matrices = [nn.Parameter(kernel.data.flatten(1)) for kernel in kernels]  # the same memory, as Muon takes it
    optimizers = (
        torch.optim.Muon(matrices, lr=training.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    )
    generator = torch.Generator(device).manual_seed(seed)
    done = 0
    if state is not None and state.is_file():
        done = _restore(state, vae, optimizers, generator)
        for _ in range(done):
            next(batches)
    for step in range(done + 1, training.steps + 1):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = training.learning_rate * cosine(step, training.warmup, training.steps)
        frames = rearrange(next(batches).to(device), "b f h w c -> b c f h w") * 2 - 1
        mean, logvar = vae.encode(frames)
        logvar = logvar.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        painted = vae.decode(mean + noise * (logvar / 2).exp(), clamped=False)
        loss, mse = reconstruction_loss(painted, frames)
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        vae.zero_grad()
        (loss + training.kl * kl).backward()
        for kernel, matrix in zip(kernels, matrices):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        if on_step is not None:
            on_step(step, {"loss": loss.item(), "kl": kl.item(), "psnr": -10 * math.log10(mse.item() / 4)})
        if state is not None and step % training.save_every == 0:
            _keep(state, step, vae, optimizers, generator)


def freeze_encoder(vae: WanVAE) -> None:
    """From here on training leaves the latents as they are, and a model that knows them keeps its use."""
    for part in (vae.encoder, vae.conv1):
        part.requires_grad_(False)


def _keep(path: Path, step: int, vae: WanVAE, optimizers: Optimizers, generator: torch.Generator) -> None:
    learned = [optimizer.state_dict() for optimizer in optimizers]
    state = {"step": step, "weights": vae.state_dict(), "optimizers": learned, "noise": generator.get_state()}
    with replacing(path) as part:
        torch.save(state, part)


def _restore(path: Path, vae: WanVAE, optimizers: Optimizers, generator: torch.Generator) -> int:
    """The step of a kept state, which is put into all of these."""
    state = torch.load(path, weights_only=True, map_location=next(vae.parameters()).device)
    vae.load_state_dict(state["weights"])
    for optimizer, learned in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(learned)
    generator.set_state(state["noise"].cpu())
    return state["step"]


def _split(vae: WanVAE) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Kernels, which learn ten times faster with Muon (they begin far from what they become), and all else."""
    named = [(name, parameter) for name, parameter in vae.named_parameters() if parameter.requires_grad]
    kernels = [name for name, parameter in named if parameter.ndim > 1 and not name.endswith("gamma")]
    return [p for name, p in named if name in kernels], [p for name, p in named if name not in kernels]


def reconstruction_loss(painted: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """10·MSE + L1 / 4, and the plain MSE, of frames `[B, 3, F, H, W]` in -1..1."""
    error = painted - frames
    mse = error.square().mean()
    return 10 * mse + ABSOLUTE * error.abs().mean(), mse


@torch.no_grad()
def standardize(vae: WanVAE, batches: Iterator[Tensor], count: int) -> None:
    """Moves and scales the latents so that their normalised channels have mean 0 and deviations of about 1.

    The model knows Wan 2.2's published statistics alone, so the two convolutions around the latent take the
    difference; what is decoded stays the same to rounding. batches as in `train_vae`, of which `count` are measured.
    """
    device = next(vae.parameters()).device
    frames = (rearrange(next(batches).to(device), "b f h w c -> b c f h w") * 2 - 1 for _ in range(count))
    latents = torch.cat([rearrange(vae.encode(x)[0], "b c t h w -> c (b t h w)") for x in frames], dim=1)
    mean, spread = latents.mean(1), latents.std(1)
    spread = spread.clamp(min=MIN_SPREAD * spread.max())
    scale = spread.new_tensor(LATENT_STD) / spread
    offset = mean.new_tensor(LATENT_MEAN) - mean * scale
    n = len(scale)
    vae.conv2.bias.copy_(vae.conv2.bias - vae.conv2.weight[:, :, 0, 0, 0] @ (offset / scale))
    vae.conv2.weight.div_(scale.view(1, -1, 1, 1, 1))
    vae.conv1.weight[:n].mul_(scale.view(-1, 1, 1, 1, 1))
    vae.conv1.bias[:n].copy_(vae.conv1.bias[:n] * scale + offset)
    vae.conv1.bias[n:].copy_(vae.conv1.bias[n:] + 2 * scale.log())
