"""The vision tower of Lance: Qwen2.5-VL's transformer over 14-pixel patches, merged 2 x 2 into tokens.

Source: `modeling/vit/qwen2_5_vl_vit.py` of the release; arXiv 2502.13923, section 2.1.1. A cell is the square of
patches that becomes one token. Patches stand cell by cell and cells window by window, so that every window is one
stretch of the sequence; windows of one shape share an attention call. A temporal step (two frames) never sees another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, attention as default_attention
from .config import VisionConfig
from .errors import LanceError
from .rope import inverse_frequencies, rotate

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
FRAMES_PER_STEP = 2
NORM_EPS = 1e-6
ROPE_THETA = 10000.0


def normalize_pixels(frames: Tensor) -> Tensor:
    """Pixels as the tower takes them, `[3, F', H, W]` float32, from frames `[F, H, W, 3]` in 0..1.

    F' is even: the last frame of an odd clip stands twice, and so does a single image.
    Source: `data/datasets_custom/validation_dataset.py`, the branch for `vit_video`.
    """
    frames = frames.float()
    mean, std = frames.new_tensor(PIXEL_MEAN), frames.new_tensor(PIXEL_STD)
    missing = -frames.shape[0] % FRAMES_PER_STEP
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    return rearrange((frames - mean) / std, "f h w c -> c f h w")


def window_groups(rows: int, columns: int, size: int, device: torch.device | str | None = None) -> list[Tensor]:
    """The windows of one temporal step, grouped by shape: `[windows, cells]` tables of cell numbers (row-major).

    At most four groups: windows of `size` x `size` cells, those cut by the right edge, by the bottom edge, by both.
    Source: `get_window_index`, whose result is the same windows in row-major order.
    """
    cells = torch.arange(rows * columns, device=device).view(rows, columns)
    bottom, right = rows - rows % size, columns - columns % size
    regions = [part for band in (cells[:bottom], cells[bottom:]) for part in (band[:, :right], band[:, right:])]
    return [
        rearrange(region, "(i a) (j b) -> (i j) (a b)", a=min(size, region.shape[0]), b=min(size, region.shape[1]))
        for region in regions
        if region.numel()
    ]


def rotary_angles(h: int, w: int, merge: int, frequencies: Tensor) -> Tensor:
    """Angles in radians of one temporal step's patches, `[cells, merge * merge, hd/2]` float32, cells row-major.

    The first half of the last axis turns with the patch's row, the second with its column; `frequencies` is `[hd/4]`.
    Source: `rot_pos_emb`.
    """
    row = torch.arange(h, device=frequencies.device)[:, None].expand(h, w)
    column = torch.arange(w, device=frequencies.device).expand(h, w)
    angles = torch.cat([row[..., None] * frequencies, column[..., None] * frequencies], dim=-1)
    return rearrange(angles, "(r p) (c q) a -> (r c) (p q) a", p=merge, q=merge)


class PatchEmbed(nn.Module):
    """Normalised pixels `[3, F, H, W]` -> patches `[t, cells, merge * merge, D]`, cells in row-major order."""

    def __init__(self, config: VisionConfig, *, operations, dtype, device):
        super().__init__()
        self.merge = config.spatial_merge_size
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = operations.Conv3d(
            config.in_channels, config.hidden_size, patch, stride=patch, bias=False, dtype=dtype, device=device
        )

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.proj(pixels[None])[0]
        return rearrange(patches, "d t (r p) (c q) -> t (r c) (p q) d", p=self.merge, q=self.merge)


class VisionAttention(nn.Module):
    """Multi-head attention inside windows that are consecutive stretches of the sequence."""

    def __init__(self, config: VisionConfig, *, attention: Attention, operations, dtype, device):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention = attention
        self.qkv = operations.Linear(config.hidden_size, 3 * config.hidden_size, dtype=dtype, device=device)
        self.proj = operations.Linear(config.hidden_size, config.hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
        """`x` `[t, L, D]` -> the same shape; cosines and signed sines are `[L, 1, hd]`, as `rope.rotate` takes them.

        `windows` holds (number, length in patches) of each group in sequence order; together they cover L.
        """
        q, k, v = rearrange(self.qkv(x), "t l (three nh hd) -> three t l nh hd", three=3, nh=self.num_heads)
        stretches = [number * length for number, length in windows]
        parts = zip(*(y.split(stretches, dim=1) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v)))
        attended = []
        for part, (number, _) in zip(parts, windows):
            group = (rearrange(y, "t (n l) nh hd -> (t n) nh l hd", n=number) for y in part)
            attended.append(rearrange(self.attention(*group), "(t n) nh l hd -> t (n l) (nh hd)", n=number))
        return self.proj(torch.cat(attended, dim=1))


class VisionMLP(nn.Module):
    """SwiGLU with biases."""

    def __init__(self, config: VisionConfig, *, operations, dtype, device):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = operations.Linear(*sizes, dtype=dtype, device=device)
        self.up_proj = operations.Linear(*sizes, dtype=dtype, device=device)
        self.down_proj = operations.Linear(*reversed(sizes), dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig, *, attention: Attention, operations, dtype, device):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.norm1 = operations.RMSNorm(config.hidden_size, eps=NORM_EPS, **factory)
        self.norm2 = operations.RMSNorm(config.hidden_size, eps=NORM_EPS, **factory)
        self.attn = VisionAttention(config, attention=attention, operations=operations, **factory)
        self.mlp = VisionMLP(config, operations=operations, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, windows)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Patches `[t, cells * merge * merge, D]` -> tokens `[t, cells, out]` in the language model's width."""

    def __init__(self, config: VisionConfig, *, operations, dtype, device):
        super().__init__()
        self.patches = config.spatial_merge_size**2
        width = config.hidden_size * self.patches
        self.ln_q = operations.RMSNorm(config.hidden_size, eps=NORM_EPS, dtype=dtype, device=device)
        self.mlp = nn.Sequential(
            operations.Linear(width, width, dtype=dtype, device=device),
            nn.GELU(),
            operations.Linear(width, config.out_hidden_size, dtype=dtype, device=device),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(rearrange(self.ln_q(x), "t (n m) d -> t n (m d)", m=self.patches))


class VisionTower(nn.Module):
    """Images and clips -> tokens for the language model. Parameter names are those of the release's `vit.safetensors`.

    `dtype` is that of the weights; the tower computes in it, or in the dtype that `forward` is given where the layers
    cast their weights. `rounded_rope` rounds the rotary inverse frequencies to bfloat16, as they were in the published
    results; None: when computing in bfloat16.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        operations=nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: Attention = default_attention,
        rounded_rope: bool | None = None,
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        self.rounded_rope = rounded_rope
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.patch_embed = PatchEmbed(config, **factory)
        self.blocks = nn.ModuleList(VisionBlock(config, attention=attention, **factory) for _ in range(config.depth))
        self.merger = PatchMerger(config, **factory)

    def grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """(t, h, w): temporal steps, and rows and columns in patches, of pixels `[3, F, H, W]`.

        Raises LanceError where frames or pixels do not divide into whole tokens.
        """
        _, frames, height, width = pixels.shape
        cell = self.config.patch_size * self.config.spatial_merge_size
        if height % cell or width % cell or not height or not width:
            raise LanceError(
                f"The vision tower was given frames of {width}x{height} pixels;"
                f" resize them so that width and height are multiples of {cell}."
            )
        if frames % self.config.temporal_patch_size or not frames:
            raise LanceError(
                f"The vision tower was given {frames} frames; repeat the last one so that the number is a multiple of"
                f" {self.config.temporal_patch_size}."
            )
        patch = self.config.patch_size
        return frames // self.config.temporal_patch_size, height // patch, width // patch

    def working_memory(self, frames: int, height: int, width: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of what lives at the same time in a layer for so many frames of so many pixels.

        The residual stream and its update; gate, up and their product in the MLP, beside which attention is small.
        """
        config = self.config
        steps = math.ceil(frames / config.temporal_patch_size)
        patches = steps * (height // config.patch_size) * (width // config.patch_size)
        return patches * (2 * config.hidden_size + 3 * config.intermediate_size) * (dtype or self.dtype).itemsize

    def frequencies(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Rotary inverse frequencies `[hd/4]`, float32, of either spatial axis, for computing in `dtype`."""
        rounded = (dtype or self.dtype) == torch.bfloat16 if self.rounded_rope is None else self.rounded_rope
        return inverse_frequencies(self.config.head_dim // 2, ROPE_THETA, rounded, device=device)

    def forward(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Tokens `[n, D]` of one image or clip, n = t * (h/2) * (w/2) in the order (t, h/2, w/2).

        `pixels` is `[3, F, H, W]` from `normalize_pixels`. Raises LanceError as `grid` does.
        """
        _, h, w = self.grid(pixels)
        merge = self.config.spatial_merge_size
        size = self.config.window_size // (self.config.patch_size * merge)
        groups = window_groups(h // merge, w // merge, size, pixels.device)
        order = torch.cat([group.flatten() for group in groups])
        windows = [(group.shape[0], group.shape[1] * merge**2) for group in groups]

        angles = rotary_angles(h, w, merge, self.frequencies(pixels.device, dtype))
        angles = rearrange(angles[order], "n m a -> (n m) 1 a")
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

        x = self.patch_embed(pixels.to(dtype or self.dtype))
        x = rearrange(x[:, order], "t n m d -> t (n m) d")
        for index, block in enumerate(self.blocks):
            whole_step = index in self.config.fullatt_block_indexes
            x = block(x, cos, sin, [(1, h * w)] if whole_step else windows)
        tokens = self.merger(x)[:, order.argsort()]
        return rearrange(tokens, "t n d -> (t n) d")
