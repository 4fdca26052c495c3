"""What the machine allows: the matrix products of a call alone, and how fast memory is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measuring import seconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MEMORY = 2**30  # bytes read to know the memory's rate: more than any cache holds


class Products(TorchDispatchMode):
    """Collects the matrix products of what runs under it, as calls that repeat them into memory of their own.

    skip: how many to leave out first. flops: of those collected. read: bytes of the weights among their arguments.
    """

    def __init__(self, skip: int = 0):
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []
        self.seen, self.skip = 0, skip
        self.flops = self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::linear", "aten::scaled_dot_product_attention"):
            self.seen += 1
            if self.seen > self.skip:
                self.add_linear(*args[:2]) if name == "aten::linear" else self.add_attention(*args[:3])
        return func(*args, **(kwargs or {}))

    def add_linear(self, x: Tensor, weight: Tensor) -> None:
        self.read += weight.nbytes
        self.add(torch.mm, x.reshape(-1, x.shape[-1]).clone(), weight.T)

    def add_attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Both products, without softmax; q `[B, nh, L, hd]`, k and v `[B, nkv, S, hd]`."""
        groups = q.shape[1] // k.shape[1]
        q = q.flatten(0, 1).contiguous()
        k, v = (x.repeat_interleave(groups, 1).flatten(0, 1).contiguous() for x in (k, v))
        self.add(torch.bmm, q, k.mT)
        self.add(torch.bmm, torch.rand(len(q), q.shape[1], k.shape[1], dtype=q.dtype), v)

    def add(self, product: Callable[..., Tensor], a: Tensor, b: Tensor) -> None:
        out = product(a, b)
        self.flops += 2 * out.numel() * a.shape[-1]
        self.calls.append(lambda: product(a, b, out=out))

    def repeat(self) -> None:
        """All of them once more."""
        with torch.inference_mode():
            for call in self.calls:
                call()


def products(call: Callable[[], object], after: Callable[[], object] | None = None) -> Products:
    """The matrix products of one call; of those behind its beginning, where `after` makes that beginning alone."""
    recorder = Products(products(after).seen if after else 0)
    with torch.inference_mode(), recorder:
        call()
    return recorder


def read_rate(repeats: int, size: int = MEMORY) -> float:
    """Bytes per second at which memory is read in one stream."""
    buffer = torch.ones(size // 4)
    return size / min(seconds(buffer.sum) for _ in range(1 + repeats))
