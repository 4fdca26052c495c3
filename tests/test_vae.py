"""The VAE against the official one's recordings, and what must hold for any clip."""

from __future__ import annotations

import json

import pytest
import torch
from goldens import DATA, assert_close, golden, relative_error
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from lance_core.errors import LanceError
from lance_core.vae import (
    LATENT_MEAN,
    LATENT_STD,
    Decoder,
    VAEConfig,
    WanVAE,
    denormalize,
    in_fast_layout,
    normalize,
    spans,
    vae_config,
)
from lance_core.vae_layers import Moment

GOLDEN, SAMPLING, INPUTS = golden(3), golden(5), golden(0)
MANIFEST = json.loads((DATA / "manifest_full.json").read_text())["groups"]["vae"]
TINY = torch.load(DATA / "tiny_a/Wan2.2_VAE.pth", weights_only=True)


def tiny_vae(dtype: torch.dtype = torch.float32, operations: object = nn) -> WanVAE:
    model = WanVAE(vae_config(shapes(TINY)), dtype=dtype, operations=operations)
    model.load_state_dict(TINY)
    return model.requires_grad_(False)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny_vae()


def pixels(recorded: Tensor) -> Tensor:
    """Recorded bytes `[3, F, H, W]` -> `[1, 3, F, H, W]` in -1..1."""
    return (recorded.float() / 255 - 0.5)[None] / 0.5


def rows(recorded: Tensor) -> Tensor:
    """Recorded normalised latent `[T, h, w, 48]` -> `[1, 48, T, h, w]`."""
    return recorded.permute(3, 0, 1, 2)[None]


def clip(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Parity with the official code


@pytest.mark.parametrize("name", ["image", "clip9"])
def test_encode_matches_official(vae, name):
    mean, logvar = vae.encode(pixels(GOLDEN[f"{name}.pixels_uint8"]))
    assert_close(mean[0], GOLDEN[f"{name}.enc_mean_raw"])
    assert_close(normalize(mean)[0], GOLDEN[f"{name}.enc_mean_scaled"])
    assert_close(logvar[0], GOLDEN[f"{name}.enc_logvar"])
    sampled = normalize(mean) + (logvar / 2).exp() * GOLDEN[f"{name}.sample_eps"]
    assert_close(sampled, rows(GOLDEN[f"{name}.latent_sampled"]))


@pytest.mark.parametrize("name", ["image", "clip9"])
def test_decode_matches_official(vae, name):
    frames = vae.decode(denormalize(GOLDEN[f"{name}.enc_mean_scaled"][None]))
    assert_close(frames[0], GOLDEN[f"{name}.dec_from_mean"])


def test_decode_of_random_latent_matches_official(vae):
    frames = vae.decode(denormalize(rows(GOLDEN["image.rand_latent"])))
    assert_close(frames[0], GOLDEN["image.dec_from_rand"])


@pytest.mark.parametrize(
    ("task", "source"), [("i2v", "i2v"), ("image_edit", "i2v"), ("video_edit", "video_edit")]
)  # the edit's source picture is the one of i2v
def test_condition_latents_match_official(vae, task, source):
    mean, logvar = vae.encode(pixels(INPUTS[f"input.{source}.en.vae_video0.resized_uint8"]))
    assert_close(normalize(mean)[0], SAMPLING[f"{task}.cond_latent_mean_scaled"])
    assert_close(logvar[0], SAMPLING[f"{task}.cond_latent_logvar"])


@pytest.mark.parametrize(
    ("task", "kept"), [("t2i", [0]), ("t2v", [0, 8]), ("i2v", [8]), ("image_edit", [0]), ("video_edit", [4])]
)
def test_sampled_latents_decode_as_official(vae, task, kept):
    frames = vae.decode(denormalize(rows(SAMPLING[f"{task}.steps6.final_latent"])))
    assert_close(frames[0, :, kept], SAMPLING[f"{task}.decoded_frames"])


def test_statistics_are_the_official_ones():
    assert_close(torch.tensor(LATENT_MEAN), GOLDEN["scale_mean"])
    assert_close(1 / torch.tensor(LATENT_STD), GOLDEN["scale_inv_std"])


def test_denormalize_inverts_normalize():
    latent = torch.randn(2, 48, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert_close(denormalize(normalize(latent)), latent)
    assert normalize(latent.bfloat16()).dtype == torch.bfloat16


# Checkpoints


def test_release_names_and_shapes():
    model = WanVAE(device="meta")
    assert shapes(model.state_dict()) == {name: tuple(shape) for name, shape in MANIFEST.items()}


def test_config_from_shapes():
    assert vae_config(MANIFEST) == VAEConfig()
    assert vae_config(shapes(TINY)) == VAEConfig(encoder_width=8, decoder_width=10)


@pytest.mark.parametrize(
    ("changed", "shape"),
    [
        ("encoder.conv1.weight", None),
        ("decoder.conv1.weight", (1024, 16, 3, 3, 3)),
        ("decoder.conv1.weight", ()),
        ("decoder.conv1.weight", (2, 48, 3, 3, 3)),
        ("encoder.downsamples.1.downsamples.2.time_conv.weight", None),
        ("decoder.head.2.weight", (3, 256, 3, 3, 3)),
        ("decoder.extra.weight", (1,)),
    ],
)
def test_config_refuses_other_checkpoints(changed, shape):
    other = {name: size for name, size in {**MANIFEST, changed: shape}.items() if size is not None}
    with pytest.raises(LanceError, match=changed):
        vae_config(other)


def test_config_refuses_an_empty_checkpoint():
    with pytest.raises(LanceError, match="not a Wan 2.2 VAE"):
        vae_config({})


class CastingOperations:
    """Layers that cast a copy of their weights inside forward, as hosts that offload weights do."""

    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    class Conv3d(nn.Conv3d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def test_layers_of_a_host(vae):
    hosted = tiny_vae(torch.bfloat16, CastingOperations)
    assert list(hosted.state_dict()) == list(vae.state_dict())
    frames = clip(1, 3, 5, 32, 32)
    mean, _ = hosted.encode(frames)
    assert mean.dtype == torch.float32
    assert_close(mean, vae.encode(frames)[0])
    assert_close(hosted.decode(mean), vae.decode(mean))


def test_bfloat16_stays_near_float32(vae):
    half = tiny_vae(torch.bfloat16)
    mean, _ = half.encode(clip(1, 3, 5, 48, 32).bfloat16())
    frames = half.decode(mean)
    assert mean.dtype == frames.dtype == torch.bfloat16
    assert relative_error(mean, vae.encode(clip(1, 3, 5, 48, 32))[0]) < 0.05
    assert relative_error(frames, vae.decode(mean.float())) < 0.05


# Time


def test_left_over_frames_are_dropped(vae):
    frames = clip(1, 3, 50, 16, 16)
    mean, logvar = vae.encode(frames)
    assert mean.shape == logvar.shape == (1, 48, 13, 1, 1)
    assert vae.decode(mean).shape == (1, 3, 49, 16, 16)
    assert torch.equal(mean, vae.encode(frames[:, :, :49])[0])


@settings(max_examples=10, deadline=None)
@given(frames=st.integers(1, 14), kept=st.integers(1, 14), seed=st.integers(0, 99))
def test_encoding_is_causal(vae, frames, kept, seed):
    long = clip(1, 3, max(frames, kept), 32, 16, seed=seed)
    short = long[:, :, : min(frames, kept)]
    mean = vae.encode(short)[0]
    assert_close(vae.encode(long)[0][:, :, : mean.shape[2]], mean)


def test_decoding_is_causal(vae):
    latent = torch.randn(1, 48, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latent)
    for t in range(1, 4):
        assert_close(whole[:, :, : 4 * t - 3], vae.decode(latent[:, :, :t]))


def test_later_frames_depend_on_earlier_ones(vae):
    frames = clip(1, 3, 9, 32, 32)
    changed = frames.clone()
    changed[:, :, 0] = 0
    assert relative_error(vae.encode(changed)[0][:, :, 2], vae.encode(frames)[0][:, :, 2]) > 1e-3


def test_nothing_stays_between_calls(vae):
    frames, other = clip(1, 3, 5, 32, 32), clip(1, 3, 9, 32, 32, seed=1)
    first = vae.encode(frames)[0]

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        vae.encode(other, on_chunk=stop)
    assert torch.equal(vae.encode(frames)[0], first)


def test_batch_equals_singles(vae):
    frames = clip(2, 3, 5, 32, 48)
    mean, logvar = vae.encode(frames)
    decoded = vae.decode(mean)
    for i in range(2):
        single_mean, single_logvar = vae.encode(frames[i : i + 1])
        assert_close(mean[i : i + 1], single_mean)
        assert_close(logvar[i : i + 1], single_logvar)
        assert_close(decoded[i : i + 1], vae.decode(single_mean))


def test_progress_counts_chunks(vae):
    seen = []
    mean, _ = vae.encode(clip(1, 3, 9, 48, 32), on_chunk=lambda *progress: seen.append(progress))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    vae.decode(mean, tile=2, on_chunk=lambda *progress: seen.append(progress))
    assert seen == [(done, 6) for done in range(1, 7)]


# Space


def random_latent(*shape: int) -> Tensor:
    return torch.randn(1, 48, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "tile"), [((3, 34, 3), 2), ((2, 3, 40), 5), ((1, 20, 20), 9)])
def test_tiles_are_exact(vae, shape, tile):
    latent = random_latent(*shape)
    assert_close(vae.decode(latent, tile=tile), vae.decode(latent), 1e-6)


def changed_columns(decoder: Decoder, x: Tensor, column: int) -> tuple[int, int]:
    """First and last column of patches of 2x2 pixels in which a column before the upsampling stages has a part."""
    windows = [(slice(None), slice(None))] * (1 + len(decoder.upsamples))
    moments = [Moment(True, True, {}), Moment(True, True, {})]
    other = x.clone()
    other[..., column] += 100 * torch.rand(other[..., column].shape, generator=torch.Generator().manual_seed(1))
    (before,), (after,) = (list(decoder.finish(y, m, windows)) for y, m in zip((x, other), moments))
    columns = (before != after).any(dim=2).any(dim=1).any(dim=0)
    changed = columns.nonzero().flatten()
    return int(changed[0]), int(changed[-1])


def test_windows_are_what_a_tile_depends_on():
    """No cell outside the window of a tile changes it, and the cells at the window's edges do."""
    decoder = tiny_vae(torch.float64).decoder
    size, tile = 40, slice(18, 22)
    x = torch.randn(1, 40, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window, scale = decoder.windows(tile, size)[0], 8
    reached = {}
    for column in range(size):
        first, last = changed_columns(decoder, x, column)
        reached[column] = first < tile.stop * scale and last >= tile.start * scale
    depends = [column for column, reaches in reached.items() if reaches]
    assert (depends[0], depends[-1]) == (window.start, window.stop - 1)


def test_windows_end_at_the_edges(vae):
    assert vae.decoder.windows(slice(0, 5), 5) == [slice(0, 5), slice(0, 10), slice(0, 20), slice(0, 40), slice(0, 40)]


def test_one_tile_is_the_whole(vae):
    latent = random_latent(2, 3, 4)
    assert torch.equal(vae.decode(latent, tile=4), vae.decode(latent))


@settings(max_examples=10, deadline=None)
@given(t=st.integers(1, 2), h=st.integers(1, 7), w=st.integers(1, 7), tile=st.integers(2, 8))
def test_tiled_shape_and_range(vae, t, h, w, tile):
    latent = 4 * random_latent(t, h, w)
    frames = vae.decode(latent, tile=tile)
    assert frames.shape == (1, 3, 4 * t - 3, 16 * h, 16 * w)
    assert frames.abs().max() <= 1
    assert_close(frames, vae.decode(latent), 1e-6)


@settings(deadline=None)
@given(size=st.integers(1, 100), tile=st.integers(2, 64))
def test_spans_cover_an_axis_in_order(size, tile):
    covered = [i for span in spans(size, tile) for i in range(span.start, span.stop)]
    assert covered == list(range(size))
    lengths = {span.stop - span.start for span in spans(size, tile)}
    assert max(lengths) <= tile and max(lengths) - min(lengths) <= 1


def test_frames_are_collected_where_asked(vae):
    latent = random_latent(2, 2, 2)
    shape = vae.decode(latent, device="meta")
    assert (shape.device.type, shape.shape) == ("meta", (1, 3, 5, 32, 32))


# Layout and gradients


def test_channels_lie_last_on_the_cpu(vae):
    frame = in_fast_layout(torch.zeros(1, 8, 4, 4))
    assert frame.is_contiguous(memory_format=torch.channels_last)
    assert vae.decoder.begin(torch.zeros(1, 48, 4, 4).to(frame), Moment(True, True, {})).shape == (1, 40, 4, 4)
    empty = torch.zeros(1, 8, 4, 4, device="meta")
    assert in_fast_layout(empty) is empty


def test_gradients_flow_through_every_layer():
    """In-place steps spoil nothing that a derivative needs: gradients are those of finite differences."""
    model = tiny_vae(torch.float64)
    latent = random_latent(2, 2, 1).double()
    frames = clip(1, 3, 5, 32, 16).double()
    for run, x in ((model.decode, latent), (lambda y: model.encode(y)[0], frames)):
        step = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        x = x.requires_grad_()
        target = torch.randn(run(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad((run(x) * target).sum(), x)
        with torch.no_grad():
            numeric = ((run(x + 1e-6 * step) - run(x - 1e-6 * step)) * target).sum() / 2e-6
        torch.testing.assert_close((gradient * step).sum(), numeric, rtol=1e-3, atol=1e-5)


# Mistakes


@pytest.mark.parametrize("shape", [(1, 3, 1, 40, 32), (1, 4, 1, 32, 32), (3, 1, 32, 32), (1, 3, 0, 32, 32)])
def test_encode_refuses_other_shapes(vae, shape):
    with pytest.raises(LanceError, match="multiples of 16"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 2), (48, 1, 2, 2), (1, 48, 0, 2, 2)])
def test_decode_refuses_other_shapes(vae, shape):
    with pytest.raises(LanceError, match="cannot decode a latent"):
        vae.decode(torch.zeros(shape))


def test_decode_refuses_tiles_of_less_than_two_rows(vae):
    with pytest.raises(LanceError, match="tiles of 1"):
        vae.decode(torch.zeros(1, 48, 1, 4, 4), tile=1)
