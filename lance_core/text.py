"""Writing text: how the next token is chosen, when to stop, and what is shown meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .tokenizer import IM_END, Tokenizer
from .transformer import Context, DecodeCache, LanceTransformer


def choose(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """The next token `[1]` from logits `[V]`: the likeliest at temperature 0, else drawn on the CPU.

    top_k 0 and top_p 1 switch their limits off; top_p is the nucleus of arXiv 1904.09751.
    """
    if temperature == 0:
        return logits.argmax(keepdim=True)
    order = logits.float().cpu().sort(descending=True)
    probabilities = torch.softmax(order.values / temperature, dim=-1)
    if top_k > 0:
        probabilities[top_k:] = 0
    before = probabilities.cumsum(-1) - probabilities
    probabilities[(before >= top_p) & (before > 0)] = 0
    return order.indices[torch.multinomial(probabilities, 1, generator=generator)].to(logits.device)


def tokens(
    transformer: LanceTransformer,
    context: Context,
    first: Tensor,
    position: int,
    pick: Callable[[Tensor], Tensor],
    limit: int,
    graph: bool = False,
) -> Iterator[Tensor]:
    """Up to `limit` tokens `[1]`, each read back before the next.

    context: everything but the prompt's last token `first` `[1]`, which stands at `position` on all three axes.
    graph: as a CUDA graph, which asks the host for a single call per token; all weights have to stay where they are.
    """
    cache = DecodeCache(context, limit)
    del context  # or keys and values would be there twice
    positions = torch.arange(position, position + limit, device=first.device).expand(3, -1)
    cos, sin = transformer.rotary(positions, cache.dtype)
    step = partial(one_token, transformer, cache, cos, sin)
    token = first
    for i in range(limit):
        if graph and i == 1:  # the first token should not wait for the recording
            step = Recording(transformer, cache, cos, sin)
        token = pick(step(token, i))
        yield token


def one_token(
    transformer: LanceTransformer, cache: DecodeCache, cos: Tensor, sin: Tensor, token: Tensor, i: int
) -> Tensor:
    """Logits after the i-th token behind the context."""
    return transformer.decode(token, cos[i : i + 1], sin[i : i + 1], cache)


class Recording:
    """The work for one token as a CUDA graph, recorded at the second and replayed for all from there on."""

    def __init__(self, transformer: LanceTransformer, cache: DecodeCache, cos: Tensor, sin: Tensor):
        start = cache.length - 1  # where the first token stands
        self.rows = cos, sin, torch.arange(start, start + len(cos), device=cos.device)
        self.row = tuple(x[1:2].clone() for x in self.rows)
        self.token = torch.zeros(1, dtype=torch.long, device=cos.device)
        cos, sin, index = self.row
        step = partial(transformer.decode, self.token, cos, sin, cache, index)
        # What a first call allocates and tunes must not be recorded; what it writes, the second token overwrites.
        beside = torch.cuda.Stream(cos.device)
        beside.wait_stream(torch.cuda.current_stream(cos.device))
        with torch.cuda.stream(beside):
            step()
        torch.cuda.current_stream(cos.device).wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=beside):
            self.logits = step()

    def __call__(self, token: Tensor, i: int) -> Tensor:
        self.token.copy_(token)
        for own, all_rows in zip(self.row, self.rows):
            own.copy_(all_rows[i : i + 1])
        self.graph.replay()
        return self.logits


def clean(text: str) -> str:
    """The answer in what was written: without `<|im_end|>` and the space around it (inference_lance.py)."""
    return text.replace(IM_END, "").strip()


def partial_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text so far, without an unfinished character at its end."""
    return clean(tokenizer.decode(ids)).rstrip("\ufffd")
