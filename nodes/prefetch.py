"""Weights on their way together, a layer at a time, where ComfyUI's dynamic VRAM brings them when they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..lance_core.transformer import Decoder, Run

try:
    from comfy.model_prefetch import make_prefetch_queue, prefetch_queue_pop
except ImportError:  # ComfyUI before 0.21
    make_prefetch_queue = prefetch_queue_pop = None


class Prefetch:
    """Keeps core's queue of layers in step with a decoder's forward.

    Each weight is then transferred once per forward, however many branches and chunks of tokens use it. A stopped
    forward leaves its queue to core, which empties all of them when a prompt ends.
    """

    def __init__(self, decoder: Decoder):
        self.queue: list | None = None
        self.device: torch.device | None = None
        # Their leaves instead of the layers, whose hooks refer to this: a cycle would keep an unloaded model's memory.
        self.understanding = [nn.ModuleList(leaves(layer, gen=False)) for layer in decoder.layers]
        self.both = [nn.ModuleList(leaves(layer, gen=True)) for layer in decoder.layers]
        decoder.register_forward_pre_hook(self.begin)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(self.advance)
        decoder.register_forward_hook(self.end)

    def begin(self, _decoder: Decoder, arguments: tuple[Sequence[Run]]) -> None:
        self.queue = None
        if not torch.compiler.is_compiling():
            streams = arguments[0][0].streams
            units = self.understanding if len(streams) == 1 else self.both
            self.device = streams[0].device
            self.queue = make_prefetch_queue(list(units), self.device, {"prefetch_dynamic_vbars": True})

    def advance(self, layer: nn.Module, _arguments: tuple) -> None:
        self.pop(layer)

    def end(self, _decoder: Decoder, arguments: tuple[Sequence[Run]], _output: object) -> None:
        self.pop(None)
        self.queue = None

    def pop(self, layer: nn.Module | None) -> None:
        if self.queue is not None:
            prefetch_queue_pop(self.queue, self.device, layer)


def leaves(layer: nn.Module, *, gen: bool) -> list[nn.Module]:
    """The modules of a layer that have weights, with or without those of the generation expert."""
    return [
        module
        for name, module in layer.named_modules()
        if not any(module.children()) and (gen or "_moe_gen" not in name)
    ]


def prefetch_layers(decoder: Decoder) -> None:
    """Prefetches the layers of a decoder, on a ComfyUI that can."""
    if make_prefetch_queue is not None:
        Prefetch(decoder)
