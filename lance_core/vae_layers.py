"""The layers of the Wan 2.2 VAE, which take a clip frame by frame.

An activation is one frame `[b, c, h, w]` at the resolution of its stage; causal layers find the frames before it in
the `Moment`. One output frame of a causal 3-D convolution is a 2-D convolution over the channels of the frames it
sees: no zero frame is ever made or multiplied, and no more than a frame of any activation exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """The place of a frame in its clip, and what the causal layers kept of the frames before.

    `past` is made anew for every clip and shared by its frames.
    """

    first: bool
    last: bool
    past: dict[nn.Module, tuple[Tensor, ...]]

    def recall(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """The frames that `layer` kept, the latest last; it keeps them no longer."""
        return self.past.pop(layer, ())

    def keep(self, layer: nn.Module, frames: tuple[Tensor, ...]) -> None:
        """Keeps frames for the layer's next one, if there is to be one."""
        if not self.last:
            self.past[layer] = frames

    def window(self, layer: nn.Module, x: Tensor, length: int) -> Tensor:
        """x `[b, c, h, w]` behind the frames that `layer` kept: `[b, (t c), h, w]`, t up to `length`."""
        frames = (*self.recall(layer), x)
        if length > 1:
            self.keep(layer, frames[1 - length :])
        return torch.cat(frames, dim=1) if len(frames) > 1 else x

    def split(self, count: int) -> list[Moment]:
        """The places of the frames that become of this one."""
        return [replace(self, last=self.last and i == count - 1) for i in range(count)]


@cache
def causal_conv3d(operations: object) -> type[nn.Conv3d]:
    """The causal 3-D convolution over a host's Conv3d."""

    class CausalConv3d(operations.Conv3d):
        """A 3-D convolution that sees the present and the past; before the first frame lie zeros."""

        def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1, **factory):
            same = (0, kernel[1] // 2, kernel[2] // 2)
            super().__init__(inputs, outputs, kernel, stride=(stride, 1, 1), padding=same, **factory)

        def forward(self, x: Tensor, moment: Moment) -> Tensor:
            return self.combine(moment.window(self, x, self.kernel_size[0]))

        def combine(self, window: Tensor) -> Tensor:
            """One output frame of all frames `[b, (t c), h, w]` that the kernel sees; before them lie zeros."""
            return super().forward(window)

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args, **kwargs) -> Tensor:
            taps = input.shape[1] // self.in_channels
            weight = rearrange(weight[:, :, -taps:], "o c t h w -> o (t c) h w")
            return F.conv2d(input, weight, bias, padding=self.padding[1:])

    return CausalConv3d


class ChannelNorm(nn.Module):
    """L2 normalisation over the channels times sqrt(c) and a learned gain, eps 1e-12, and SiLU behind it if `silu`.

    Computed in float32 at least, and rounded once.
    """

    def __init__(self, channels: int, axes: int, silu: bool, **factory):
        super().__init__()
        self.silu = silu
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes, **factory))

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        gain = self.gamma.to(x.device, precise).view(-1, 1, 1) * self.gamma.shape[0] ** 0.5
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=precise)
        y = (x / length.clamp(min=1e-12)).mul_(gain)
        return (F.silu(y, inplace=True) if self.silu else y).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after norm and SiLU, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, operations: object, **factory):
        super().__init__()
        conv3d = causal_conv3d(operations)
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(inputs, 3, silu=True, **factory),
                "2": conv3d(inputs, outputs, (3, 3, 3), **factory),
                "3": ChannelNorm(outputs, 3, silu=True, **factory),
                "6": conv3d(outputs, outputs, (3, 3, 3), **factory),
            }
        )
        self.shortcut = None if inputs == outputs else conv3d(inputs, outputs, (1, 1, 1), **factory)

    def forward(self, x: Tensor, moment: Moment) -> Tensor:
        y = self.residual["2"](self.residual["0"](x), moment)
        y = self.residual["6"](self.residual["3"](y), moment)
        return y.add_(x if self.shortcut is None else self.shortcut(x, moment))


class FrameAttention(nn.Module):
    """Full self-attention inside a frame, one head."""

    def __init__(self, channels: int, operations: object, **factory):
        super().__init__()
        self.norm = ChannelNorm(channels, 2, silu=False, **factory)
        self.to_qkv = operations.Conv2d(channels, 3 * channels, 1, **factory)
        self.proj = operations.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor, moment: Moment) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b (qkv c) h w -> qkv b 1 (h w) c", qkv=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves rows and columns and, if `time`, the frames after the clip's first: every other call returns None."""

    def __init__(self, channels: int, time: bool, operations: object, **factory):
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(channels, channels, 3, stride=2, **factory)})
        conv3d = causal_conv3d(operations)
        self.time_conv = conv3d(channels, channels, (3, 1, 1), stride=2, **factory) if time else None

    def forward(self, x: Tensor, moment: Moment) -> Tensor | None:
        x = self.resample["1"](F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        seen = (*moment.recall(self.time_conv), x)
        if len(seen) == 2:
            moment.keep(self.time_conv, seen)
            return None
        moment.keep(self.time_conv, (x,))
        return x if moment.first else self.time_conv.combine(torch.cat(seen, dim=1))


class Upsample(nn.Module):
    """Doubles rows and columns and, if `time`, the frames after the clip's first latent frame."""

    def __init__(self, channels: int, time: bool, operations: object, **factory):
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(channels, channels, 3, padding=1, **factory)})
        conv3d = causal_conv3d(operations)
        self.time_conv = conv3d(channels, 2 * channels, (3, 1, 1), **factory) if time else None

    def forward(self, x: Tensor, moment: Moment) -> list[Tensor]:
        frames = (x,)
        if self.time_conv is not None and not moment.first:
            frames = self.time_conv(x, moment).chunk(2, dim=1)
        return [self.resample["1"](F.interpolate(frame, scale_factor=2.0, mode="nearest-exact")) for frame in frames]


def average_down(frames: tuple[Tensor, ...], channels: int, time: int) -> Tensor:
    """The encoder's shortcut: folds `time` frames into the channels, then averages groups of them.

    Frames `[b, c, h, w]`, already averaged over the cells that become one, -> `[b, channels, h, w]`. Missing frames are
    zeros before the others.
    """
    missing = (torch.zeros_like(frames[0]),) * (time - len(frames))
    x = torch.stack((*missing, *frames), dim=2).flatten(1, 2)
    return reduce(x, "b (c g) h w -> b c h w", "mean", c=channels)


def repeat_up(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """The decoder's shortcut: repeats channels, then unfolds them into `time` x `space` x `space` cells.

    `[b, c, h, w]` -> `[time, b, channels, h, space or 1, w, space or 1]`; a view, whose equal cells are one.
    """
    sources = x.shape[1] // channels
    p = min(time, sources)
    q = min(space, sources // p)
    cells = rearrange(x, "b (c p q r) h w -> p b c h q w r", c=channels, p=p, q=q)
    return cells.expand(time, *cells.shape[1:])


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

    def forward(self, x: Tensor, moment: Moment) -> Tensor | None:
        averaged = reduce(x, "b c (h q) (w r) -> b c h w", "mean", q=self.space, r=self.space)
        seen = (*moment.recall(self), averaged)
        x = run(self.downsamples, x, moment)
        if x is None:
            moment.keep(self, seen)
            return None
        return x + average_down(seen, self.channels, self.time)  # x may be kept by the last layer


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

    def forward(self, x: Tensor, moment: Moment) -> list[tuple[Tensor, Moment]]:
        """The frames that x becomes, in order, each with its place in the clip."""
        if self.space == 1:
            return [(run(self.upsamples, x, moment), moment)]
        *blocks, upsample = self.upsamples
        frames = upsample(run(blocks, x, moment), moment)
        shortcut = repeat_up(x, self.channels, self.time, self.space)
        for frame, cells in zip(frames, shortcut[-len(frames) :]):
            rearrange(frame, "b c (h q) (w r) -> b c h q w r", q=self.space, r=self.space).add_(cells)
        return list(zip(frames, moment.split(len(frames))))

    @property
    def reach(self) -> int:
        """Cells on either side that the residual blocks see."""
        return 2 * sum(isinstance(layer, ResidualBlock) for layer in self.upsamples)


class Head(nn.ModuleDict):
    """Norm, SiLU and the last causal convolution."""

    def __init__(self, inputs: int, outputs: int, operations: object, **factory):
        conv = causal_conv3d(operations)(inputs, outputs, (3, 3, 3), **factory)
        super().__init__({"0": ChannelNorm(inputs, 3, silu=True, **factory), "2": conv})

    def forward(self, x: Tensor, moment: Moment) -> Tensor:
        return self["2"](self["0"](x), moment)


def middle(channels: int, operations: object, **factory) -> nn.ModuleList:
    """What lies between the stages and the latent."""
    return nn.ModuleList(
        (
            ResidualBlock(channels, channels, operations, **factory),
            FrameAttention(channels, operations, **factory),
            ResidualBlock(channels, channels, operations, **factory),
        )
    )


def run(layers: Iterable[nn.Module], x: Tensor, moment: Moment) -> Tensor | None:
    """One frame through layers; None where one of them waits for more frames."""
    for layer in layers:
        x = layer(x, moment)
        if x is None:
            break
    return x
