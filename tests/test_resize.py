from __future__ import annotations

import json
import math

import pytest
import torch
from goldens import DATA, golden, values
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from lance_core.config import RESOLUTIONS, Resolution, Resolutions
from lance_core.errors import LanceError
from lance_core.resize import (
    OFFICIAL_RATIOS,
    RATIOS,
    buckets,
    crop_box,
    fit,
    nearest_bucket,
    official_size,
    own_size,
    size_of,
)

TABLE = json.loads((DATA / "resize_buckets.json").read_text())["resolutions"]
PIXELS = load_file(DATA / "resize_golden.safetensors")
INPUTS = golden(0)
VALUES = values()
ONE_BYTE = 1 / 255 + 1e-5
GOLDEN = Resolution(vae=64, vit=168)
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SIDES = st.integers(1, 400)


def frames_of(image: torch.Tensor) -> torch.Tensor:
    """Float frames from bytes `[H, W, 3]` or `[F, H, W, 3]`."""
    return (image if image.ndim == 4 else image[None]).float() / 255


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def test_resolutions_are_the_official_ones():
    official = {name: (row["resolution_vae"], row["resolution_vit"]) for name, row in TABLE.items()}
    assert {name: (one.vae, one.vit) for name, one in RESOLUTIONS.items()} == official


def test_what_a_model_paints_unless_it_is_told_otherwise():
    assert own_size(Resolutions().image) == (768, 768)
    assert own_size(Resolutions().video) == (848, 480)
    assert own_size(Resolution(vae=64, vit=112)) == (64, 64)


@pytest.mark.parametrize("name", TABLE)
def test_buckets_are_the_official_ones(name):
    rows = TABLE[name]["buckets"]
    assert [list(bucket) for bucket in buckets(RESOLUTIONS[name].vae)] == [row["vae_bucket_hw"] for row in rows]
    assert [list(bucket) for bucket in buckets(RESOLUTIONS[name].vit)] == [row["vit_bucket_hw"] for row in rows]


@pytest.mark.parametrize("branch, multiple", [("vae", 16), ("vit", 28)])
@pytest.mark.parametrize("name", TABLE)
def test_crops_and_sizes_of_17_inputs_are_the_official_ones(name, branch, multiple):
    size = getattr(RESOLUTIONS[name], branch)
    assert len(TABLE[name]["inputs"]) == 17
    for row in TABLE[name]["inputs"]:
        width, height = row["input_wh"]
        bucket = nearest_bucket(height, width, size)
        assert list(crop_box(height, width, bucket)) == row[f"{branch}_crop_top_left_h_w"], row
        assert [side - side % multiple for side in bucket] == row[f"{branch}_final_hw"], row


@pytest.mark.parametrize(
    "name, size, multiple",
    [
        ("a_img1.png.vae64", 64, 16),
        ("a_img1.png.vit168", 168, 28),
        ("b_img2.png.vae80", 80, 16),
        ("b_img2.png.vit140", 140, 28),
    ],
)
def test_pixels_are_the_official_ones(name, size, multiple):
    source = PIXELS[name.rpartition(".")[0] + ".source_hwc"]
    height, width = source.shape[:2]
    assert list(crop_box(height, width, nearest_bucket(height, width, size))) == PIXELS[f"{name}.crop_ijhw"].tolist()
    expected = PIXELS[f"{name}.out_cthw"].permute(1, 2, 3, 0)
    expected = expected / 2 + 0.5 if multiple == 16 else expected * CLIP_STD + CLIP_MEAN
    assert largest_difference(fit(frames_of(source), size, multiple), expected) <= ONE_BYTE


@pytest.mark.parametrize(
    "name, source",
    [
        ("i2v.en.vae_video0", "a_img1.png"),
        ("image_edit.en.vit_video0", "a_img1.png"),
        ("image_edit_2ref.en.vae_video0", "a_img2.png"),
        ("image_edit_2ref.en.vit_video0", "a_img2.png"),
        ("video_edit.en.vae_video0", "a_vid.mp4"),
        ("video_edit.en.vit_video0", "a_vid.mp4"),
    ],
)
def test_model_inputs_are_the_official_ones(name, source):
    frames = frames_of(INPUTS[f"source.{source}"])
    size, multiple = (GOLDEN.vae, 16) if "vae" in name else (GOLDEN.vit, 28)
    expected = INPUTS[f"input.{name}.resized_uint8"].permute(1, 2, 3, 0).float() / 255
    assert largest_difference(fit(frames, size, multiple), expected) <= ONE_BYTE
    height, width = frames.shape[1:3]
    crops = VALUES[f"input.{name.rpartition('.')[0]}.crop_ijhw"]
    assert list(crop_box(height, width, nearest_bucket(height, width, size))) in crops


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), size=st.sampled_from([224, 256, 480, 616, 768]))
def test_the_crop_is_inside_centred_and_of_the_buckets_ratio(height, width, size):
    bucket = nearest_bucket(height, width, size)
    assert bucket in buckets(size)
    top, left, crop_height, crop_width = crop_box(height, width, bucket)
    assert crop_height >= 1 and crop_width >= 1
    assert 0 <= height - crop_height - 2 * top <= 1
    assert 0 <= width - crop_width - 2 * left <= 1
    ratio = bucket[1] / bucket[0]
    assert abs(crop_width - crop_height * ratio) <= 0.5 + 0.5 * ratio + 1e-9, "more than rounding away from the ratio"
    assert crop_height >= height - 1 or crop_width >= width - 1, "the crop could be larger"


@given(size=st.integers(24, 1024))
def test_buckets_have_about_the_area_and_the_aspect_ratio(size):
    for (height, width), ratio in zip(buckets(size), (21 / 9, 16 / 9, 4 / 3, 1, 3 / 4, 9 / 16)):
        assert height % 16 == 0 and width % 16 == 0
        short, long = min(height, width), max(height, width)
        assert abs(short - size / math.sqrt(max(ratio, 1 / ratio))) <= 8
        assert abs(long - short * max(ratio, 1 / ratio)) <= 8


@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES, multiple=st.sampled_from([16, 28]))
def test_fit_gives_multiples_and_stays_in_range(height, width, multiple):
    frames = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(height * 1000 + width))
    fitted = fit(frames, 96, multiple)
    bucket = nearest_bucket(height, width, 96)
    assert fitted.shape == (1, bucket[0] // multiple * multiple, bucket[1] // multiple * multiple, 3)
    assert fitted.dtype == torch.float32
    assert 0 <= fitted.min() and fitted.max() <= 1


def test_fit_keeps_a_flat_colour_and_treats_every_frame_alike():
    colours = torch.tensor([[0, 51, 102], [153, 204, 255]]) / 255
    fitted = fit(colours[:, None, None].expand(2, 37, 61, 3), 64, 16)
    assert torch.equal(fitted, colours[:, None, None].expand_as(fitted))


def test_fit_leaves_a_picture_of_the_buckets_size_alone():
    frames = torch.randint(0, 256, (2, 48, 64, 3), generator=torch.Generator().manual_seed(1)) / 255
    assert torch.equal(fit(frames, 64, 16), frames)


def test_the_centre_crop_rounds_half_to_even():
    columns = (torch.arange(64) / 255).expand(64, 64)
    frames = columns[None, ..., None].repeat(1, 1, 1, 3)
    assert (fit(frames, 64, 28)[0, 0, :, 0] * 255).round().tolist() == list(range(4, 60))
    odd = fit(frames, 64, 21)[0, 0, :, 0] * 255  # 63 of 64 columns: half a column rounds to none
    assert odd.round().tolist() == list(range(63))


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 0, 8, 3), (8, 8, 3), (1, 8, 8, 4)])
def test_fit_refuses_other_shapes(shape):
    with pytest.raises(LanceError, match="frames, height, width, 3"):
        fit(torch.zeros(shape), 64, 16)


def test_too_small_resolutions_are_refused():
    with pytest.raises(LanceError, match="too small"):
        buckets(8)
    with pytest.raises(LanceError, match="larger resolution"):
        fit(torch.zeros(1, 30, 30, 3), 24, 28)


@pytest.mark.parametrize("name", TABLE)
def test_official_sizes_are_the_buckets_turned_to_width_and_height(name):
    expected = [tuple(row["vae_bucket_hw"][::-1]) for row in TABLE[name]["buckets"]]
    assert [official_size(name, ratio) for ratio in OFFICIAL_RATIOS] == expected


@given(ratio=st.sampled_from(RATIOS), megapixels=st.floats(0.06, 0.58))
def test_a_size_has_about_the_aspect_ratio_and_the_area(ratio, megapixels):
    width, height = size_of(ratio, megapixels)
    across, down = map(int, ratio.split(":"))
    exact = math.sqrt(megapixels * 1e6 * across / down), math.sqrt(megapixels * 1e6 * down / across)
    assert width % 16 == 0 and height % 16 == 0
    assert abs(width - exact[0]) <= 8 and abs(height - exact[1]) <= 8


def test_sizes_that_people_know():
    assert size_of("1:1", 0.6) == (768, 768)
    assert size_of("3:2", 0.4) == (768, 512)
    assert size_of("2:3", 0.4) == (512, 768)
    assert official_size("video_480p", "16:9") == (848, 480)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: official_size("8k", "1:1"), "resolution is '8k'; give one of image_256res"),
        (lambda: official_size("image_768res", "3:2"), "aspect ratio is '3:2'; give one of 21:9, 16:9"),
        (lambda: size_of("2:1", 0.6), "aspect ratio is '2:1'; give one of 21:9, 16:9, 3:2"),
        (lambda: size_of("1:1", 0.001), "megapixels is 0.001: give a number of at least 0.01"),
        (lambda: size_of("1:1", float("nan")), "megapixels is nan"),
    ],
)
def test_sizes_that_are_refused(call, words):
    with pytest.raises(LanceError, match=words):
        call()
