"""Keys and values of contexts, kept from one sampling to the next while the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from ..lance_core.prompts import Kind
from ..lance_core.request import Request
from ..lance_core.transformer import Context

Key = tuple[Hashable, ...]


@dataclass(frozen=True)
class Weights:
    """What a context was computed with: which hooks act, and the state of the weights, which hooks may change."""

    hooks: Hashable
    state: Hashable


@dataclass(frozen=True)
class Entry:
    state: Hashable
    request: Request  # keeps alive what its key names by identity
    context: Context


class Contexts:
    """A sampling's contexts by what they were made of: the request, or what it begins with, and the weights.

    Another seed, size or schedule finds all of them, other words those of the references. There is one for each request
    and set of hooks: a hook whose strength changes from step to step replaces its own. Whatever a sampling does not ask
    for goes before anything is added, so that there is never more than one sampling's worth.
    """

    def __init__(self):
        self.kept: dict[tuple[Key, Hashable], Entry] = {}
        self.wanted: set[Key] = set()  # by the sampling under way
        self.used: set[tuple[Key, Hashable]] = set()

    def want(self, request: Request, kind: Kind) -> None:
        """Announces that the sampling under way will ask for this request's context."""
        self.wanted |= {prefix_key(request, kind), whole_key(request, kind)}

    def get(self, key: Key, weights: Weights, request: Request, make: Callable[[], Context]) -> Context:
        """The context of that key under these weights, made where there is none."""
        slot = (key, weights.hooks)
        self.used.add(slot)
        entry = self.kept.get(slot)
        if entry is None or entry.state != weights.state:
            self.kept.pop(slot, None)
            if self.wanted:
                self.kept = {s: e for s, e in self.kept.items() if s[0] in self.wanted}
            entry = Entry(weights.state, request, make())  # which may ask for another context, and so change `kept`
            self.kept[slot] = entry
        return entry.context

    def end(self) -> None:
        """The sampling is over: what it has asked for stays, and what that begins with, under the same hooks."""
        hooks = {used for _, used in self.used}
        self.kept = {slot: entry for slot, entry in self.kept.items() if slot[0] in self.wanted and slot[1] in hooks}
        self.wanted, self.used = set(), set()

    def clear(self) -> None:
        self.kept, self.wanted, self.used = {}, set(), set()


def prefix_key(request: Request, kind: Kind) -> Key:
    """What the context before the words depends on; references by identity, which a graph's cache keeps."""
    return (request.task, kind, *identities(s.embeddings for s in request.semantics), *identities(request.latents))


def whole_key(request: Request, kind: Kind) -> Key:
    return (*prefix_key(request, kind), request.text, request.unconditional)


def identities(values: Iterable[object]) -> tuple[int, ...]:
    return tuple(id(value) for value in values)
