"""The one place where attention is computed; a host may pass a callable of its own instead."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, with grouped key/value heads where there are fewer of them.

    q `[B, nh, L, hd]`, k and v `[B, nkv, S, hd]`, mask `[L, S]` boolean (True: may attend) -> `[B, nh, L, hd]`.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
