"""The one place where attention is computed; a host may pass a callable of its own instead."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    kernel: Attention = F.scaled_dot_product_attention,
) -> Tensor:
    """Scaled dot-product attention, with grouped key/value heads where there are fewer of them.

    q `[B, nh, L, hd]`, k and v `[B, nkv, S, hd]`, mask `[L, S]` or `[B, 1, L, S]` boolean (True: may attend)
    -> `[B, nh, L, hd]`.
    kernel: what computes it for equally many heads of queries, keys and values; called like the default one.
    """
    B, nh, L, hd = q.shape
    group = nh // k.shape[1]
    if group == 1:
        return kernel(q, k, v, attn_mask=mask)
    # The heads of a group see the same keys, so they are just more queries. Torch's own `enable_gqa` falls back to a
    # dense L x S matrix on every device, or for every dtype, for which no fused kernel knows groups.
    q = q.reshape(B, nh // group, group * L, hd)
    mask = None if mask is None else mask.repeat(*(1,) * (mask.ndim - 2), group, 1)
    return kernel(q, k, v, attn_mask=mask).reshape(B, nh, L, hd)
