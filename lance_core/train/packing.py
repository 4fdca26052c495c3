"""Several examples as one sequence for both experts, and masks by which none sees another.

Everything but attention works on the tokens of all examples together, without padding. Attention takes the examples
apart again, in groups of similar length, each with the mask of the model's segments. An example may have several ends
(noise blocks of different times, questions about the same picture), which see all before them and not each other.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import compress

import torch
from torch import Tensor

from ..config import LanceConfig
from ..errors import LanceError
from ..request import check_length
from ..sequence import Grid, Segment, Sequence, build, shortened, unconditional
from ..tokenizer import Tokenizer
from ..transformer import latent_position_ids, latent_position_rows
from .examples import Example

WASTE = 1.3  # padded length of a group over the length of its shortest example, at most
TEMPLATE = 24  # tokens of the chat template and the system prompt, about
BYTES_PER_TOKEN = 4  # of a text, about
PADDING = 1 << 20  # number and branch of what fills a group up: behind everything, and seen by no token


@dataclass(frozen=True)
class Group:
    """Examples that attend together: `index [S, L]` of their tokens, padded, and `mask [S, 1, L, L]` boolean."""

    index: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of n tokens in all: u of the understanding expert (first the ids, then what was seen) and g others.

    ids `[u - s]`. seen: pixels `[3, F', H, W]`, the blocks of one size as one clip; seen_order `[s]`: where their
    tokens stand in order. rows `[g, 48]`: latents, the targets' with noise; times `[b]` of their blocks and time_index
    `[g]`; position_rows `[g, D]`. positions `[3, n]`. groups; to_streams `[n]`: where the tokens are found in what the
    groups give. targets `[m, 48]`: velocities of the rows target_index `[m]` of g. answers `[a]`: ids that follow the
    tokens answer_index `[a]` of u.
    """

    ids: Tensor
    seen: tuple[Tensor, ...]
    seen_order: Tensor
    rows: Tensor
    times: Tensor
    time_index: Tensor
    position_rows: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    to_streams: Tensor
    targets: Tensor
    target_index: Tensor
    answers: Tensor
    answer_index: Tensor

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        groups = tuple(Group(group.index.to(device), group.mask.to(device)) for group in self.groups)
        return replace(self, **moved, seen=tuple(x.to(device) for x in self.seen), groups=groups)


@dataclass(frozen=True)
class Noising:
    """How examples are changed while they are learned. Probabilities 0..1.

    timestep_mean, timestep_std: of the normal whose sigmoid is the time; timestep_shift: s·t / (1 + (s - 1)·t) of that.
    draws: noise blocks of different times for each target, all behind the same context, which is computed once.
    text_dropout: words of a generation or an edit are left out, which is what guidance leads away from;
    reference_dropout: likewise each reference of an edit, what the vision tower saw of it and its latents (in the
    official script its `vit_cond_dropout_prob` does this); vit_dropout, vae_dropout: one of both, of all references.
    """

    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 4.0
    draws: int = 1
    text_dropout: float = 0.1
    reference_dropout: float = 0.1
    vit_dropout: float = 0.0
    vae_dropout: float = 0.0

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of so many targets, `[count]` in 0..1 (logit-normal: arXiv 2403.03206, section 3.1)."""
        t = torch.sigmoid(torch.randn(count, generator=generator) * self.timestep_std + self.timestep_mean)
        return self.timestep_shift * t / (1 + (self.timestep_shift - 1) * t)


@dataclass
class _Streams:
    """The parts of a batch while it grows. Places are numbers in each part; `order` is (part, place) by token."""

    ids: list[int] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    seen_tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)
    row_count: int = 0
    row_ids: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    block_lengths: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    target_index: list[Tensor] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    answer_index: list[int] = field(default_factory=list)

    def add(self, part: int, start: int, count: int) -> None:
        self.parts.append(torch.full((count,), part))
        self.places.append(torch.arange(start, start + count))

    def add_ids(self, ids: list[int]) -> None:
        self.add(0, len(self.ids), len(ids))
        self.ids += ids

    def add_seen(self, pixels: Tensor, count: int) -> None:
        self.add(1, self.seen_tokens, count)
        self.seen.append(pixels)
        self.seen_tokens += count

    def add_rows(self, latent: Tensor, times: Items[float]) -> Tensor:
        """A block of latents, with a time for each of as many equal parts; returns its rows' numbers."""
        t, h, w = latent.shape[1:]
        count = t * h * w
        self.add(2, self.row_count, count)
        self.rows.append(latent.flatten(1).T)
        self.row_ids.append(latent_position_ids(t, h, w))
        self.times += times
        self.block_lengths += [count // len(times)] * len(times)
        self.row_count += count
        return torch.arange(self.row_count - count, self.row_count)


def pack(
    examples: Items[Example],
    tokenizer: Tokenizer,
    config: LanceConfig,
    noising: Noising,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Batch:
    """One batch of these examples; all that is random in it comes from the generator (on the CPU).

    Raises LanceError for an example that has neither an answer nor a target, or whose text is too long.
    """
    streams, packed = _Streams(), []
    times = noising.times(len(examples) * noising.draws, generator).view(len(examples), -1).tolist()
    dropped = torch.rand(len(examples), 3, generator=generator) < torch.tensor(
        (noising.text_dropout, noising.vit_dropout, noising.vae_dropout)
    )
    for whole, own_times, drops in zip(examples, times, dropped.tolist()):
        example = _with_fewer_references(whole, noising.reference_dropout, generator)
        pieces = _pieces(example, own_times, tokenizer, config, *drops)
        _add(streams, example, pieces, generator)
        packed.append(pieces)
    return _finish(streams, packed, config).to(device)


def _with_fewer_references(example: Example, dropout: float, generator: torch.Generator) -> Example:
    """An edit without the references that are dropped, each by itself; what is asked about is never dropped."""
    if example.target is None:
        return example
    kept = (torch.rand(len(example.pixels), generator=generator) >= dropout).tolist()
    pixels, latents = (tuple(compress(blocks, kept)) for blocks in (example.pixels, example.latents))
    return replace(example, pixels=pixels, latents=latents)


def tokens_of(example: Example, draws: int = 1) -> int:
    """About how many tokens it has: exactly those of pictures and clips, the words by their length."""
    seen = sum(x[0].numel() // (2 * 28 * 28) for x in example.pixels)
    latents = sum(x[0].numel() for x in example.latents)
    target = 0 if example.target is None else example.target[0].numel() * draws
    others = "".join(question + answer for question, answer in example.others)
    words = example.text + (example.answer or "") + (example.system or "") + others
    return TEMPLATE + seen + latents + target + len(words.encode()) // BYTES_PER_TOKEN


@dataclass(frozen=True)
class _Piece:
    """A segment of an example. branch: 0 for what all its ends see, then 1, 2 … by end. time: of a noise block.

    answer: how many tokens at its end are to be learned.
    """

    sequence: Sequence
    segment: Segment
    number: int
    branch: int = 0
    time: float = 0.0
    answer: int = 0

    @property
    def length(self) -> int:
        return self.segment.end - self.segment.start


def _pieces(
    example: Example,
    times: list[float],
    tokenizer: Tokenizer,
    config: LanceConfig,
    no_text: bool,
    no_vit: bool,
    no_vae: bool,
) -> list[_Piece]:
    sequence = _sequence(example, tokenizer, config, no_text, no_vit, no_vae)
    if example.target is not None:
        end = next(index for index, segment in enumerate(sequence.segments) if segment.role == "noise")
        before = [_Piece(sequence, segment, index) for index, segment in enumerate(sequence.segments[:end])]
        noise = sequence.segments[end]
        return before + [_Piece(sequence, noise, end, branch, time) for branch, time in enumerate(times, start=1)]
    pairs = [(example.text, example.answer), *example.others]
    asked = [replace(example, text=text, answer=answer, others=()) for text, answer in example.others]
    sequences = [sequence, *(_sequence(other, tokenizer, config, False, False, False) for other in asked)]
    end = len(sequence.segments) - 1  # the question; without a picture it begins with the system prompt
    before = [_Piece(sequence, segment, index) for index, segment in enumerate(sequence.segments[:end])]
    return before + [
        _Piece(own, own.segments[-1], end, branch, answer=len(tokenizer.encode(answer)) + 1)
        for branch, (own, (_, answer)) in enumerate(zip(sequences, pairs), start=1)
    ]


def _sequence(
    example: Example, tokenizer: Tokenizer, config: LanceConfig, no_text: bool, no_vit: bool, no_vae: bool
) -> Sequence:
    """What the model reads of an example, up to the end of its target or its answer."""
    if (example.target is None) == (example.answer is None):
        raise LanceError(f"the example '{example.text[:60]}' needs either an answer or a target: give one of them.")
    target: Grid | None = None if example.target is None else tuple(example.target.shape[1:])
    kind = example.kind if target is None else "image" if target[0] == 1 else "video"
    tokens_per_second = config.text.tokens_per_second
    sequence = build(
        tokenizer,
        example.task,
        kind if example.pixels or target is not None else None,
        example.text,
        semantics=[_tokens(x, config) for x in example.pixels],
        latents=[tuple(x.shape[1:]) for x in example.latents],
        target=target,
        system=example.system,
        answer=example.answer,
        tokens_per_second=tokens_per_second,
    )
    check_length(sequence)
    if target is None:
        return sequence
    roles = [role for role, drop in (("semantic", no_vit), ("source", no_vae), ("identity", no_vae)) if drop]
    if roles:
        sequence = shortened(sequence, roles, tokens_per_second)
    return unconditional(sequence, tokens_per_second) if no_text else sequence


def _tokens(pixels: Tensor, config: LanceConfig) -> Grid:
    side = config.vision.patch_size * config.vision.spatial_merge_size
    return pixels.shape[1] // config.vision.temporal_patch_size, pixels.shape[2] // side, pixels.shape[3] // side


def _add(streams: _Streams, example: Example, pieces: list[_Piece], generator: torch.Generator) -> None:
    pixels, latents = iter(example.pixels), iter(example.latents)
    for piece in pieces:
        segment = piece.segment
        ids = piece.sequence.ids[segment.start : segment.end].tolist()
        if segment.grid is None:
            streams.add_ids(ids)
            if piece.answer:
                end = len(streams.ids)
                streams.answers += ids[-piece.answer :]
                streams.answer_index += range(end - piece.answer - 1, end - 1)
            continue
        streams.add_ids(ids[:1])
        if segment.role == "semantic":
            streams.add_seen(next(pixels), piece.length - 2)
        elif segment.role == "noise":
            _add_target(streams, example, piece.time, generator)
        else:
            streams.add_rows(next(latents), [0.0])
        streams.add_ids(ids[-1:])


def _add_target(streams: _Streams, example: Example, time: float, generator: torch.Generator) -> None:
    """The target with noise; the velocity is from data to noise."""
    target = example.target
    noise = torch.randn(target.shape, generator=generator)
    moving = torch.full((target.shape[1], 1, 1), time)
    if example.first_frame:
        moving[0] = 0.0
    mixed = (1 - moving) * target + moving * noise
    rows = streams.add_rows(mixed, moving.flatten().tolist() if example.first_frame else [time])
    given = rows.numel() // target.shape[1] if example.first_frame else 0
    streams.target_index.append(rows[given:])
    streams.targets.append((noise - target).flatten(1).T[given:])


def _finish(streams: _Streams, packed: list[list[_Piece]], config: LanceConfig) -> Batch:
    starts = torch.tensor((0, len(streams.ids), len(streams.ids) + streams.seen_tokens))
    parts = torch.cat(streams.parts)
    tokens = torch.cat(streams.places) + starts[parts]  # of every token in reading order, its place in the streams
    pieces = [piece for own in packed for piece in own]
    columns = [p.sequence.positions[:, p.segment.start : p.segment.end] for p in pieces]
    positions = torch.empty(3, len(tokens), dtype=torch.long)
    positions[:, tokens] = torch.cat(columns, dim=1)
    seen, seen_order = _by_size(streams.seen, config)
    row_ids = torch.cat(streams.row_ids) if streams.row_ids else torch.empty(0, dtype=torch.long)
    groups, to_streams = _groups(packed, tokens)
    return Batch(
        ids=torch.tensor(streams.ids),
        seen=seen,
        seen_order=seen_order,
        rows=torch.cat(streams.rows) if streams.rows else torch.empty(0, 48),
        times=torch.tensor(streams.times),
        time_index=torch.repeat_interleave(torch.tensor(streams.block_lengths, dtype=torch.long)),
        position_rows=latent_position_rows(row_ids, config.text.hidden_size, torch.float32),
        positions=positions,
        groups=groups,
        to_streams=to_streams,
        targets=torch.cat(streams.targets) if streams.targets else torch.empty(0, 48),
        target_index=torch.cat(streams.target_index) if streams.target_index else torch.empty(0, dtype=torch.long),
        answers=torch.tensor(streams.answers, dtype=torch.long),
        answer_index=torch.tensor(streams.answer_index, dtype=torch.long),
    )


def _by_size(seen: list[Tensor], config: LanceConfig) -> tuple[tuple[Tensor, ...], Tensor]:
    """Pictures of one size as one clip, for a temporal step never sees another; and their tokens' order."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, pixels in enumerate(seen):
        sizes.setdefault(tuple(pixels.shape[2:]), []).append(index)
    order = [index for members in sizes.values() for index in members]
    counts = [torch.Size(_tokens(pixels, config)).numel() for pixels in seen]
    starts = torch.tensor([0, *counts]).cumsum(0)
    places = [torch.arange(starts[index], starts[index] + counts[index]) for index in order]
    clips = tuple(torch.cat([seen[index] for index in members], dim=1) for members in sizes.values())
    return clips, torch.argsort(torch.cat(places)) if places else torch.empty(0, dtype=torch.long)


def _groups(packed: list[list[_Piece]], tokens: Tensor) -> tuple[tuple[Group, ...], Tensor]:
    """The examples in groups, and for every token of the streams where it is in what the groups give, end to end."""
    lengths = [sum(piece.length for piece in pieces) for pieces in packed]
    own_tokens = tokens.split(lengths)
    members: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if members and lengths[members[-1][0]] <= WASTE * lengths[index]:
            members[-1].append(index)
        else:
            members.append([index])
    groups, to_streams, before = [], torch.empty_like(tokens), 0
    for group in members:
        longest = lengths[group[0]]
        index = torch.zeros(len(group), longest, dtype=torch.long)
        number, branch = torch.full((2, len(group), longest), PADDING)
        causal = torch.zeros(len(group), longest, dtype=torch.bool)
        for row, i in enumerate(group):
            index[row, : lengths[i]] = own_tokens[i]
            to_streams[own_tokens[i]] = torch.arange(before, before + lengths[i])
            before += longest
            start = 0
            for piece in packed[i]:
                where = slice(start, start + piece.length)
                number[row, where], branch[row, where] = piece.number, piece.branch
                causal[row, where] = piece.segment.attention == "causal"
                start += piece.length
        groups.append(Group(index, visible(number, branch, causal)[:, None]))
    return tuple(groups), to_streams


def visible(number: Tensor, branch: Tensor, causal: Tensor) -> Tensor:
    """Who sees whom, `[S, L, L]` boolean, for the segments' numbers, their branches and kinds, `[S, L]` each."""
    place = torch.arange(number.shape[1])
    earlier = number[:, None] < number[:, :, None]
    same = (number[:, None] == number[:, :, None]) & (~causal[:, :, None] | (place <= place[:, None]))
    return (earlier | same) & ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None]))
