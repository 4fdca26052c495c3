"""Every stage for a picture at the released size, random weights, bf16, CPU: `python benchmarks/full_size.py`.

Shows that the full-size model runs through and what it takes: seconds and the process's peak memory after each stage.
Needs 20 GB of free memory and a few minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measuring import peak_gigabytes
from torch import nn

from lance_core import stages
from lance_core.checkpoint import Lance
from lance_core.config import LanceConfig
from lance_core.tiny import tokenizer_specification
from lance_core.tokenizer import Tokenizer
from lance_core.transformer import LanceTransformer
from lance_core.vae import VAEConfig, WanVAE
from lance_core.vit import VisionTower

GIB = 2**30 / 1e9  # in GB
TOKENS = 16


def filled(module: nn.Module) -> nn.Module:
    """The module with memory, and in it values that keep activations finite (drawing normal ones takes minutes)."""
    module = module.to_empty(device="cpu").requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        if name.endswith("gamma") or parameter.ndim == 1 and name.endswith("weight"):
            parameter.fill_(1)  # norms
        else:
            parameter.uniform_(-1, 1).mul_((3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.02)
    return module


def measured(name: str, stage: Callable):
    start = time.perf_counter()
    result = stage()
    print(f"{name:44}{time.perf_counter() - start:10.1f}{peak_gigabytes() / GIB:20.1f}", flush=True)
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    config, empty = LanceConfig(), {"dtype": torch.bfloat16, "device": "meta"}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16, random weights")
    print(f"{'stage':44}{'seconds':>10}{'peak so far, GiB':>20}")

    def build() -> Lance:
        transformer = LanceTransformer(config.text, **empty)
        parts = transformer, VisionTower(config.vision, **empty), WanVAE(VAEConfig(), **empty)
        tokenizer = Tokenizer(tokenizer_specification())
        return Lance(config, *map(filled, parts), tokenizer, torch.device("cpu"), torch.bfloat16)

    lance = measured("weights", build)
    prompt = "A small red fox jumps over a blue river."
    # The first pass also touches every weight for the first time; the second is what a step costs.
    for name in ("text to image 768x768, prefill and first step", "the same again"):
        size = dict(width=768, height=768, steps=1)
        latent = measured(name, lambda: stages.generate(lance, prompt, **size))
    frames = measured("decode 768x768", lambda: stages.decode_video(lance, latent))
    semantic = measured("encode semantic 672x672", lambda: stages.encode_semantic(lance, frames))
    reference = measured("encode latent 768x768", lambda: stages.encode_latent(lance, frames))
    question = "What is in the picture?"
    measured(f"answer of {TOKENS} tokens", lambda: stages.understand(lance, semantic, question, max_new_tokens=TOKENS))
    instruction = "Make it blue."
    edited = measured("edit 768x768, one step", lambda: stages.edit(lance, semantic, reference, instruction, steps=1))
    if not edited.isfinite().all():
        raise SystemExit("the edit is not finite")


if __name__ == "__main__":
    main()
