"""What changes the weights by their gradients: AdamW, or Muon for the layers' matrices and AdamW for the rest."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..errors import LanceError
from .config import Training

# What an optimizer remembers of a weight: AdamW three things, Muon one.
MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")
# What surrounds these is AdamW's: there, rows or columns stand for tokens or channels.
INNER = re.compile(r"\.(layers|blocks)\.\d+\.|\.merger\.mlp\.")


def optimizers_of(trainee: nn.Module, training: Training) -> list[torch.optim.Optimizer]:
    """Raises LanceError where nothing is trained, or where torch has no Muon for it."""
    named = {name: weight for name, weight in trainee.named_parameters() if weight.requires_grad}
    if not named:
        raise LanceError("nothing is left to train: name parts that the model has in train.parts.")
    inner = inner_matrices(named) if training.optimizer == "muon" else []
    return [*muon([named.pop(name) for name in inner], training), *adamw(list(named.values()), training)]


def inner_matrices(named: dict[str, nn.Parameter]) -> list[str]:
    return [name for name, weight in named.items() if weight.ndim == 2 and INNER.search(name)]


def adamw(weights: list[nn.Parameter], training: Training) -> list[torch.optim.Optimizer]:
    if not weights:
        return []
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = not training.shard and all(weight.device.type in ("cpu", "cuda") for weight in weights)
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=training.betas, fused=fused)]


def muon(weights: list[nn.Parameter], training: Training) -> list[torch.optim.Optimizer]:
    """Every matrix changes alike in all directions, which learns faster (https://kellerjordan.github.io/posts/muon)."""
    if not weights:
        return []
    check_muon()
    options = {"lr": 0.0, "weight_decay": training.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(weights, **options)]


def check_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        raise LanceError(f"Muon needs torch 2.9 or newer, and this is {torch.__version__}: update it.")
