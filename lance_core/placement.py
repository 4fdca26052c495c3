"""Where the parts of a model are: on the device where they fit, else on the host, brought when they are needed.

A part is made of pieces, each moved as a whole: both experts have one piece per decoder layer, the other parts have
one. Of an expert that does not fit, as many layers as possible stay on the device; `streaming` brings the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock

import torch
from torch import Tensor, nn

from .errors import LanceError
from .streaming import Lookup, Piece, Stream

GIB = 2**30
SLACK = 1.1  # an allocator rounds, and what a request needs is an estimate
AMPLE = 12 * GIB  # beside all weights: more than any one result needs, so that nothing has to be estimated
RESERVE = GIB // 2  # device memory left to others: the desktop, the libraries' workspaces
LAYERS = "language_model.model.layers."
EXPERTS = ("generation", "understanding")

Places = Mapping[str, Sequence[bool]]  # of each piece of each part: whether it is to be on the device


@dataclass(frozen=True)
class Part:
    """Pieces in the order in which they are used.

    layers: the modules they belong to, where they can be streamed. table: an embedding that may stay on the host.
    """

    pieces: Sequence[Piece]
    layers: Sequence[nn.Module] = ()
    table: nn.Module | None = None

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def largest(self) -> int:
        return max(piece.size for piece in self.pieces)

    @property
    def least(self) -> int:
        """Device memory without which the part cannot be used: that of two layers, or all of it, or none."""
        if self.table is not None:
            return 0
        return min(self.size, 2 * self.largest) if self.layers else self.size

    def places(self, room: int) -> list[bool]:
        """Which pieces can be on the device all the time; others need room for two of them to pass through."""
        count = len(self.pieces)
        if self.size <= room:
            return [True] * count
        return spread(count, (room - 2 * self.largest) // self.largest) if self.layers else [False] * count

    def taken(self, places: Sequence[bool]) -> int:
        """Device memory of a part with these pieces there."""
        passing = 0 if all(places) or not self.layers else 2 * self.largest
        return passing + sum(piece.size for piece, there in zip(self.pieces, places) if there)


class Placement:
    """Keeps a model's parts within a budget of device memory. Without parts or budget everything is where it should be.

    budget: bytes that weights and working memory may take on the device together; None: no limit, and nothing moves.
    """

    def __init__(
        self, parts: Mapping[str, Part] | None = None, device: torch.device | None = None, budget: int | None = None
    ):
        self.parts = dict(parts or {})
        self.device = device
        weights = sum(part.size for part in self.parts.values())
        self.budget = None if budget is None or budget >= weights + AMPLE else budget
        self._requests: list[tuple[Placement, tuple[str, ...], int]] = []
        self._lock = RLock()  # a second thread would move the first one's weights
        self._streams: list[Stream | Lookup] = []

    @contextmanager
    def use(self, *names: str, working: Callable[[], int] = lambda: 0, at_most: int | None = None) -> Iterator[None]:
        """Inside, these parts can be used; of several the first is the last to be streamed.

        working: says how many bytes are needed beside them; asked only where there is a budget, and not where that has
        room for all parts and `at_most` bytes. Uses nest: when the inner one ends, the outer one's parts are back.
        Raises LanceError where the budget cannot hold what is needed.
        """
        if self.budget is None:
            yield
            return
        with self._lock:
            known = at_most is not None and self.ample(at_most)
            self._requests.append((self, names, at_most if known else working()))
            try:
                self._arrange()
                yield
            finally:
                self._requests.pop()
                self._arrange()

    def ample(self, working: int) -> bool:
        """Whether the budget has room for all parts and so many bytes, those of outer uses included."""
        if self.budget is None:
            return True
        held = sum(needed for *_, needed in self._requests)
        weights = sum(part.size for part in self.parts.values())
        return weights + math.ceil(SLACK * (held + working)) <= self.budget

    def fits(self, *names: str, working: Callable[[], int]) -> bool:
        """Whether `use` would find room for these."""
        if self.budget is None:
            return True
        try:
            arrangement(self.parts, names, self.budget, sum(needed for *_, needed in self._requests) + working())
        except LanceError:
            return False
        return True

    def shared(self, transformer: nn.Module, extra: int) -> Placement:
        """A placement of the same pieces for a model that has these weights, and `extra` bytes on the device, too.

        Uses of the two nest as those of one do.
        """
        if self.budget is None:
            return self
        used = modules_of(transformer)
        parts = {label: replace(part, **used.get(label, {})) for label, part in self.parts.items()}
        placement = Placement(parts, self.device, self.budget - extra)
        placement._lock, placement._requests, placement._streams = self._lock, self._requests, self._streams
        return placement

    @property
    def streams(self) -> bool:
        """Whether weights come while layers run, by hooks on them, so that what runs must not be one recorded graph."""
        return bool(self._streams)

    def resident(self) -> int:
        """Bytes of weights that are on the device now, buffers of streamed ones included."""
        pieces = (piece for part in self.parts.values() for piece in part.pieces)
        return sum(piece.size for piece in pieces if piece.present) + sum(stream.size for stream in self._streams)

    def _arrange(self) -> None:
        """Puts everything where the innermost use needs it; streams end where there is none."""
        while self._streams:
            self._streams.pop().close()
        if self._requests:
            placement, names, _ = self._requests[-1]
            placement._place(names)

    def _place(self, names: Sequence[str]) -> None:
        working = sum(needed for *_, needed in self._requests)  # what outer uses hold stays while the inner one runs
        places = arrangement(self.parts, names, self.budget, working)
        pairs = [pair for name, part in self.parts.items() for pair in zip(part.pieces, places[name])]
        leaving = [piece for piece, wanted in pairs if piece.present and not wanted]
        for piece in leaving:
            piece.leave()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # room would otherwise stay reserved, in pieces of no use
        for piece, wanted in pairs:
            if wanted and not piece.present:
                piece.arrive(self.device)
        for name, part in self.parts.items():
            if part.table is not None and not all(places[name]):
                self._streams.append(Lookup(part.table, self.device))
            elif name in names and not all(places[name]):
                self._streams.append(Stream(part.layers, part.pieces, self.device))


def arrangement(parts: Mapping[str, Part], names: Sequence[str], budget: int, working: int) -> dict[str, list[bool]]:
    """Which pieces are to be on the device while the parts `names` are used beside `working` bytes.

    What always has to be there comes first, then the named parts in their order, then what happens to be there.
    Raises LanceError where that is impossible.
    """
    named = [name for name in ("rest", *names) if name in parts]
    left = budget - math.ceil(SLACK * working) - sum(parts[name].least for name in named)
    if left < 0:
        raise LanceError(
            f"This takes {(budget - left) / GIB:.3g} GiB of device memory at least (for {', '.join(names)}) and"
            f" {budget / GIB:.3g} GiB may be used: allow more, or choose a smaller size, fewer frames or quantised"
            " weights."
        )
    places = {}
    for name in named:
        part = parts[name]
        left += part.least
        places[name] = part.places(left)
        left -= part.taken(places[name])
    for name, part in parts.items():
        if name not in named:
            places[name] = []
            for piece in part.pieces:
                stays = piece.present and piece.size <= left
                places[name].append(stays)
                left -= piece.size * stays
    return places


def spread(count: int, chosen: int) -> list[bool]:
    """`chosen` of `count`, evenly spread: between two layers that are streamed others compute, while the next comes."""
    return [(index + 1) * chosen // count > index * chosen // count for index in range(count)]


def model_parts(
    transformer: nn.Module, vision: nn.Module | None, vae: nn.Module | None, present: bool = True
) -> dict[str, Part]:
    """A model's parts: "rest" (small, always needed), the two experts, "text", "embedding", "vision" and "vae".

    present: whether they are on the device; otherwise all of them are on the host.
    """
    groups: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for name, tensor in tensors(transformer):
        groups[part_of(name)].append(tensor)
    for label, module in (("vision", vision), ("vae", vae)):
        if module is not None:
            groups[label, 0] = [tensor for _, tensor in tensors(module)]
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for (label, _), group in sorted(groups.items()):
        pieces[label].append(Piece(group, present))
    used = modules_of(transformer)
    return {label: Part(group, **used.get(label, {})) for label, group in pieces.items()}


def modules_of(transformer: nn.Module) -> dict[str, dict[str, object]]:
    """The modules that the parts of a transformer belong to, as `Part` takes them, by part."""
    model = transformer.language_model.model
    return {label: {"layers": list(model.layers)} for label in EXPERTS} | {"embedding": {"table": model.embed_tokens}}


def part_of(name: str) -> tuple[str, int]:
    """The part that a tensor of the transformer belongs to, and the number of its piece there."""
    if name.startswith(LAYERS):
        return "generation" if "_moe_gen" in name else "understanding", int(name[len(LAYERS) :].split(".")[0])
    return "text" if ".lm_head." in name else "embedding" if ".embed_tokens." in name else "rest", 0


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def weight_bytes(*modules: nn.Module | None) -> int:
    """Bytes of all tensors of these modules."""
    return sum(tensor.nbytes for module in modules if module is not None for _, tensor in tensors(module))


def resolve_memory(memory: str | float | None, device: torch.device) -> int | None:
    """Bytes of device memory to make do with, from GiB; None: no limit.

    "auto": what is free on CUDA but for `RESERVE`, else no limit. Raises LanceError for other things.
    """
    if memory is None:
        return None
    if memory == "auto":
        if device.type != "cuda":
            return None
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, torch.cuda.mem_get_info(device)[0] + unused - RESERVE)
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 < memory < math.inf:
        raise LanceError(f"memory is {memory!r}: give a number of GiB above 0, or 'auto'.")
    return int(memory * GIB)
