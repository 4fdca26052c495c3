"""What is asked for, apart from the size and the noise of the result."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from torch import Tensor

from .checks import check_grid, check_latent, check_text
from .config import TextConfig
from .errors import LanceError
from .prompts import Kind, Task
from .sequence import Block, Grid, Sequence, build, context_blocks, prefix_length, unconditional
from .tokenizer import Tokenizer
from .vae import normalize

MAX_TOKENS = 4096  # of a text: longer ones fill the memory, and the model was not trained with them
REQUEST_TASKS = ("generate", "edit", "idip")


@dataclass(frozen=True)
class Semantic:
    """What the vision tower saw: embeddings `[n, D]`, grid (t, h, w) in 14-pixel patches, n = t·h·w / 4."""

    embeddings: Tensor
    grid: Grid
    kind: Kind

    @property
    def tokens(self) -> Grid:
        t, h, w = self.grid
        return t, h // 2, w // 2


@dataclass(frozen=True, eq=False)
class Request:
    """Words, and the references that they may speak of, to paint something by.

    task: "generate" without references, "edit" or "idip" with some. semantics, latents: of the same pictures or clips
    in the same order; latents are raw `[1, 48, T, h, w]`. unconditional: the branch that guidance leads away from, in
    which the words' tokens are gone and all else stays. Raises LanceError where these do not fit together.
    """

    task: Task
    text: str
    semantics: tuple[Semantic, ...] = ()
    latents: tuple[Tensor, ...] = ()
    unconditional: bool = False

    def __post_init__(self):
        if self.task not in REQUEST_TASKS:
            raise LanceError(f"task is {self.task!r}; give one of {', '.join(REQUEST_TASKS)}.")
        check_text("prompt" if self.task == "generate" else "instruction", self.text)
        if len(self.semantics) != len(self.latents) or (self.task == "generate") != (not self.latents):
            raise LanceError(
                f"an edit got {len(self.semantics)} semantic and {len(self.latents)} latent references:"
                " give both for every picture, in the same order."
            )
        for semantic in self.semantics:
            check_semantic(semantic)
        for index, latent in enumerate(self.latents, start=1):
            check_latent(f"latent reference {index}", latent)
            if latent.shape[0] != 1:
                raise LanceError(f"latent reference {index} is a batch of {latent.shape[0]}: give one picture or clip.")
            check_grid(*latent.shape[2:])

    def against(self, negative: str = "") -> Request:
        """What guidance leads away from: the same references with other words, or with none."""
        if negative.strip():
            return replace(self, text=negative)
        return replace(self, unconditional=True)

    def sequence(self, tokenizer: Tokenizer, config: TextConfig, target: Grid) -> Sequence:
        """What the model reads to paint a target of (t, h, w) latent rows. Raises LanceError as `check_length` does."""
        check_widths(self.semantics, config)
        sequence = build(
            tokenizer,
            self.task,
            kind_of(target),
            self.text,
            semantics=[semantic.tokens for semantic in self.semantics],
            latents=[tuple(latent.shape[2:]) for latent in self.latents],
            target=target,
            tokens_per_second=config.tokens_per_second,
        )
        check_length(sequence)
        return unconditional(sequence, config.tokens_per_second) if self.unconditional else sequence

    def blocks(self, sequence: Sequence, device=None) -> tuple[list[Block], list[Block]]:
        """The context of one of its sequences, for `LanceTransformer.prefill`: before the words, and from them on.

        The first part is the same with other words and without.
        """
        blocks = context_blocks(sequence, *self.references(), device)
        words = prefix_length(sequence)
        return blocks[:words], blocks[words:]

    def references(self) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings `[n, D]` and normalised latents `[48, T, h, w]`."""
        return [semantic.embeddings for semantic in self.semantics], [normalize(x)[0] for x in self.latents]


def kind_of(target: Grid) -> Kind:
    """One latent frame is an image, more are a video."""
    return "image" if target[0] == 1 else "video"


def check_length(sequence: Sequence) -> None:
    """Texts that attention can hold."""
    longest = max(s.end - s.start for s in sequence.segments if s.attention == "causal")
    if longest > MAX_TOKENS:
        raise LanceError(f"the text has {longest} tokens: shorten it to {MAX_TOKENS} at most.")


def check_semantic(semantic: Semantic) -> None:
    if not isinstance(semantic, Semantic):
        raise LanceError(f"a semantic reference is {type(semantic).__name__}: give what encode_semantic returns.")


def check_widths(semantics: Items[Semantic], config: TextConfig) -> None:
    """Encodings of this model's width."""
    for semantic in semantics:
        check_semantic(semantic)
        if semantic.embeddings.shape[-1] != config.hidden_size:
            raise LanceError(
                f"a semantic encoding is {semantic.embeddings.shape[-1]} wide where this model has"
                f" {config.hidden_size}: encode the picture with the same checkpoint."
            )
