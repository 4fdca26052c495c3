"""What ComfyUI adds to the library, and what its cache of contexts saves, on a CPU in float32.

Run by ComfyUI's Python: `python benchmarks/comfyui.py PATH_OF_COMFYUI [--threads 2] [--steps 8]`. Random weights, one
process, the same request each time; every figure is a ratio of two medians of that run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/comfyui"))

from inside import begin

REPEATS = 5
PROMPT = "A red fox sleeps on a mossy stone while snow falls slowly through the birch trees behind it."


def seconds(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The median duration; `before` is not counted."""
    durations = []
    for _ in range(REPEATS):
        before()
        start = time.perf_counter()
        action()
        durations.append(time.perf_counter() - start)
    return median(durations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    begin(arguments.comfyui)

    import comfy.utils
    import torch
    from lance.lance_core import load_lance, stages
    from lance.lance_core.tiny import TINY_TEXT, make_tiny
    from lance.nodes.model import load_model
    from lance.nodes.paint import LanceEdit, LanceGenerate

    torch.set_num_threads(arguments.threads)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2, "mrope_section": (4, 6, 6)}
    text = replace(TINY_TEXT, hidden_size=512, intermediate_size=2752, num_hidden_layers=8, **heads)
    widgets = {"seed": 1, "steps": arguments.steps, "guidance": 4.0, "batch_size": 1, "shift": 3.5}
    size = {"size": "custom", "width": 256, "height": 256}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint = str(make_tiny(Path(folder, "model"), text=text) / "Lance_3B")
        library, model = load_lance(checkpoint, device="cpu", dtype="fp32"), load_model(checkpoint, "fp32")
        seen = stages.Semantic(torch.randn(81, 512), (1, 18, 18), "image")
        latent = torch.randn(1, 48, 1, 16, 16)

        def generate() -> None:
            LanceGenerate.execute(model, PROMPT, 1, size, None, **widgets)

        def edit() -> None:
            LanceEdit.execute(model, seen, {"samples": latent}, PROMPT, "edit", **widgets)

        options = {"seed": 1, "steps": arguments.steps}
        figures = {
            "text to image": (
                seconds(lambda: stages.generate(library, PROMPT, width=256, height=256, **options)),
                seconds(generate, model.model.forget),
                seconds(generate),
            ),
            "edit": (
                seconds(lambda: stages.edit(library, seen, latent, PROMPT, **options)),
                seconds(edit, model.model.forget),
                seconds(edit),
            ),
        }
    print(f"8 layers x 512, 256x256, {arguments.steps} steps, {arguments.threads} threads; seconds")
    for name, (alone, fresh, again) in figures.items():
        print(f"{name}: library {alone:.2f}, in ComfyUI {fresh:.2f} ({fresh / alone:.2f} times), ", end="")
        print(f"another seed {again:.2f} ({fresh / again:.2f} times faster)")


if __name__ == "__main__":
    main()
