"""A request as the model reads it: token ids, attention segments and rotary positions.

The chat template is `system`, `user`, `assistant`, with visual blocks in the user's turn and the target in the
assistant's. A visual block is `<|vision_start|>`, its tokens, `<|vision_end|>`, and one attention segment.

Sources: data/datasets_custom/validation_dataset.py, data/common.py (shift_position_ids) and
modeling/lance/qwen2_navit.py (get_rope_index) of bytedance/Lance.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .prompts import Kind, Task, system_prompt
from .tokenizer import IM_END, IM_START, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from .transformer import Block, latent_position_ids

SEMANTIC_POSITION = 1000  # where the first vision-tower block stands in time, in generation and edits
IDENTITY_POSITION = 2000  # the same for the latents of identity references

Role = Literal["text", "caption", "semantic", "source", "identity", "noise"]
Grid = tuple[int, int, int]

ATTENTION = {
    "text": "causal",
    "caption": "causal",
    "semantic": "full",
    "source": "full_noise",
    "identity": "full_noise",
    "noise": "noise",
}  # the official names of the segments' attention


@dataclass(frozen=True)
class Segment:
    """A run of tokens that attend in one way, `ids[start:end]`. Visual ones include their two boundaries."""

    role: Role
    start: int
    end: int
    grid: Grid | None = None  # tokens in t, h, w, without the boundaries

    @property
    def attention(self) -> str:
        return ATTENTION[self.role]


@dataclass(frozen=True)
class Sequence:
    """ids `[L]`, positions `[3, L]` (time, height, width), both int64, and the segments that tile them."""

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]

    def find(self, role: Role) -> list[Segment]:
        return [segment for segment in self.segments if segment.role == role]


def build(
    tokenizer: Tokenizer,
    task: Task,
    kind: Kind | None,
    text: str,
    *,
    semantics: Items[Grid] = (),
    latents: Items[Grid] = (),
    target: Grid | None = None,
    system: str | None = None,
    answer: str | None = None,
    tokens_per_second: int = 2,
) -> Sequence:
    """The sequence of a request.

    semantics, latents: the references' blocks in tokens (t, h, w), in their order; for edits in pairs.
    target: the noise block of a generation or an edit; where there is none, the assistant's turn is left open
    behind `assistant\\n`, or filled with `answer` and closed.
    """
    enc, special = tokenizer.encode, tokenizer.special
    newline = enc("\n")
    system = system_prompt(task, kind) if system is None else system
    runs: list[tuple[Role, list[int] | Grid]] = []

    def add_text(ids: list[int]) -> None:
        if runs and runs[-1][0] == "text":
            runs[-1][1].extend(ids)
        else:
            runs.append(("text", list(ids)))

    add_text([special(IM_START), *enc(f"system\n{system}"), special(IM_END), *newline])
    add_text([special(IM_START), *enc("user\n")])
    reference: Role = "identity" if task == "idip" else "source"
    for index, grid in enumerate(semantics):
        runs.append(("semantic", grid))
        if index < len(latents):
            runs.append((reference, latents[index]))
    closing = [special(IM_END), *newline, special(IM_START), *enc("assistant\n")]
    if target is None:
        add_text(enc(text) + closing)
        if answer is not None:
            add_text([*enc(answer), special(IM_END)])
    else:
        runs.append(("caption", enc(text)))
        add_text(closing)
        runs.append(("noise", target))
        add_text([special(IM_END)])

    ids: list[int] = []
    segments = []
    for role, content in runs:
        start = len(ids)
        if isinstance(content, list):
            ids += content
        else:
            t, h, w = content
            ids += [special(VISION_START), *[special(VIDEO_PAD)] * (t * h * w), special(VISION_END)]
        grid = None if isinstance(content, list) else content
        if len(ids) > start:
            segments.append(Segment(role, start, len(ids), grid))
    segments = tuple(segments)
    positions = rotary_positions(segments, tokens_per_second)
    if target is not None:
        positions = shift_references(positions, segments)
    return Sequence(torch.tensor(ids), positions, segments)


def rotary_positions(segments: Items[Segment], tokens_per_second: int) -> Tensor:
    """Positions `[3, L]` of tiling segments, before any shift.

    A text token advances all three axes by one; a visual grid starts where the text is, spans its rows and columns
    and advances time by `tokens_per_second` per step; text goes on behind the largest of the three.
    """
    pieces, cursor = [], 0
    for segment in segments:
        if segment.grid is None:
            n = segment.end - segment.start
            pieces.append(torch.arange(cursor, cursor + n).expand(3, n))
            cursor += n
            continue
        axes = [torch.arange(n) for n in segment.grid]
        grid = torch.stack(torch.meshgrid(axes[0] * tokens_per_second, *axes[1:], indexing="ij")).flatten(1)
        grid = grid + cursor + 1
        after = int(grid.max()) + 1
        pieces += [torch.full((3, 1), cursor), grid, torch.full((3, 1), after)]
        cursor = after + 1
    return torch.cat(pieces, dim=1)


def shift_references(positions: Tensor, segments: Items[Segment]) -> Tensor:
    """Positions with the references of a generation or an edit moved on the time axis.

    Vision-tower blocks move together, so that the first stands at 1000; the latents of identity references likewise
    to 2000; the target of an edit takes its sources' positions where the token counts are equal.
    """

    def columns(role: Role) -> Tensor:
        spans = [torch.arange(s.start, s.end) for s in segments if s.role == role]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    positions = positions.clone()
    for role, origin in (("semantic", SEMANTIC_POSITION), ("identity", IDENTITY_POSITION)):
        where = columns(role)
        if len(where):
            positions[0, where] += origin - positions[0, where[0]]
    source, noise = columns("source"), columns("noise")
    if len(source) == len(noise):
        positions[:, noise] = positions[:, source]
    return positions


def shortened(sequence: Sequence, roles: Items[Role], tokens_per_second: int) -> Sequence:
    """The sequence without the segments of these roles, with the positions of a sequence that never had them."""
    kept = [segment for segment in sequence.segments if segment.role not in roles]
    segments, cursor = [], 0
    for segment in kept:
        n = segment.end - segment.start
        segments.append(replace(segment, start=cursor, end=cursor + n))
        cursor += n
    positions = shift_references(rotary_positions(segments, tokens_per_second), segments)
    return Sequence(sequence.ids[_columns(kept)], positions, tuple(segments))


def unconditional(sequence: Sequence, tokens_per_second: int) -> Sequence:
    """The sequence of the unconditional branch: the caption's tokens are gone, all else stays.

    As in the official cached loop, what stays before the target keeps the position that it has in the conditional
    sequence, and the target stands where the shortened sequence would put it.
    """
    short = shortened(sequence, ("caption",), tokens_per_second)
    kept = [segment for segment in sequence.segments if segment.role != "caption"]
    positions = sequence.positions[:, _columns(kept)].clone()
    for segment in short.find("noise"):
        positions[:, segment.start : segment.end] = short.positions[:, segment.start : segment.end]
    return replace(short, positions=positions)


def _columns(segments: Items[Segment]) -> Tensor:
    return torch.cat([torch.arange(segment.start, segment.end) for segment in segments])


def prefix_length(sequence: Sequence) -> int:
    """How many segments stand before the words: the system prompt and the references, equal in both branches."""
    return 1 + sum(segment.grid is not None and segment.role != "noise" for segment in sequence.segments)


def context_blocks(sequence: Sequence, semantics: Items[Tensor], latents: Items[Tensor], device=None) -> list[Block]:
    """Everything before the target as blocks for `LanceTransformer.prefill`, with a caption block of its own.

    semantics: embeddings `[n, D]`, latents: normalised `[48, T, h, w]`, one each per block of the sequence.
    """
    semantics, latents = iter(semantics), iter(latents)
    blocks = []
    for segment in sequence.segments:
        if segment.role == "noise":
            break
        ids, positions = visual_first(sequence, segment)
        extra = {}
        if segment.role == "semantic":
            extra["embeddings"] = next(semantics).to(device)
        elif segment.role in ("source", "identity"):
            extra["latent"] = next(latents).flatten(1).T.to(device)
            extra["latent_ids"] = latent_position_ids(*segment.grid)
        causal = segment.attention == "causal"
        blocks.append(Block(ids.to(device), positions.to(device), causal=causal, **extra))
    return blocks


def visual_first(sequence: Sequence, segment: Segment) -> tuple[Tensor, Tensor]:
    """A segment's text ids and its positions `[3, n]`, a visual segment's two boundaries before its tokens."""
    ids = sequence.ids[segment.start : segment.end]
    positions = sequence.positions[:, segment.start : segment.end]
    if segment.grid is None:
        return ids, positions
    return ids[[0, -1]], torch.cat((positions[:, [0, -1]], positions[:, 1:-1]), dim=1)
