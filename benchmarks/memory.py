"""What the released model needs in memory, counted on the meta device: `python benchmarks/memory.py`.

Weights, keys and values are exact (the two branches of guidance share all but the caption's). The working memory of a
pass is `LanceTransformer.working_memory` and `noise_memory`. Nothing here runs on a GPU; the last column is a sum, not
a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lance_core.config import TextConfig, VisionConfig
from lance_core.transformer import LanceTransformer
from lance_core.vae import VAEConfig, WanVAE
from lance_core.vit import VisionTower

GIB = 2**30
TEXT = 120  # tokens of template, system prompt and an ordinary caption


@dataclass(frozen=True)
class Task:
    """Tokens of the context without text, and of the target, boundaries included."""

    name: str
    context: int
    target: int


TASKS = (
    Task("text to image 768x768", 0, 2304 + 2),
    Task("image edit 768x768", 576 + 2304 + 4, 2304 + 2),
    Task("text to video 848x480, 49 frames", 0, 13 * 30 * 53 + 2),
    Task("text to video 848x480, 121 frames", 0, 31 * 30 * 53 + 2),
    Task("question about a 768 picture", 576 + 2, 0),
)


def gib(module: nn.Module, bytes_per_weight: int) -> float:
    return sum(p.numel() for p in module.parameters()) * bytes_per_weight / GIB


def main() -> None:
    transformer = LanceTransformer(TextConfig(), dtype=torch.bfloat16, device="meta")
    parts = {
        "decoder, both experts": transformer,
        "vision tower": VisionTower(VisionConfig(), device="meta"),
        "VAE": WanVAE(VAEConfig(), device="meta"),
    }
    print(f"{'weights, GiB':36}{'bf16':>8}{'fp32':>8}")
    for name, module in parts.items():
        print(f"{name:36}{gib(module, 2):8.2f}{gib(module, 4):8.2f}")

    decoder = gib(transformer, 2)
    print(f"\n{'bf16, GiB':36}{'K and V':>8}{'a pass':>8}{'with decoder':>14}")
    for task in TASKS:
        context = task.context + TEXT
        kv = transformer.context_memory(context) / GIB
        noise = transformer.noise_memory(task.target)
        work = (transformer.working_memory(max(context, task.target)) + noise) / GIB
        print(f"{task.name:36}{kv:8.2f}{work:8.2f}{decoder + kv + work:14.1f}")


if __name__ == "__main__":
    main()
