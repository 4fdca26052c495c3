"""Lance made of ComfyUI's own layers, in ComfyUI's own interpreter, computes what it computes of torch's."""

from __future__ import annotations

import pytest

from .server import run_inside

SCRIPT = """
import torch, comfy.memory_management, comfy.ops
comfy.memory_management.aimdo_enabled = {dynamic}  # layers then have no weights until they are loaded

from lance.lance_core import stages
from lance.lance_core.checkpoint import load_parts
from lance.lance_core.layout import find_checkpoint

frames = torch.rand(1, 112, 112, 3, generator=torch.Generator().manual_seed(0))

def results(operations):
    lance = load_parts(
        find_checkpoint({checkpoint!r}), device=torch.device("cpu"), dtype=torch.float32, operations=operations
    )
    semantic = stages.encode_semantic(lance, frames, resolution=None)
    latent = stages.encode_latent(lance, frames, resolution=None)
    edited = stages.edit(lance, semantic, latent, "make it blue", steps=2)
    answer = stages.understand(lance, semantic, "what?", max_new_tokens=8)
    return answer, [semantic.embeddings, latent, edited, stages.decode_video(lance, edited)]

answer, ours = results(torch.nn)
hosted_answer, hosted = results(comfy.ops.{operations})
errors = [float((a - b).norm() / b.norm()) for a, b in zip(hosted, ours)]
print("same answer" if answer == hosted_answer else "another answer", max(errors))
"""


@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "dynamic-vram"])
@pytest.mark.parametrize("operations", ["disable_weight_init", "manual_cast"])
def test_results_are_those_of_torch_s_layers(comfyui, tiny_checkpoint, operations, dynamic):
    script = SCRIPT.format(checkpoint=str(tiny_checkpoint), operations=operations, dynamic=dynamic)
    done = run_inside(comfyui, script)
    verdict, error = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert verdict == "same answer" and float(error) <= 1e-5
