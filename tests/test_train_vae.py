"""Training a small VAE, and putting its latents where the language model expects them."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from lance_core.train.vae import VAETraining, freeze_encoder, initialize, standardize, train_vae
from lance_core.vae import VAEConfig, WanVAE, normalize
from lance_core.world.pictures import CLIPS_EVERY, vae_batches


def small_vae() -> WanVAE:
    vae = WanVAE(VAEConfig(encoder_width=4, decoder_width=4))
    initialize(vae, torch.Generator().manual_seed(0))
    return vae


def test_it_learns():
    found = []
    training = VAETraining(steps=60, warmup=5)
    train_vae(small_vae(), vae_batches(0), training, on_step=lambda step, values: found.append(values))
    pictures = [value["psnr"] for step, value in enumerate(found, start=1) if step % CLIPS_EVERY]
    assert sum(pictures[-5:]) > sum(pictures[:5]) + 5 * 1.0


def test_it_goes_on_as_if_it_had_never_stopped(tmp_path):
    class Stop(Exception):
        pass

    def stop(step: int, values: dict) -> None:
        if step == 5:
            raise Stop

    training, state = VAETraining(steps=6, warmup=2, save_every=2), tmp_path / "state"
    whole, parts, seen = small_vae(), small_vae(), []
    train_vae(whole, vae_batches(0), training)
    with pytest.raises(Stop):
        train_vae(parts, vae_batches(0), training, on_step=stop, state=state)
    parts = small_vae()
    train_vae(parts, vae_batches(0), training, on_step=lambda step, values: seen.append(step), state=state)
    assert seen == [5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_decoder_that_learns_alone_leaves_the_latents_as_they_are():
    vae, frames = small_vae(), next(vae_batches(1)).permute(0, 4, 1, 2, 3) * 2 - 1
    freeze_encoder(vae)

    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            mean, logvar = vae.encode(frames)
            return torch.cat((mean, logvar)), (vae.decode(mean, clamped=False) - frames).square().mean()

    latent, error = seen()
    train_vae(vae, vae_batches(0), VAETraining(steps=30, warmup=5))
    after, less = seen()
    assert torch.equal(after, latent) and less < 0.95 * error


@torch.no_grad()
def test_standardised_latents_have_the_models_statistics_and_decode_to_the_same():
    torch.manual_seed(0)
    vae = small_vae().requires_grad_(False)
    vae.conv1.weight.mul_(torch.linspace(0.5, 3, 96).view(-1, 1, 1, 1, 1))
    vae.conv1.bias.normal_()
    frames = next(vae_batches(1)).permute(0, 4, 1, 2, 3) * 2 - 1
    before = vae.decode(vae.encode(frames)[0], clamped=False)
    logvar, spread = vae.encode(frames)[1], vae.conv1.weight[:48].flatten(1).norm(dim=1)
    standardize(vae, vae_batches(1), 12)
    scale = vae.conv1.weight[:48].flatten(1).norm(dim=1) / spread
    latents = [normalize(vae.encode(x.permute(0, 4, 1, 2, 3) * 2 - 1)[0]) for x in islice(vae_batches(1), 12)]
    channels = torch.cat([latent.transpose(0, 1).flatten(1) for latent in latents], dim=1)
    assert channels.mean(1).abs().max() < 1e-3
    assert 0.99 < channels.std(1).max() < 1.01
    torch.testing.assert_close(vae.decode(vae.encode(frames)[0], clamped=False), before, atol=1e-3, rtol=1e-3)
    change = vae.encode(frames)[1] - logvar  # the posterior's deviation is scaled as its mean is
    torch.testing.assert_close(change, 2 * scale.log().view(1, -1, 1, 1, 1).expand_as(change), atol=1e-3, rtol=0)


@torch.no_grad()
def test_what_is_beyond_white_is_clamped_unless_training():
    vae = small_vae()
    vae.decoder.head["2"].bias.fill_(3.0)
    latent = torch.zeros(1, 48, 1, 2, 2)
    assert vae.decode(latent).max() == 1.0
    assert vae.decode(latent, clamped=False).min() > 1.0
