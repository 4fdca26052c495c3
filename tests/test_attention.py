"""Attention with grouped heads, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import Recorder

from lance_core.attention import attention
from lance_core.transformer import latent_position_ids, latent_position_rows, lower_right


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (16, 2), (6, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_are_repeated_keys(heads, groups, causal):
    q, k, v = torch.randn(2, heads, 5, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    mask = lower_right(5, 9, "cpu") if causal else None
    keys, values = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    assert torch.allclose(attention(q, k, v, mask), expected, atol=1e-6)


def test_position_rows_repeat_what_few_positions_have():
    """A block of 121 frames has 49,290 tokens, but only 31 + 30 + 53 positions."""
    ids = latent_position_ids(31, 30, 53)
    rows = latent_position_rows(ids, 96, torch.float64)
    some = torch.tensor([0, 1, 53, 1590, len(ids) - 1])
    assert torch.equal(rows[some], latent_position_rows(ids[some], 96, torch.float64))
    with Recorder() as recorder:
        latent_position_rows(ids, 96, torch.bfloat16)
    assert recorder.largest <= ids.numel() * 96
