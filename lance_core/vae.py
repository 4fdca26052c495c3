"""The Wan 2.2 causal 3-D VAE: 16x in space, 4x in time, 48 channels; streaming in time, tiled in space for decoding.

Parameter names are those of the released `Wan2.2_VAE.pth` (official file: modeling/vae/wan/vae2_2.py).
Letters: B batch, F pixel frames, H W pixels, T h w latent frames, rows and columns. Inside the networks an activation
is `[b, c, t, h, w]` at the resolution of its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from .errors import LanceError

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


@dataclass(frozen=True)
class Chunk:
    """One step of a stream through time: its place in the clip, and what the causal layers kept of the frames before.

    `past` is made anew for every clip and shared by its chunks.
    """

    first: bool
    last: bool
    past: dict[nn.Module, Tensor]

    def recall(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x `[b, c, t, h, w]` behind the frames that `layer` kept."""
        past = self.past.pop(layer, None)
        return x if past is None else torch.cat((past, x), dim=2)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keeps frames for the layer's next chunk; a copy, so that the rest of the activation is freed."""
        if not self.last:
            self.past[layer] = frames.contiguous()


@cache
def _causal_conv3d(operations: object) -> type[nn.Conv3d]:
    class CausalConv3d(operations.Conv3d):
        """A 3-D convolution that sees the present and the past; before the first frame lie zeros."""

        def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1, **factory):
            same = (0, kernel[1] // 2, kernel[2] // 2)
            super().__init__(inputs, outputs, kernel, stride=(stride, 1, 1), padding=same, **factory)
            self.reach = kernel[0] - stride

        def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
            frames = x.shape[2]
            seen = chunk.recall(self, x)
            if self.reach:
                chunk.keep(self, seen[:, :, -self.reach :])
            if frames > 1:
                seen = F.pad(seen, (0, 0, 0, 0, self.reach + frames - seen.shape[2], 0))
            return super().forward(seen)

        def _conv_forward(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
            # A single frame with less past than taps: the taps that would meet only zeros are left out.
            return super()._conv_forward(input, weight[:, :, -input.shape[2] :], *args, **kwargs)

    return CausalConv3d


class ChannelNorm(nn.Module):
    """L2 normalisation over the channels times sqrt(c) and a learned gain; computed in float32, eps 1e-12."""

    def __init__(self, channels: int, axes: int, **factory):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes, **factory))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gamma.to(x.device, torch.float32) * self.gamma.shape[0] ** 0.5
        return (F.normalize(x.float(), dim=1, eps=1e-12) * gain).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after norm and SiLU, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, operations: object, **factory):
        super().__init__()
        conv3d = _causal_conv3d(operations)
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(inputs, 3, **factory),
                "2": conv3d(inputs, outputs, (3, 3, 3), **factory),
                "3": ChannelNorm(outputs, 3, **factory),
                "6": conv3d(outputs, outputs, (3, 3, 3), **factory),
            }
        )
        self.shortcut = None if inputs == outputs else conv3d(inputs, outputs, (1, 1, 1), **factory)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        y = self.residual["2"](F.silu(self.residual["0"](x)), chunk)
        y = self.residual["6"](F.silu(self.residual["3"](y)), chunk)
        return y + (x if self.shortcut is None else self.shortcut(x, chunk))


class FrameAttention(nn.Module):
    """Full self-attention inside each frame, one head."""

    def __init__(self, channels: int, operations: object, **factory):
        super().__init__()
        self.norm = ChannelNorm(channels, 2, **factory)
        self.to_qkv = operations.Conv2d(channels, 3 * channels, 1, **factory)
        self.proj = operations.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        b, _, t, h, w = x.shape
        qkv = self.to_qkv(self.norm(rearrange(x, "b c t h w -> (b t) c h w")))
        q, k, v = rearrange(qkv, "bt (qkv c) h w -> qkv bt 1 (h w) c", qkv=3)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(rearrange(y, "bt 1 (h w) c -> bt c h w", h=h, w=w))
        return x + rearrange(y, "(b t) c h w -> b c t h w", b=b, t=t)


class Downsample(nn.Module):
    """Halves rows and columns and, if `time`, the frames after the clip's first."""

    def __init__(self, channels: int, time: bool, operations: object, **factory):
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(channels, channels, 3, stride=2, **factory)})
        conv3d = _causal_conv3d(operations)
        self.time_conv = conv3d(channels, channels, (3, 1, 1), stride=2, **factory) if time else None

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        b = x.shape[0]
        x = F.pad(rearrange(x, "b c t h w -> (b t) c h w"), (0, 1, 0, 1))
        x = rearrange(self.resample["1"](x), "(b t) c h w -> b c t h w", b=b)
        if self.time_conv is None:
            return x
        if chunk.first:
            chunk.keep(self.time_conv, x)
            return x
        return self.time_conv(x, chunk)


class Upsample(nn.Module):
    """Doubles rows and columns and, if `time`, the frames after the clip's first latent frame."""

    def __init__(self, channels: int, time: bool, operations: object, **factory):
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(channels, channels, 3, padding=1, **factory)})
        conv3d = _causal_conv3d(operations)
        self.time_conv = conv3d(channels, 2 * channels, (3, 1, 1), **factory) if time else None

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        b = x.shape[0]
        if self.time_conv is not None and not chunk.first:
            x = rearrange(self.time_conv(x, chunk), "b (p c) t h w -> b c (t p) h w", p=2)
        x = F.interpolate(rearrange(x, "b c t h w -> (b t) c h w"), scale_factor=2.0, mode="nearest-exact")
        return rearrange(self.resample["1"](x), "(b t) c h w -> b c t h w", b=b)


def average_down(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """The encoder's shortcut: folds `time` x `space` x `space` cells into channels, then averages groups of them.

    `[b, c, t, h, w]` -> `[b, channels, ceil(t / time), h / space, w / space]`; an odd first frame has zeros before it.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0)) if x.shape[2] % time else x
    x = reduce(x, "b c (t p) (h q) (w r) -> b (c p) t h w", "mean", p=time, q=space, r=space)
    return reduce(x, "b (c g) t h w -> b c t h w", "mean", c=channels)


def repeat_up(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """The decoder's shortcut: repeats channels, then unfolds them into `time` x `space` x `space` cells.

    `[b, c, t, h, w]` -> `[b, channels, t * time, h * space, w * space]`.
    """
    x = repeat(x, "b c t h w -> b (c g) t h w", g=channels * time * space * space // x.shape[1])
    return rearrange(x, "b (c p q r) t h w -> b c (t p) (h q) (w r)", c=channels, p=time, q=space, r=space)


class DownStage(nn.Module):
    """Residual blocks, then (except in the last stage) a Downsample, around an averaging shortcut."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, *, time: bool, space: bool, operations: object, **factory
    ):
        super().__init__()
        self.channels, self.time, self.space = outputs, 1 + time, 1 + space
        layers = [ResidualBlock(outputs if i else inputs, outputs, operations, **factory) for i in range(blocks)]
        if space:
            layers.append(Downsample(outputs, time, operations, **factory))
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        return _run(self.downsamples, x, chunk) + average_down(x, self.channels, self.time, self.space)


class UpStage(nn.Module):
    """Residual blocks, then (except in the last stage) an Upsample around a repeating shortcut."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, *, time: bool, space: bool, operations: object, **factory
    ):
        super().__init__()
        self.channels, self.time, self.space = outputs, 1 + time, 1 + space
        layers = [ResidualBlock(outputs if i else inputs, outputs, operations, **factory) for i in range(blocks)]
        if space:
            layers.append(Upsample(outputs, time, operations, **factory))
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        y = _run(self.upsamples, x, chunk)
        if self.space == 1:
            return y
        shortcut = repeat_up(x, self.channels, self.time, self.space)
        return y + shortcut[:, :, -y.shape[2] :]


class Head(nn.ModuleDict):
    """Norm, SiLU and the last causal convolution."""

    def __init__(self, inputs: int, outputs: int, operations: object, **factory):
        conv = _causal_conv3d(operations)(inputs, outputs, (3, 3, 3), **factory)
        super().__init__({"0": ChannelNorm(inputs, 3, **factory), "2": conv})

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        return self["2"](F.silu(self["0"](x)), chunk)


class Encoder(nn.Module):
    """A chunk of patchified frames `[B, 12, 1 or 4, H/2, W/2]` -> `[B, 96, 1, h, w]`."""

    def __init__(self, config: VAEConfig, operations: object, **factory):
        super().__init__()
        widths = [config.encoder_width * m for m in (1, *config.multipliers)]
        last = len(config.multipliers) - 1
        conv3d = _causal_conv3d(operations)
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
        self.middle = _middle(widths[-1], operations, **factory)
        self.head = Head(widths[-1], 2 * config.latent_channels, operations, **factory)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        return _run((self.conv1, *self.downsamples, *self.middle, self.head), x, chunk)


class Decoder(nn.Module):
    """A latent frame `[B, 48, 1, h, w]` -> a chunk of patchified frames `[B, 12, 1 or 4, H/2, W/2]`."""

    def __init__(self, config: VAEConfig, operations: object, **factory):
        super().__init__()
        multipliers = config.multipliers[::-1]
        widths = [config.decoder_width * m for m in (multipliers[0], *multipliers)]
        last = len(multipliers) - 1
        conv3d = _causal_conv3d(operations)
        self.conv1 = conv3d(config.latent_channels, widths[0], (3, 3, 3), **factory)
        self.middle = _middle(widths[0], operations, **factory)
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

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        return _run((self.conv1, *self.middle, *self.upsamples, self.head), x, chunk)


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
        conv3d = _causal_conv3d(operations)
        channels = config.latent_channels
        self.encoder = Encoder(config, operations, **factory)
        self.conv1 = conv3d(2 * channels, 2 * channels, (1, 1, 1), **factory)
        self.conv2 = conv3d(channels, channels, (1, 1, 1), **factory)
        self.decoder = Decoder(config, operations, **factory)

    def encode(self, frames: Tensor, on_chunk: Callable[[int, int], None] | None = None) -> tuple[Tensor, Tensor]:
        """Frames `[B, 3, F, H, W]` in -1..1 -> raw mean and log-variance of the posterior, both `[B, 48, T, h, w]`.

        Frames are taken in chunks 1, 4, 4, ... and T = 1 + (F - 1) // 4: up to three frames left over at the end are
        dropped. `on_chunk(done, total)` is called after each chunk and may raise to stop. Raises LanceError for other
        shapes, or where H or W is not a multiple of 16.
        """
        size = self.config.space_factor
        if frames.ndim != 5 or frames.shape[1] != 3 or 0 in frames.shape or any(n % size for n in frames.shape[3:]):
            raise LanceError(
                f"The VAE cannot encode frames of shape {list(frames.shape)}: give [batch, 3, frames, height, width] "
                f"with height and width multiples of {size}."
            )
        total = 1 + (frames.shape[2] - 1) // self.config.time_factor
        q = self.config.patch
        moments = []
        for chunk, span in self._chunks(total):
            x = rearrange(frames[:, :, span], "b c f (h q) (w r) -> b (c r q) f h w", q=q, r=q)
            moments.append(self.conv1(self.encoder(x, chunk), chunk))
            if on_chunk:
                on_chunk(len(moments), total)
        mean, logvar = torch.cat(moments, dim=2).chunk(2, dim=1)
        return mean, logvar

    def decode(
        self, latent: Tensor, *, tile: int | None = None, on_chunk: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Raw latent `[B, 48, T, h, w]` -> frames `[B, 3, 4(T-1)+1, 16h, 16w]`, clamped to -1..1.

        `tile` is the side of a tile in latent rows and columns (at least 2); tiles overlap by a quarter and are blended
        linearly. Each frame has full attention in the middle of the decoder, which a tile limits to itself: a tiled
        result is an approximation of the whole one (None), for less memory. `on_chunk(done, total)` is called after
        each latent frame of each tile and may raise to stop. Raises LanceError for other shapes or tiles.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.latent_channels or 0 in latent.shape:
            raise LanceError(
                f"The VAE cannot decode a latent of shape {list(latent.shape)}: give [batch, "
                f"{self.config.latent_channels}, frames, rows, columns]."
            )
        if tile is not None and tile < 2:
            raise LanceError(f"The VAE cannot decode in tiles of {tile}: give a tile of 2 latent rows or more.")
        b, _, t, h, w = latent.shape
        scale = self.config.space_factor
        rows = tile_axis(h, tile or h, scale)
        columns = tile_axis(w, tile or w, scale)
        tiles = list(product(rows, columns))
        size = (b, 3, 1 + self.config.time_factor * (t - 1), h * scale, w * scale)
        out = latent.new_zeros(size, dtype=torch.float32 if len(tiles) > 1 else latent.dtype)  # tiles are added up
        q = self.config.patch
        for index, ((row, row_weight), (column, column_weight)) in enumerate(tiles):
            target = out[..., _scaled(row, scale), _scaled(column, scale)]
            weight = torch.outer(row_weight, column_weight).to(out)
            frames = latent[..., row, column].split(1, dim=2)
            for done, (frame, (chunk, span)) in enumerate(zip(frames, self._chunks(t)), start=1):
                x = self.decoder(self.conv2(frame, chunk), chunk)
                x = rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=q, r=q)
                target[:, :, span] += x.clamp(-1.0, 1.0) * weight
                if on_chunk:
                    on_chunk(index * t + done, len(tiles) * t)
        return out.to(latent.dtype)

    def _chunks(self, total: int) -> Iterator[tuple[Chunk, slice]]:
        """The chunks of one clip, each with its pixel frames: 1, then `time_factor` each."""
        past: dict[nn.Module, Tensor] = {}
        step = self.config.time_factor
        for index in range(total):
            span = slice(max(0, 1 + step * (index - 1)), 1 + step * index)
            yield Chunk(first=index == 0, last=index == total - 1, past=past), span


def tile_axis(size: int, tile: int, scale: int) -> list[tuple[slice, Tensor]]:
    """Evenly spread tiles along an axis of `size` latents: each tile's span, and its pixels' weights `[span * scale]`.

    Neighbours overlap by at least a quarter of a tile; weights rise linearly over it and sum to one everywhere.
    """
    tile = min(tile, size)
    overlap = max(1, tile // 4)
    count = 1 if tile == size else -((overlap - size) // (tile - overlap))
    starts = [i * (size - tile) // max(1, count - 1) for i in range(count)]
    position = torch.arange(tile * scale) + 0.5
    ramp = (torch.minimum(position, tile * scale - position) / (overlap * scale)).clamp(max=1.0)
    weights = torch.zeros(count, size * scale)
    spans = [slice(start, start + tile) for start in starts]
    for weight, span in zip(weights, spans):
        weight[_scaled(span, scale)] = ramp
    weights = weights / weights.sum(dim=0)
    return [(span, weight[_scaled(span, scale)]) for span, weight in zip(spans, weights)]


def _scaled(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)


def _middle(channels: int, operations: object, **factory) -> nn.ModuleList:
    return nn.ModuleList(
        (
            ResidualBlock(channels, channels, operations, **factory),
            FrameAttention(channels, operations, **factory),
            ResidualBlock(channels, channels, operations, **factory),
        )
    )


def _run(layers: Iterable[nn.Module], x: Tensor, chunk: Chunk) -> Tensor:
    for layer in layers:
        x = layer(x, chunk)
    return x
