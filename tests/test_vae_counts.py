"""What the VAE computes and holds at the release's widths, counted without data on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lance_core.counting import peak
from lance_core.vae import WanVAE

TERA, GIB = 1e12, 2**30
CLIP = (121, 480, 848)  # the largest the model makes: 31 latent frames of 30x53


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE(device="meta", dtype=torch.bfloat16).requires_grad_(False)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def latent(frames: int, height: int, width: int) -> Tensor:
    return empty(1, 48, 1 + (frames - 1) // 4, height // 16, width // 16)


def pixels(frames: int, height: int, width: int) -> Tensor:
    return empty(1, 3, frames, height, width)


def operations(run: Callable[[], object]) -> float:
    """In units of 10^12."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops() / TERA


def decoding(vae: WanVAE, *size: int, tile: int | None = None) -> float:
    """GiB beside the weights, the latent and the frames."""
    x = latent(*size)
    return (peak(lambda: vae.decode(x, tile=tile)) - pixels(*size).nbytes) / GIB


def encoding(vae: WanVAE, *size: int) -> float:
    """GiB beside the weights and the frames."""
    x = pixels(*size)
    return peak(lambda: vae.encode(x)) / GIB


def test_operations_for_a_picture(vae):
    assert operations(lambda: vae.decode(latent(1, 768, 768))) <= 5.7
    assert operations(lambda: vae.encode(pixels(1, 768, 768))) <= 1.0


def test_operations_for_the_first_frame_of_a_clip(vae):
    """Image to video encodes one picture, however long the clip."""
    assert operations(lambda: vae.encode(pixels(1, *CLIP[1:]))) <= 2


def test_first_frame_of_a_clip_costs_what_a_picture_does(vae):
    """No tap is multiplied with the zeros before a clip, and a later latent frame costs the same wherever it stands."""
    sums = [operations(lambda: vae.decode(latent(frames, 64, 64))) for frames in (1, 5, 9, 13, 17)]
    second, third, fourth, fifth = (after - before for before, after in zip(sums, sums[1:]))
    assert second < third < fourth  # they have fewer frames behind them than there are taps
    assert fifth == pytest.approx(fourth, rel=1e-9)
    picture = operations(lambda: vae.encode(pixels(1, 64, 64)))
    assert operations(lambda: vae.encode(pixels(4, 64, 64))) == picture  # frames left over are dropped


def test_memory_for_a_picture(vae):
    assert decoding(vae, 1, 768, 768) <= 0.6
    assert encoding(vae, 1, 768, 768) <= 0.3


def test_memory_for_a_clip(vae):
    """The frames themselves, 0.28 GiB, included."""
    assert decoding(vae, *CLIP) + pixels(*CLIP).nbytes / GIB <= 2.5
    assert encoding(vae, *CLIP) <= 1.0


def test_memory_does_not_grow_with_the_clip(vae):
    short, long = (decoding(vae, frames, 96, 96) for frames in (17, 33))
    assert long == short


@pytest.mark.parametrize(("tile", "memory", "more"), [(24, 0.35, 1.4), (16, 0.25, 1.9)])
def test_tiles_save_memory_for_operations(vae, tile, memory, more):
    size = 1, 768, 768
    whole, tiled = (operations(lambda: vae.decode(latent(*size), tile=side)) for side in (None, tile))
    assert tiled <= more * whole
    assert decoding(vae, *size, tile=tile) <= memory * decoding(vae, *size)


def test_activations_are_never_held_in_float32(vae):
    """Twice the bytes at most, and only where a norm works: a clip in float32 needs nearly twice the memory."""
    whole = WanVAE(device="meta").requires_grad_(False)
    x = latent(9, 96, 96).float()
    single = peak(lambda: whole.decode(x)) - 4 * 3 * 9 * 96 * 96
    assert decoding(vae, 9, 96, 96) * GIB <= 0.55 * single
