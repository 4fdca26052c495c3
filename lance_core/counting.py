"""How much memory a computation takes at most, counted while it runs without data on the meta device.

The code that is counted is the code that runs later, so the count follows every change of it.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default  # fused where it runs: no matrix of scores is made


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors on a device that were made inside and still live; `peak` is the most."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = device
        self.sizes: dict[int, int] = {}  # by storage; those made outside count nothing
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not ATTENTION:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, counts=False)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._note(tensor, counts=True)
        return result

    def _note(self, tensor: object, counts: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size = storage.nbytes() if counts else 0
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def peak(run: Callable[[], object]) -> int:
    """Bytes of the tensors on the meta device that `run` has at most at the same time."""
    with torch.inference_mode(), LiveTensors() as count:
        run()
    return count.peak


def on_meta(module: nn.Module, **instead: object) -> nn.Module:
    """A copy of a module without data, hooks and compiled methods.

    instead: what attributes of these names are in the copy, wherever in the module they are.
    """
    memo = {id(tensor): tensor.to("meta") for tensor in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for part in module.modules():
        memo[id(part._forward_hooks)] = OrderedDict()
        memo[id(part._forward_pre_hooks)] = OrderedDict()
        for name, value in instead.items():
            if hasattr(part, name):
                memo[id(getattr(part, name))] = value
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name in [name for name in part.__dict__ if callable(getattr(type(part), name, None))]:
            del part.__dict__[name]
    return copied
