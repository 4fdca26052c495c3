"""What is learned from: one example, and an endless supply of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..prompts import Kind, Task


@dataclass(frozen=True, eq=False)
class Example:
    """A request with its result, in the form in which the model meets both.

    text: the caption, instruction or question. answer: of a question. system: instead of the official system prompt.
    others: further questions about the same, each with its answer.
    kind: of what a question is about; of other tasks the target decides. pixels: what the vision tower sees, one
    `[3, F', H, W]` per reference (`vit.normalize_pixels`). latents: the references of edits, clean and normalised
    `[48, T, h, w]`. target: what is to be painted, likewise. first_frame: the target's first latent frame is given.
    """

    task: Task
    text: str
    answer: str | None = None
    system: str | None = None
    kind: Kind = "image"
    pixels: tuple[Tensor, ...] = ()
    latents: tuple[Tensor, ...] = ()
    target: Tensor | None = None
    first_frame: bool = False
    others: tuple[tuple[str, str], ...] = ()


class Examples(Protocol):
    """Endless, and the same for the same index. None: a record that cannot be used, of which the user was told."""

    def __getitem__(self, index: int) -> Example | None: ...
