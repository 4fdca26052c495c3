"""What the CPU benchmarks run: models of random weights, requests for them, and questions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from measuring import seconds
from operations import Operations, count, count_per_call
from torch import Tensor

from lance_core import flow, stages, text
from lance_core.checkpoint import Lance
from lance_core.config import LanceConfig, TextConfig
from lance_core.sequence import Grid, Sequence, build, context_blocks
from lance_core.tiny import TINY_TEXT, TINY_VAE, TINY_VISION, random_lance
from lance_core.vae import VAEConfig

PROMPT = "A red fox sleeps on a mossy stone while snow falls slowly through the birch trees behind it."
SEEN = (1, 9, 9)  # tokens of a reference in the vision tower: 252x252
ANSWER = 64  # tokens written when decoding is timed


@dataclass(frozen=True)
class Size:
    """A model and what it paints. The MLP is 5.375 times as wide as the model, as in the release."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    sections: tuple[int, int, int]
    grid: Grid  # of the target, in latent frames, rows and columns
    steps: int = 8
    tasks: tuple[str, ...] = ("generate", "edit")
    vae: VAEConfig = TINY_VAE

    @property
    def text(self) -> TextConfig:
        return TextConfig(
            vocab_size=TINY_TEXT.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11008 // 2048,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            mrope_section=self.sections,
        )

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def smaller(self) -> Size:
        """The same model, painting a quarter of the tokens."""
        t, h, w = self.grid
        return replace(self, grid=(t, h // 2, w // 2))

    def __str__(self) -> str:
        t, h, w = self.grid
        return f"{self.layers} layers x {self.hidden}, {4 * t - 3} x {16 * h} x {16 * w}, {self.tokens:,} tokens"


_SMALL = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "sections": (2, 3, 3)}
_QUARTER = VAEConfig(encoder_width=40, decoder_width=64)  # of the release's widths
SIZES = {
    "a": Size(hidden=512, layers=8, heads=16, kv_heads=2, sections=(4, 6, 6), grid=(1, 16, 16), vae=_QUARTER),
    "b": Size(**_SMALL, grid=(1, 48, 48)),
    "clip": Size(**_SMALL, grid=(13, 30, 53), steps=2, tasks=("generate",)),
    "tiny": Size(hidden=32, layers=2, heads=2, kv_heads=1, sections=(2, 3, 3), grid=(1, 4, 4)),
}
TITLES = {"generate": "text to image", "edit": "image edit"}


def model(size: Size, dtype: torch.dtype = torch.float32) -> Lance:
    """A random Lance of this size; the vision tower is not measured, and tiny."""
    config = LanceConfig(size.text, replace(TINY_VISION, out_hidden_size=size.hidden))
    return random_lance(config, size.vae, dtype=dtype)


@dataclass(frozen=True)
class Request:
    """A text-to-image or an edit request, from what comes before the decoder to a latent."""

    lance: Lance
    size: Size
    task: str  # "generate" or "edit"

    @property
    def grid(self) -> Grid:
        return self.size.grid

    @property
    def request(self) -> stages.Request:
        """The request as `stages` takes it; references are drawn at random."""
        if self.task == "generate":
            return stages.Request("generate", PROMPT)
        _, h, w = SEEN
        seen = stages.Semantic(drawn(h * w, self.size.hidden), (1, 2 * h, 2 * w), "image")
        return stages.Request("edit", PROMPT, (seen,), (drawn(1, 48, *self.grid),))

    @property
    def sequence(self) -> Sequence:
        """The tokens, as `stages` lays them out."""
        return self.request.sequence(self.lance.tokenizer, self.lance.config.text, self.grid)

    def run(
        self, steps: int, on_step: stages.OnStep | None = None, guidance: float = 4.0, noise: Tensor | None = None
    ) -> Tensor:
        """The latent `[1, 48, T, h, w]` after some steps, the same every time."""
        sampling = stages.Sampling(steps, guidance, 3.5, (0.4, 1.0), "global", 0.0)
        noise = drawn(1, 48, *self.grid) if noise is None else noise
        with torch.inference_mode():
            return stages.paint(self.lance, self.request, sampling, noise, None, on_step)

    def prefill(self) -> list[stages.Branch]:
        """The contexts of both branches."""
        with torch.inference_mode():
            request = self.request
            return stages.branches(self.lance, request, stages.sides(self.lance, request, self.grid, guided=True))

    def step_seconds(self) -> tuple[list[float], list[float]]:
        """Of one run: guided and plain steps, but for the first, which also computes the context."""
        marks = []
        self.run(self.size.steps, lambda step, steps, estimate: marks.append(time.perf_counter()))
        guided = flow.guided_steps(flow.schedule(self.size.steps, 3.5), (0.4, 1.0))
        steps = [(b - a, flag) for a, b, flag in zip(marks, marks[1:], guided[1:])]
        return [s for s, flag in steps if flag], [s for s, flag in steps if not flag]

    def one_step(self) -> Operations:
        """The operations of one guided step, the whole loop included."""
        return count(lambda: self.run(3)) - count(lambda: self.run(2))

    def layers(self) -> list[Operations]:
        """The operations of every layer in one guided step, both branches together."""
        layers = self.lance.transformer.language_model.model.layers
        before = len(count_per_call(layers, self.prefill))
        forwards = count_per_call(layers, lambda: self.run(1))[before:]
        return [sum(forwards[i :: len(layers)], Operations()) for i in range(len(layers))]


def both_branches(lance: Lance, request: stages.Request, grid: Grid) -> list[stages.Branch]:
    """A request's contexts and noise blocks, with its words and without."""
    return stages.branches(lance, request, stages.sides(lance, request, grid, True))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def answer(lance: Lance, length: int) -> list[int]:
    """Greedy tokens of an answer about a picture, read back one by one as `understand` does to know when to stop."""
    sequence = build(lance.tokenizer, "understand", "image", PROMPT, semantics=[SEEN])
    known = len(lance.tokenizer)

    def pick(logits: Tensor) -> Tensor:
        return logits[:known].argmax(keepdim=True)

    with torch.inference_mode():
        *blocks, last = context_blocks(sequence, [drawn(SEEN[1] * SEEN[2], lance.config.text.hidden_size)], [])
        context = lance.transformer.prefill([*blocks, last.without_last()], dtype=lance.dtype)
        position = int(sequence.positions[0, -1])
        tokens = text.tokens(lance.transformer, context, last.ids[-1:], position, pick, length)
        return [int(token) for token in tokens]


def seconds_per_token(answer: Callable[[int], object], repeats: int) -> float:
    """Of the tokens behind the first, so that the prompt does not count."""
    spans = [seconds(lambda: answer(ANSWER)) - seconds(lambda: answer(1)) for _ in range(repeats)]
    return min(spans) / (ANSWER - 1)
