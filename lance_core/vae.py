"""The Wan 2.2 causal 3-D VAE: 16x in space, 4x in time, 48 channels; frame by frame, in exact tiles for decoding.

Parameter names are those of the released `Wan2.2_VAE.pth` (official file: modeling/vae/wan/vae2_2.py).
Letters: B batch, F pixel frames, H W pixels, T h w latent frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from torch import Tensor, nn

from .errors import LanceError
from .vae_layers import DownStage, Head, Moment, UpStage, causal_conv3d, middle, run

# Statistics of the 48 channels, published with Wan 2.2: normalised latent = (raw - mean) / std.
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def normalize(latent: Tensor) -> Tensor:
    """Raw latent `[B, 48, T, h, w]` -> the normalised space in which the model denoises; computed in float32."""
    mean, std = _statistics(latent.device)
    return ((latent.float() - mean) / std).to(latent.dtype)


def denormalize(latent: Tensor) -> Tensor:
    """Normalised latent `[B, 48, T, h, w]` -> raw, as the decoder takes it; the inverse of `normalize`."""
    mean, std = _statistics(latent.device)
    return (latent.float() * std + mean).to(latent.dtype)


def _statistics(device: torch.device) -> Tensor:
    return torch.tensor((LATENT_MEAN, LATENT_STD), device=device).view(2, -1, 1, 1, 1)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a Wan 2.2 VAE. The defaults are the release's; stages are listed from pixels to latent."""

    encoder_width: int = 160
    decoder_width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    latent_channels: int = 48
    blocks: int = 2
    time_downsample: tuple[bool, ...] = (False, True, True)
    patch: int = 2

    @property
    def space_factor(self) -> int:
        """Pixels per latent row or column: 16."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame after the first: 4."""
        return 2 ** sum(self.time_downsample)


def vae_config(shapes: Mapping[str, tuple]) -> VAEConfig:
    """Sizes from the tensor shapes of a checkpoint.

    `shapes` maps the names of `Wan2.2_VAE.pth` to shapes, without a prefix. Raises LanceError where names or shapes are
    not those of a Wan 2.2 VAE of any width.
    """
    found = {name: tuple(shape) for name, shape in shapes.items()}
    stage = VAEConfig.multipliers[-1]
    for name in ("encoder.conv1.weight", "decoder.conv1.weight"):
        if len(found.get(name, ())) != 5 or found[name][0] < stage:
            raise _not_wan22(name, found.get(name), "a convolution's five sizes")
    config = VAEConfig(
        encoder_width=found["encoder.conv1.weight"][0],
        decoder_width=found["decoder.conv1.weight"][0] // stage,
    )
    expected = {name: tuple(p.shape) for name, p in WanVAE(config, device="meta").named_parameters()}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise _not_wan22(name, found.get(name), expected.get(name))
    return config


def _not_wan22(name: str, found: tuple | None, expected: object) -> LanceError:
    return LanceError(
        f"The VAE checkpoint is not a Wan 2.2 VAE: '{name}' is {'missing' if found is None else found} where "
        f"{'nothing' if expected is None else expected} is expected; use the release's Wan2.2_VAE.pth."
    )


class Encoder(nn.Module):
    """A patchified frame `[B, 12, H/2, W/2]` -> `[B, 96, h, w]`, or None until a latent frame is complete."""

    def __init__(self, config: VAEConfig, operations: object, **factory):
        super().__init__()
        widths = [config.encoder_width * m for m in (1, *config.multipliers)]
        last = len(config.multipliers) - 1
        conv3d = causal_conv3d(operations)
        self.conv1 = conv3d(3 * config.patch**2, widths[0], (3, 3, 3), **factory)
        self.downsamples = nn.ModuleList(
            DownStage(
                widths[i],
                widths[i + 1],
                config.blocks,
                time=i < last and config.time_downsample[i],
                space=i < last,
                operations=operations,
                **factory,
            )
            for i in range(last + 1)
        )
        self.middle = middle(widths[-1], operations, **factory)
        self.head = Head(widths[-1], 2 * config.latent_channels, operations, **factory)

    def forward(self, x: Tensor, moment: Moment) -> Tensor | None:
        return run((self.conv1, *self.downsamples, *self.middle, self.head), x, moment)


# Rows and columns of every stage's input, and of the result.
Windows = Sequence[tuple[slice, slice]]


class Decoder(nn.Module):
    """A latent frame `[B, 48, h, w]` -> patchified frames `[B, 12, H/2, W/2]`: one of the clip's first, else four.

    In two parts: `begin`, whose attention needs the whole frame, and `finish`, which may go tile by tile.
    """

    def __init__(self, config: VAEConfig, operations: object, **factory):
        super().__init__()
        multipliers = config.multipliers[::-1]
        widths = [config.decoder_width * m for m in (multipliers[0], *multipliers)]
        last = len(multipliers) - 1
        conv3d = causal_conv3d(operations)
        self.conv1 = conv3d(config.latent_channels, widths[0], (3, 3, 3), **factory)
        self.middle = middle(widths[0], operations, **factory)
        self.upsamples = nn.ModuleList(
            UpStage(
                widths[i],
                widths[i + 1],
                config.blocks + 1,
                time=i < last and config.time_downsample[::-1][i],
                space=i < last,
                operations=operations,
                **factory,
            )
            for i in range(last + 1)
        )
        self.head = Head(widths[-1], 3 * config.patch**2, operations, **factory)

    def begin(self, x: Tensor, moment: Moment) -> Tensor:
        """The frame before the upsampling stages, in latent rows and columns."""
        return run((self.conv1, *self.middle), x, moment)

    def finish(self, x: Tensor, moment: Moment, windows: Windows) -> Iterator[Tensor]:
        """The frames of what `begin` returned, depth first: each is finished before the next is made."""
        waiting = [(0, x, moment)]
        while waiting:
            depth, x, moment = waiting.pop()
            if depth == len(self.upsamples):
                yield self.head(x, moment)[(..., *windows[depth])]
                continue
            frames = self.upsamples[depth](x[(..., *windows[depth])], moment)
            waiting += [(depth + 1, *frame) for frame in reversed(frames)]
            del x, frames

    def windows(self, span: slice, size: int) -> list[slice]:
        """Along an axis of `size` latents: what of every stage's input, and of the result, to go on with.

        No more than the pixels of `span` depend on. Each window counts from where the one before it begins.
        """
        windows, begin, scale = [], 0, 1
        for space, margin in zip((*(stage.space for stage in self.upsamples), 1), (*self._margins(), 0)):
            start = max(0, span.start * scale - margin)
            stop = min(size * scale, span.stop * scale + margin)
            windows.append(slice(start - begin, stop - begin))
            begin, scale = start * space, scale * space
        return windows

    def _margins(self) -> list[int]:
        """Per stage, how many cells of its input around a region matter for the pixels in it."""
        cells, margins = 1, []  # the head's convolution
        for stage in reversed(self.upsamples):
            if stage.space > 1:
                cells = -(-(cells + 1) // stage.space)
            cells += stage.reach
            margins.append(cells)
        return margins[::-1]


class WanVAE(nn.Module):
    """The VAE of Wan 2.2. `operations` supplies Conv2d and Conv3d; `dtype` and `device` are those of the weights.

    Nothing of a clip stays on the module between calls. Call it without gradients.
    """

    def __init__(
        self,
        config: VAEConfig = VAEConfig(),
        *,
        operations: object = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        factory = {"dtype": dtype, "device": device}
        conv3d = causal_conv3d(operations)
        channels = config.latent_channels
        self.encoder = Encoder(config, operations, **factory)
        self.conv1 = conv3d(2 * channels, 2 * channels, (1, 1, 1), **factory)
        self.conv2 = conv3d(channels, channels, (1, 1, 1), **factory)
        self.decoder = Decoder(config, operations, **factory)

    def encode(self, frames: Tensor, on_chunk: Callable[[int, int], None] | None = None) -> tuple[Tensor, Tensor]:
        """Frames `[B, 3, F, H, W]` in -1..1 -> raw mean and log-variance of the posterior, both `[B, 48, T, h, w]`.

        T = 1 + (F - 1) // 4: up to three frames left over at the end are dropped. `on_chunk(done, total)` is called
        after each latent frame and may raise to stop. Raises LanceError for other shapes, or where H or W is not a
        multiple of 16.
        """
        size = self.config.space_factor
        if frames.ndim != 5 or frames.shape[1] != 3 or 0 in frames.shape or any(n % size for n in frames.shape[3:]):
            raise LanceError(
                f"The VAE cannot encode frames of shape {list(frames.shape)}: give [batch, 3, frames, height, width] "
                f"with height and width multiples of {size}."
            )
        total = 1 + (frames.shape[2] - 1) // self.config.time_factor
        used = frames[:, :, : 1 + self.config.time_factor * (total - 1)].unbind(2)
        q = self.config.patch
        moments = []
        for frame, moment in zip(used, clip(len(used))):
            x = rearrange(frame, "b c (h q) (w r) -> b (c r q) h w", q=q, r=q)
            x = self.encoder(in_fast_layout(x), moment)
            if x is None:
                continue
            moments.append(self.conv1(x, moment))
            if on_chunk:
                on_chunk(len(moments), total)
        mean, logvar = torch.stack(moments, dim=2).chunk(2, dim=1)
        return mean, logvar

    def decode(
        self,
        latent: Tensor,
        *,
        tile: int | None = None,
        device: torch.device | str | None = None,
        clamped: bool = True,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Raw latent `[B, 48, T, h, w]` -> frames `[B, 3, 4(T-1)+1, 16h, 16w]`, clamped to -1..1.

        clamped: not when training, for what is clamped learns nothing.

        tile: the largest side, in latent rows and columns (at least 2), of tiles that are decoded one after the other;
        None decodes whole frames. The attention in the middle of the decoder sees whole frames either way, and a tile
        is decoded with all that its pixels depend on, so the result is the same to rounding, for less memory and more
        computation. device: where the frames are collected, one by one; None: where the latent is.
        `on_chunk(done, total)` is called after each latent frame of each tile and may raise to stop. Raises LanceError
        for other shapes or tiles.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.latent_channels or 0 in latent.shape:
            raise LanceError(
                f"The VAE cannot decode a latent of shape {list(latent.shape)}: give [batch, "
                f"{self.config.latent_channels}, frames, rows, columns]."
            )
        if tile is not None and tile < 2:
            raise LanceError(f"The VAE cannot decode in tiles of {tile}: give a tile of 2 latent rows or more.")
        b, _, t, h, w = latent.shape
        scale, q = self.config.space_factor, self.config.patch
        size = (b, 3, 1 + self.config.time_factor * (t - 1), h * scale, w * scale)
        out = torch.empty(size, dtype=latent.dtype, device=device or latent.device)
        tiles = list(product(spans(h, tile or h), spans(w, tile or w)))
        starts = self._begin(latent)
        if len(tiles) > 1:
            starts = list(starts)
        for index, (rows, columns) in enumerate(tiles):
            windows = list(zip(self.decoder.windows(rows, h), self.decoder.windows(columns, w)))
            target = out[..., _scaled(rows, scale), _scaled(columns, scale)]
            number = 0
            for done, (x, moment) in enumerate(zip(starts, clip(t)), start=1):
                for frame in self.decoder.finish(x, moment, windows):
                    pixels = rearrange(frame, "b (c r q) h w -> b c (h q) (w r)", q=q, r=q)
                    target[:, :, number] = pixels.clamp(-1.0, 1.0) if clamped else pixels
                    number += 1
                if on_chunk:
                    on_chunk(index * t + done, len(tiles) * t)
        return out

    def _begin(self, latent: Tensor) -> Iterator[Tensor]:
        for frame, moment in zip(latent.unbind(2), clip(latent.shape[2])):
            yield self.decoder.begin(self.conv2(in_fast_layout(frame), moment), moment)


def clip(length: int) -> Iterator[Moment]:
    """The places of a new clip's frames."""
    past: dict[nn.Module, tuple[Tensor, ...]] = {}
    for index in range(length):
        yield Moment(first=index == 0, last=index == length - 1, past=past)


def in_fast_layout(x: Tensor) -> Tensor:
    """x `[b, c, h, w]` with the channels last in memory where convolutions are known to like it, which then keep it so.

    That is on CPUs, and on NVIDIA GPUs in half precision, whose tensor cores take no other layout.
    """
    half_on_cuda = x.is_cuda and torch.version.cuda is not None and x.dtype in (torch.float16, torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" or half_on_cuda else x


def spans(size: int, tile: int) -> list[slice]:
    """The fewest stretches of at most `tile` that cover an axis of `size`, as equal as can be."""
    count = -(-size // tile)
    return [slice(i * size // count, (i + 1) * size // count) for i in range(count)]


def _scaled(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)
