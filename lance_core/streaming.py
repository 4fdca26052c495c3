"""Weights that come and go: packed into one stretch of memory per piece, so that a piece is moved by one copy."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what matrix products and copies on a GPU like best


class Piece:
    """Tensors that are moved together. They stay the same objects; only the memory behind them changes.

    present: whether they are on the device. The first time they leave, or arrive from the host, a packed copy is made
    there and kept, for weights never change: from then on to leave costs nothing.
    """

    def __init__(self, tensors: Sequence[Tensor], present: bool = True):
        self.tensors = list(tensors)
        self.strides = [torch.empty_like(tensor, device="meta").stride() for tensor in tensors]  # without gaps
        self.present = present
        self.home: Tensor | None = None
        self.pinned = False

    @property
    def size(self) -> int:
        """Bytes when packed."""
        return sum(padded(tensor.nbytes) for tensor in self.tensors)

    def leave(self) -> None:
        self.show(self.packed())
        self.present = False

    def arrive(self, device: torch.device) -> None:
        memory = empty(self.size, device)
        memory.copy_(self.packed())
        self.show(memory)
        self.present = True

    def packed(self) -> Tensor:
        """The tensors on the host, in one stretch."""
        if self.home is None:
            self.home = empty(self.size, torch.device("cpu"))
            for place, tensor in zip(self.places(self.home), self.tensors):
                place.copy_(tensor)
            if not self.present:
                self.show(self.home)
        return self.home

    def pin(self, device: torch.device) -> None:
        """Locks the packed copy in the host's memory, so that CUDA's copies from it run beside computation.

        Where the system refuses, copies are slower and that is all.
        """
        if not self.pinned:
            self.pinned = True
            lock(self.packed(), device)

    def show(self, memory: Tensor) -> None:
        """Lets the tensors be those that are packed in `memory`."""
        for tensor, place in zip(self.tensors, self.places(memory)):
            tensor.data = place

    def places(self, memory: Tensor) -> list[Tensor]:
        found, start = [], 0
        with torch.inference_mode(False):
            for tensor, stride in zip(self.tensors, self.strides):
                stretch = memory[start : start + tensor.nbytes].view(tensor.dtype)
                found.append(stretch.as_strided(tensor.shape, stride))
                start += padded(tensor.nbytes)
        return found


class Buffer:
    """Room on the device for one piece at a time, and the two events that keep readers and writers of it apart."""

    def __init__(self, size: int, device: torch.device):
        self.memory = empty(size, device)
        self.holds: int | None = None
        self.arrived, self.read = (torch.cuda.Event(), torch.cuda.Event()) if device.type == "cuda" else (None, None)


class Stream:
    """Brings the absent pieces of a list of layers one by one while the layers run, always two at a time.

    Hooks on the layers wait for a layer's piece before it runs and send for the next one behind it, around from the
    last layer to the first. On CUDA copies run on a stream of their own.
    """

    def __init__(self, layers: Sequence[nn.Module], pieces: Sequence[Piece], device: torch.device):
        self.device = device
        self.pieces = {index: piece for index, piece in enumerate(pieces) if not piece.present}
        largest = max(piece.size for piece in self.pieces.values())
        self.buffers = [Buffer(largest, device) for _ in range(2)]
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.copies is not None:
            for piece in self.pieces.values():
                piece.pin(device)
            self.copies.wait_stream(torch.cuda.current_stream(device))  # the buffers' memory may still be in use
        for buffer, index in zip(self.buffers, self.pieces):
            self._send(index, buffer)
        self.hooks = []
        for index in self.pieces:
            self.hooks.append(layers[index].register_forward_pre_hook(partial(self._before, index)))
            self.hooks.append(layers[index].register_forward_hook(partial(self._after, index)))

    @property
    def size(self) -> int:
        return sum(buffer.memory.nbytes for buffer in self.buffers)

    def close(self) -> None:
        """Ends streaming, also in the middle of a layer; the tensors are then the host's."""
        for hook in self.hooks:
            hook.remove()
        for piece in self.pieces.values():
            piece.show(piece.packed())
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.buffers = []

    def _before(self, index: int, *call) -> None:
        if all(buffer.holds != index for buffer in self.buffers):  # the layers did not run in order
            if self.copies is not None:
                self.copies.wait_stream(torch.cuda.current_stream(self.device))
            for buffer, wanted in zip(self.buffers, (index, self._following(index))):
                self._send(wanted, buffer)
        buffer = next(buffer for buffer in self.buffers if buffer.holds == index)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.arrived)
        self.pieces[index].show(buffer.memory)

    def _after(self, index: int, *call) -> None:
        buffer, other = sorted(self.buffers, key=lambda buffer: buffer.holds != index)
        self.pieces[index].show(self.pieces[index].packed())
        if self.copies is not None:
            buffer.read.record(torch.cuda.current_stream(self.device))
        self._send(self._following(other.holds), buffer)

    def _following(self, index: int) -> int:
        order = list(self.pieces)
        return order[(order.index(index) + 1) % len(order)]

    def _send(self, index: int, buffer: Buffer) -> None:
        buffer.holds = index
        home = self.pieces[index].packed()
        if self.copies is not None:
            self.copies.wait_event(buffer.read)
        with nullcontext() if self.copies is None else torch.cuda.stream(self.copies):
            buffer.memory[: home.nbytes].copy_(home, non_blocking=True)
            if self.copies is not None:
                buffer.arrived.record(self.copies)


class Lookup:
    """Looks up the rows of an embedding that stays on the host, and sends them to the device."""

    def __init__(self, embedding: nn.Module, device: torch.device):
        self.size = 0
        self.hooks = [
            embedding.register_forward_pre_hook(lambda module, call: (call[0].cpu(), *call[1:])),
            embedding.register_forward_hook(lambda module, call, rows: rows.to(device)),
        ]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def empty(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


def lock(memory: Tensor, device: torch.device) -> None:
    """Registers host memory with CUDA until it is freed: exactly its size, where torch's pinned memory takes more."""
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
        else:
            with suppress(RuntimeError):  # the refusal would otherwise be reported by whatever runs next
                torch.zeros(1, device=device)
