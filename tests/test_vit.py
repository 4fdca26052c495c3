"""The vision tower against the official one's recorded values, and the cost of its windows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from goldens import DATA, TINY, Recorder, assert_close, golden, values
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lance_core.config import VisionConfig, read_json, vision_config
from lance_core.errors import LanceError
from lance_core.vit import VisionTower, normalize_pixels, rotary_angles, window_groups

WEIGHTS = TINY / "Qwen2.5-VL-ViT"
WINDOW = 4  # cells


def tiny_tower(**options) -> VisionTower:
    tower = VisionTower(vision_config(read_json(WEIGHTS / "config.json")), **options)
    tower.load_state_dict(load_file(WEIGHTS / "vit.safetensors"))
    return tower.requires_grad_(False)


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return tiny_tower(dtype=torch.float32)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return golden(2)


def pixels_of(recorded_bytes: Tensor) -> Tensor:
    return normalize_pixels(rearrange(recorded_bytes, "c f h w -> f h w c") / 255)


def official_windows(t: int, rows: int, columns: int) -> list[Tensor]:
    """Cell numbers of every window in the official order: by temporal step, then row-major."""
    windows = [window for group in window_groups(rows, columns, WINDOW) for window in group]
    windows.sort(key=lambda window: int(window[0]))
    return [window + step * rows * columns for step in range(t) for window in windows]


@pytest.mark.parametrize("name", ["image", "clip"])
def test_tower_matches_the_official_one(tower, recorded, name):
    pixels = pixels_of(recorded[f"{name}.pixels_uint8"])
    assert tower.grid(pixels) == tuple(recorded[f"{name}.grid_thw"][0].tolist())
    assert_close(tower.patch_embed(pixels).flatten(0, 2)[:16], recorded[f"{name}.patch_embed"])
    assert_close(tower(pixels), recorded[f"{name}.out"])


@pytest.mark.parametrize("name", ["image", "clip"])
def test_windows_match_the_official_ones(recorded, name):
    t, h, w = recorded[f"{name}.grid_thw"][0].tolist()
    windows = official_windows(t, h // 2, w // 2)
    lengths = torch.tensor([0] + [4 * len(window) for window in windows])
    assert torch.cat(windows).tolist() == recorded[f"{name}.window_index"].tolist()
    assert lengths.cumsum(0).tolist() == recorded[f"{name}.cu_window_seqlens"].tolist()


@pytest.mark.parametrize("name", ["image", "clip"])
def test_rotary_angles_match_the_official_ones(tower, recorded, name):
    _, h, w = recorded[f"{name}.grid_thw"][0].tolist()
    angles = rotary_angles(h, w, 2, tower.frequencies())
    assert angles.dtype == torch.float32
    assert_close(angles.flatten(0, 1)[:16], recorded[f"{name}.rotary_first16"], 1e-6)


def test_official_batch_of_image_and_clip_equals_separate_runs(tower, recorded):
    outputs = [tower(pixels_of(recorded[f"{name}.pixels_uint8"])) for name in ("image", "clip")]
    assert_close(torch.cat(outputs), recorded["image_and_clip.out"])


@pytest.mark.parametrize(
    "section, name, requests, rounded",
    [
        (5, "image_edit", ["image_edit.en.vit_video0"], False),
        (5, "video_edit", ["video_edit.en.vit_video0"], False),
        (5, "image_edit_2ref.en", ["image_edit_2ref.en.vit_video0", "image_edit_2ref.en.vit_video1"], False),
        (5, "image_idip_2ref.zh", ["image_edit_2ref.en.vit_video1", "image_edit_2ref.en.vit_video0"], False),
        (6, "x2t_image.en", ["x2t_image.en.vit_video0"], False),
        (6, "x2t_video.en", ["x2t_video.en.vit_video0"], False),
        (8, "image_edit", ["image_edit.en.vit_video0"], True),
    ],
)
def test_embeddings_match_the_official_pipeline(section, name, requests, rounded):
    inputs = golden(0)
    names = [values().get(f"input.{request}", f"input.{request}.resized_uint8") for request in requests]
    tower = tiny_tower(dtype=torch.float32, rounded_rope=rounded)
    outputs = [tower(pixels_of(inputs[name])) for name in names]
    assert_close(torch.cat(outputs), golden(section)[f"{name}.vit_embed"])


def test_rounded_frequencies_follow_the_compute_dtype():
    exact = golden(8)["vit.inv_freq"]
    rounded = exact.bfloat16().float()
    assert not torch.equal(exact, rounded)
    assert torch.equal(tiny_tower(dtype=torch.float32).frequencies(), exact)
    assert torch.equal(tiny_tower(dtype=torch.bfloat16).frequencies(), rounded)
    assert torch.equal(tiny_tower(dtype=torch.bfloat16, rounded_rope=False).frequencies(), exact)
    assert torch.equal(tiny_tower(dtype=torch.float32, rounded_rope=True).frequencies(), rounded)


def test_bfloat16_stays_near_float32(recorded):
    pixels = pixels_of(recorded["image.pixels_uint8"])
    output = tiny_tower(dtype=torch.bfloat16)(pixels)
    assert output.dtype == torch.bfloat16
    assert_close(output, tiny_tower(dtype=torch.float32, rounded_rope=True)(pixels), 4e-2)


def test_names_and_shapes_are_those_of_the_release():
    manifest = read_json(DATA / "manifest_full.json")["groups"]["vit"]
    expected = {name.removeprefix("vit_model."): shape for name, shape in manifest.items()}
    tower = VisionTower(VisionConfig(), device="meta")
    assert {name: list(tensor.shape) for name, tensor in tower.state_dict().items()} == expected


class CastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CastConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight.to(x.dtype), stride=self.stride)


class CastRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def test_weights_may_be_stored_in_another_dtype(tower, recorded):
    casting = SimpleNamespace(Linear=CastLinear, Conv3d=CastConv3d, RMSNorm=CastRMSNorm)
    stored = tiny_tower(dtype=torch.float32, operations=casting).to(torch.bfloat16)
    pixels = pixels_of(recorded["image.pixels_uint8"])
    assert torch.equal(stored(pixels), tower(pixels))


def test_attention_is_the_callable_given(tower, recorded):
    pixels = pixels_of(recorded["image.pixels_uint8"])
    averaging = tiny_tower(dtype=torch.float32, attention=lambda q, k, v, mask=None: v.mean(2, True).expand_as(v))
    assert (averaging(pixels) - tower(pixels)).norm() > 1e-2 * tower(pixels).norm()


def test_temporal_steps_do_not_see_each_other(tower, recorded):
    pixels = pixels_of(recorded["clip.pixels_uint8"])
    assert_close(tower(pixels), torch.cat([tower(pixels[:, :2]), tower(pixels[:, 2:])]), 1e-6)


def test_full_layers_reach_beyond_a_window_and_others_do_not():
    config = vision_config(read_json(WEIGHTS / "config.json"))
    pixels = torch.zeros(3, 2, 140, 252)
    changed = pixels.clone()
    changed[..., :28, :28] = 1
    windowed = tiny_tower(dtype=torch.float32)
    windowed.config = VisionConfig(**{**vars(config), "fullatt_block_indexes": ()})
    differs = (windowed(pixels) != windowed(changed)).any(-1).view(5, 9)
    assert differs[:WINDOW, :WINDOW].all() and differs.sum() == WINDOW * WINDOW
    full = tiny_tower(dtype=torch.float32)
    assert (full(pixels) != full(changed)).any(-1).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_windows_are_rectangles_that_hold_every_cell_once(rows, columns, size):
    groups = window_groups(rows, columns, size)
    assert len(groups) <= 4
    assert sorted(torch.cat([group.flatten() for group in groups]).tolist()) == list(range(rows * columns))
    for group in groups:
        row, column = group // columns, group % columns
        assert (row // size == row[:, :1] // size).all()
        assert (column // size == column[:, :1] // size).all()
    assert sum(len(group) for group in groups) == -(-rows // size) * -(-columns // size)


def record(tower: VisionTower, frames: int, height: int, width: int) -> Recorder:
    pixels = torch.zeros(3, frames, height, width)
    with Recorder() as recorder:
        tower(pixels)
    return recorder


def test_no_tensor_has_the_square_of_the_patches(tower):
    pixels, patches = 3 * 2 * 1120 * 1120, (1120 // 14) ** 2
    assert pixels < patches**2 / 5
    assert record(tower, 2, 1120, 1120).largest <= pixels


def test_largest_tensor_is_linear_in_the_frames(tower):
    assert record(tower, 8, 280, 280).largest == 4 * record(tower, 2, 280, 280).largest


@pytest.mark.parametrize("small, large", [((252, 308), (588, 420)), ((224, 224), (448, 336)), ((224, 252), (336, 476))])
def test_number_of_operations_does_not_grow_with_the_size(tower, small, large):
    assert record(tower, 4, *small).operations == record(tower, 8, *large).operations


def test_pixels_are_those_of_the_official_patches(recorded):
    pixels = pixels_of(recorded["image.pixels_uint8"])
    packed = rearrange(pixels, "c (t a) (r p y) (q s x) -> (t r q p s) (c a y x)", a=2, p=2, y=14, s=2, x=14)
    assert_close(packed[:8], recorded["image.packed_patches_first8"], 1e-6)


@pytest.mark.parametrize("frames, expected", [(1, [0, 0]), (2, [0, 1]), (3, [0, 1, 2, 2]), (5, [0, 1, 2, 3, 4, 4])])
def test_last_frame_of_an_odd_clip_stands_twice(frames, expected):
    clip = torch.linspace(0, 1, frames)[:, None, None, None].expand(frames, 2, 3, 3)
    assert torch.equal(normalize_pixels(clip), normalize_pixels(clip[expected]))
    assert normalize_pixels(clip).shape == (3, len(expected), 2, 3)


@pytest.mark.parametrize(
    "shape, words",
    [((3, 2, 100, 56), "56x100 pixels"), ((3, 2, 56, 42), "multiples of 28"), ((3, 3, 56, 56), "3 frames")],
)
def test_sizes_that_do_not_divide_are_told(tower, shape, words):
    with pytest.raises(LanceError, match=words):
        tower(torch.zeros(shape))
