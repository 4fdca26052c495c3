"""ComfyUI's choice of attention for `lance_core`, and with it the stop button in every layer."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from torch import Tensor

from ..lance_core.attention import attention as grouped_attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, transformer_options: dict | None = None
) -> Tensor:
    """As `lance_core.attention.attention`, by the kernel that ComfyUI was started with or a node has put in.

    Raises ComfyUI's interruption where somebody has pressed the stop button.
    """
    if not torch.compiler.is_compiling():
        comfy.model_management.throw_exception_if_processing_interrupted()

    def kernel(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        options = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": transformer_options or {}}
        if attn_mask is None:
            return optimized_attention(q, k, v, q.shape[1], **options)
        return optimized_attention_masked(q, k, v, q.shape[1], mask=additive(attn_mask, q.dtype), **options)

    return grouped_attention(q, k, v, mask, kernel)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as summands of the scores: some of ComfyUI's kernels add whatever they are given.

    Half the lowest number and not minus infinity, which gives NaN where a chunk of keys is hidden altogether.
    """
    hidden = torch.finfo(dtype).min / 2
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden)
