"""Counting what a call asks of the device: tensor operations, views, and waits for the host.

Under `torch.inference_mode` composite operations (linear, rms_norm, scaled_dot_product_attention, …) reach the
dispatcher whole, and count as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What hands a number, or a shape that depends on numbers, to the host: on an accelerator it waits for the device.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


@dataclass(frozen=True)
class Operations:
    """How often each operation ran, by its name in ATen."""

    computed: Counter[str] = field(default_factory=Counter)  # made or wrote a tensor
    views: Counter[str] = field(default_factory=Counter)  # gave the memory of an argument another shape
    waits: Counter[str] = field(default_factory=Counter)  # of the above, those for which the host waits

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.computed + other.computed, self.views + other.views, self.waits + other.waits)

    def __sub__(self, other: Operations) -> Operations:
        return Operations(self.computed - other.computed, self.views - other.views, self.waits - other.waits)


def count(call: Callable[[], object]) -> Operations:
    """The operations of one call, in inference mode."""
    recorder = _Recorder()
    with torch.inference_mode(), recorder:
        call()
    return recorder.operations


def count_per_call(modules: Iterable[nn.Module], call: Callable[[], object]) -> list[Operations]:
    """The operations inside every forward of `modules` that the call makes, in the order of the forwards."""
    recorder, starts, forwards = _Recorder(), [], []

    def enter(module: nn.Module, inputs: object) -> None:
        starts.append(recorder.operations)

    def leave(module: nn.Module, inputs: object, outputs: object) -> None:
        forwards.append(recorder.operations - starts.pop())

    handles = [h for m in modules for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.inference_mode(), recorder:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return forwards


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = Operations()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        one = Counter([func._schema.name.removeprefix("aten::")])
        view = is_view(func, (args, kwargs), result)
        self.operations += Operations(
            Counter() if view else one, one if view else Counter(), one if waits(func, args, kwargs) else Counter()
        )
        return result


def is_view(func, arguments: object, result: object) -> bool:
    """Whether the result is nothing but an argument's memory; reshapes that had to copy are none."""
    results = set(storages(result))
    return bool(results) and not func._schema.is_mutable and results <= set(storages(arguments))


def waits(func, args: tuple, kwargs: dict) -> bool:
    """Whether the host waits: for a value, a shape that depends on values, or a copy to its memory.

    A copy is known by the device asked for, so that it is found where everything is on the CPU, too.
    """
    name = func._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    if name in ("to", "_to_copy", "copy_"):
        source, *_ = (leaf for leaf in reversed(leaves) if isinstance(leaf, Tensor))
        target = args[0].device if name == "copy_" else next((x for x in leaves if isinstance(x, torch.device)), None)
        return target == torch.device("cpu") and (name != "copy_" or source.device != target)
    masks = name == "index" and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in leaves[1:])
    return masks or name in READS


def storages(tree: object) -> Iterator[int]:
    """The identity of the memory behind every tensor of a nested structure."""
    return (leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
