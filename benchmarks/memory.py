"""What the released model needs in memory, counted on the meta device: `python benchmarks/memory.py`.

Weights are exact. Keys and values are exact. The working memory of a pass counts the largest tensors that live at the
same time in a layer: the residual stream, and gate, up and their product in the MLP. Nothing here runs on a GPU; the
last column is a sum, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lance_core.config import TextConfig, VisionConfig
from lance_core.transformer import LanceTransformer
from lance_core.vae import VAEConfig, WanVAE
from lance_core.vit import VisionTower

GIB = 2**30
BF16 = 2
TEXT = 120  # tokens of template, system prompt and an ordinary caption


@dataclass(frozen=True)
class Task:
    """Tokens of the context without text, and of the target, boundaries included."""

    name: str
    context: int
    target: int
    needs_vision: bool = False


TASKS = (
    Task("text to image 768x768", 0, 2304 + 2),
    Task("image edit 768x768", 576 + 2304 + 4, 2304 + 2, needs_vision=True),
    Task("text to video 848x480, 49 frames", 0, 13 * 30 * 53 + 2),
    Task("text to video 848x480, 121 frames", 0, 31 * 30 * 53 + 2),
    Task("question about a 768 picture", 576 + 2, 256, needs_vision=True),
)


def gib(module: nn.Module, bytes_per_weight: int) -> float:
    return sum(p.numel() for p in module.parameters()) * bytes_per_weight / GIB


def main() -> None:
    config = TextConfig()
    parts = {
        "decoder, both experts": LanceTransformer(config, device="meta"),
        "vision tower": VisionTower(VisionConfig(), device="meta"),
        "VAE": WanVAE(VAEConfig(), device="meta"),
    }
    print(f"{'weights, GiB':36}{'bf16':>8}{'fp32':>8}")
    for name, module in parts.items():
        print(f"{name:36}{gib(module, 2):8.2f}{gib(module, 4):8.2f}")

    decoder = gib(parts["decoder, both experts"], BF16)
    width = config.num_key_value_heads * config.head_dim
    print(f"\n{'bf16, GiB':36}{'K and V':>8}{'a pass':>8}{'with decoder':>14}")
    for task in TASKS:
        branches = 2 if task.target > 256 else 1
        context = task.context + TEXT
        kv = branches * context * config.num_hidden_layers * 2 * width * BF16 / GIB
        # The residual stream and its update; gate, up and product of the MLP; both branches run one after the other.
        tokens = task.target if branches == 2 else context
        work = tokens * (2 * config.hidden_size + 3 * config.intermediate_size) * BF16 / GIB
        print(f"{task.name:36}{kv:8.2f}{work:8.2f}{decoder + kv + work:14.1f}")


if __name__ == "__main__":
    main()
