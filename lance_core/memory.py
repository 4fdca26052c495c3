"""What a request needs in device memory, in bytes, before it is run.

Weights are added up. What is computed is counted by `counting.peak`: the very code runs without data, of the decoder's
layers only the first few, for all are alike, and of a clip's frames only the first, for the others are too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from math import prod

import torch
from torch import Tensor, nn

from .attention import attention
from .config import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from .counting import on_meta, peak
from .sequence import Sequence, context_blocks, prefix_length, visual_first
from .text import tokens
from .transformer import Branch, LanceTransformer, NoiseBlock
from .vae import WanVAE
from .vit import VisionTower

STEADY_FRAMES = 4  # latent frames after which every further one adds as much as the one before
STEADY_LAYERS = 2


def roughly_looking(vision: VisionTower, shape: Items[int], dtype: torch.dtype) -> int:
    """More than `looking`, at once."""
    return 2 * vision.working_memory(*shape[1:], dtype) + 2 * prod(shape) * torch.float32.itemsize


def roughly_coding(vae: WanVAE, shape: Items[int], dtype: torch.dtype) -> int:
    """More than `encoding` and `decoding` for pixels `[B, 3, F, H, W]`, at once."""
    batch, channels, frames, height, width = shape
    layer = 16 * max(vae.config.encoder_width, vae.config.decoder_width, 16)
    return batch * height * width * (layer + 3 * channels * frames) * dtype.itemsize


def roughly_running(
    transformer: LanceTransformer, tokens: int, context: int, dtype: torch.dtype, branches: int = 1
) -> int:
    """More than `painting` and `answering` for so many tokens at a time, and so many of the context, at once."""
    layer = transformer.working_memory(max(tokens, context), dtype) + transformer.noise_memory(tokens, dtype)
    return 2 * branches * (layer + 2 * transformer.context_memory(context, dtype))


def looking(vision: VisionTower, shape: Items[int], dtype: torch.dtype) -> int:
    """Working memory of the vision tower for pixels of this shape `[3, F, H, W]`."""
    vision = on_meta(vision, attention=attention)
    return peak(lambda: vision(empty(shape, torch.float32), dtype))


def encoding(vae: WanVAE, shape: Items[int], dtype: torch.dtype) -> int:
    """Working memory of the VAE for pixels of this shape `[B, 3, F, H, W]`, and of the result."""
    vae = on_meta(vae)
    batch, channels, frames, height, width = shape

    def run(t: int) -> int:
        size = batch, channels, TEMPORAL_COMPRESSION * (t - 1) + 1, height, width
        return peak(lambda: vae.encode(empty(size, dtype)))

    return extended(run, 1 + (frames - 1) // TEMPORAL_COMPRESSION, STEADY_FRAMES)


def decoding(vae: WanVAE, shape: Items[int], dtype: torch.dtype, tile: int | None = None) -> int:
    """Working memory of the VAE for a latent of this shape `[B, 48, T, h, w]`; the frames are collected elsewhere."""
    vae = on_meta(vae)
    batch, channels, frames, height, width = shape

    def run(t: int) -> int:
        pixels = batch * 3 * (TEMPORAL_COMPRESSION * (t - 1) + 1) * height * width * SPATIAL_COMPRESSION**2
        whole = peak(lambda: vae.decode(empty((batch, channels, t, height, width), dtype), tile=tile))
        return whole - pixels * dtype.itemsize

    return extended(run, frames, STEADY_FRAMES)


def painting(
    transformer: LanceTransformer, sequences: Items[Sequence], batch: int, together: bool, dtype: torch.dtype
) -> int:
    """Working memory of the decoder for one or two branches of guidance, keys and values included.

    together: as in `LanceTransformer.velocities`.
    """

    def run(transformer: LanceTransformer) -> None:
        width = transformer.config.hidden_size
        (noise,) = sequences[0].find("noise")
        t, h, w = noise.grid
        rows = empty((t * h * w, width), dtype)
        branches = [
            Branch(context, noise_block(transformer, sequence, rows))
            for context, sequence in zip(contexts(transformer, sequences, dtype), sequences)
        ]
        x = empty((batch, t * h * w, LATENT_CHANNELS), torch.float32)
        transformer.velocities(x, empty((1, t), torch.float32), branches, together=together)

    return through_layers(transformer, run)


def answering(transformer: LanceTransformer, sequence: Sequence, limit: int, dtype: torch.dtype) -> int:
    """Working memory of the decoder for a question and up to `limit` tokens of an answer."""

    def run(transformer: LanceTransformer) -> None:
        first = torch.zeros(1, dtype=torch.int64, device="meta")
        next(tokens(transformer, *contexts(transformer, [sequence], dtype), first, 0, lambda logits: first, limit))

    return through_layers(transformer, run)


def contexts(transformer: LanceTransformer, sequences: Items[Sequence], dtype: torch.dtype) -> list:
    """The contexts of all branches; what they begin with is computed once."""
    parts = [context_blocks(sequence, *references(transformer, sequence, dtype), "meta") for sequence in sequences]
    if len(parts) == 1:
        return [transformer.prefill(parts[0], dtype=dtype)]
    words = prefix_length(sequences[0])
    shared = transformer.prefill(parts[0][:words], dtype=dtype)
    return [transformer.prefill(blocks[words:], shared, dtype=dtype) for blocks in parts]


def references(transformer: LanceTransformer, sequence: Sequence, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """Embeddings and latents for the blocks of a sequence, without values."""
    semantics, latents = [], []
    for segment in sequence.segments:
        t, h, w = segment.grid or (0, 0, 0)
        if segment.role == "semantic":
            semantics.append(empty((t * h * w, transformer.config.hidden_size), torch.float32))
        elif segment.role in ("source", "identity"):
            latents.append(empty((LATENT_CHANNELS, t, h, w), torch.float32))
    return semantics, latents


def noise_block(transformer: LanceTransformer, sequence: Sequence, rows: Tensor) -> NoiseBlock:
    (noise,) = sequence.find("noise")
    ids, positions = visual_first(sequence, noise)
    return transformer.noise_block(ids.to("meta"), positions.to("meta"), rows)


def through_layers(transformer: LanceTransformer, run: Callable[[LanceTransformer], object]) -> int:
    """The peak of `run` with all layers of a decoder, by what a second layer adds to one."""

    def shortened(count: int) -> int:
        layers = nn.ModuleList(on_meta(layer) for layer in transformer.language_model.model.layers[:count])
        for layer in layers:
            layer.compiled = False
        copy = on_meta(transformer, layers=layers, attention=attention)
        return peak(lambda: run(copy))

    return extended(shortened, len(transformer.language_model.model.layers), STEADY_LAYERS)


def extended(run: Callable[[int], int], count: int, steady: int) -> int:
    """run(count), which grows evenly from `steady` on."""
    if count <= steady + 1:
        return run(count)
    start = run(steady)
    return start + (count - steady) * (run(steady + 1) - start)


def empty(shape: Items[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
