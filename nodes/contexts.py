"""Keys and values of contexts, kept from one sampling to the next while the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from ..lance_core.prompts import Kind
from ..lance_core.request import Request
from ..lance_core.transformer import Context

Key = tuple[Hashable, ...]


class Contexts:
    """A sampling's contexts by what they were made of: the weights, and the request or what it begins with.

    Another seed, size or schedule finds all of them, other words those of the references. Whatever a sampling does not
    ask for goes before anything is added, so that there is never more than one sampling's worth.
    """

    def __init__(self):
        self.kept: dict[Key, tuple[Request, Context]] = {}
        self.wanted: list[tuple[Request, Kind]] = []  # of the sampling under way

    def want(self, request: Request, kind: Kind) -> None:
        """Announces that the sampling under way will ask for this request's context."""
        self.wanted.append((request, kind))

    def get(self, weights: Hashable, key: Key, request: Request, make: Callable[[], Context]) -> Context:
        """The context of that key, made where there is none. The request keeps alive what its key names by identity."""
        full = (weights, *key)
        if full not in self.kept:
            wanted = {(weights, *k) for r, kind in self.wanted for k in (prefix_key(r, kind), whole_key(r, kind))}
            self.kept = {k: entry for k, entry in self.kept.items() if k in wanted}
            self.kept[full] = (request, make())
        return self.kept[full][1]

    def end(self) -> None:
        """The sampling is over."""
        self.wanted = []

    def clear(self) -> None:
        self.kept = {}
        self.wanted = []


def prefix_key(request: Request, kind: Kind) -> Key:
    """What the context before the words depends on; references by identity, which a graph's cache keeps."""
    return (request.task, kind, *identities(s.embeddings for s in request.semantics), *identities(request.latents))


def whole_key(request: Request, kind: Kind) -> Key:
    return (*prefix_key(request, kind), request.text, request.unconditional)


def identities(values: Iterable[object]) -> tuple[int, ...]:
    return tuple(id(value) for value in values)
