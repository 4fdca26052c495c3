"""LoRAs of every style, through ComfyUI's own functions in ComfyUI's own interpreter, change what they should."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from test_lora import FACTORS, LINEAR, PATHS, RANK, WEIGHTS, Q, convert, factors

from .server import run_inside

ALPHA = 2.0
SCRIPT = """
import json, pathlib, torch
import comfy.lora, comfy.lora_convert
from safetensors.torch import load_file, save_file

folder = pathlib.Path({folder!r})

class Model(torch.nn.Module):  # what ComfyUI asks a model for when it names its keys
    class model_config:
        unet_config = {{}}

    def state_dict(self):
        return {{"diffusion_model." + name: weight for name, weight in load_file(folder / "weights").items()}}

model = Model()
keys = comfy.lora.model_lora_keys_unet(model, {{}})
for path in sorted(folder.glob("*.lora")):
    lora = comfy.lora_convert.convert_lora(load_file(path))
    weights = model.state_dict()
    changed = {{
        key: comfy.lora.calculate_weight([({strength}, patch, 1.0, None, None)], weights[key].clone(), key)
        for key, patch in comfy.lora.load_lora(lora, keys).items()
    }}
    save_file(changed, path.with_suffix(".changed"))
"""


def changed_weights(comfyui, folder, loras: dict[str, dict[str, torch.Tensor]], weights, strength=1.0):
    """The weights that ComfyUI changes for each LoRA, and what it logs."""
    save_file(weights, folder / "weights")
    for name, lora in loras.items():
        save_file({key: tensor.clone() for key, tensor in lora.items()}, folder / f"{name}.lora")
    done = run_inside(comfyui, SCRIPT.format(folder=str(folder), strength=strength))
    return {name: load_file(folder / f"{name}.changed") for name in loras}, done.stderr


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in WEIGHTS.items()}


def test_every_style_changes_the_same_weights(comfyui, tmp_path):
    weights, expected = random_weights(), {}
    for module in LINEAR:
        down, up = factors(module).values()
        expected[f"diffusion_model.{module}.weight"] = weights[f"{module}.weight"] + 0.5 * ALPHA / RANK * up @ down
    loras = {}
    for style in PATHS:
        for suffixes in FACTORS:
            file = {name: tensor for module in LINEAR for name, tensor in factors(module, style, suffixes).items()}
            loras[f"{style} {suffixes}"] = convert(file, {"lora_alpha": ALPHA, "r": RANK}).tensors
    changed, log = changed_weights(comfyui, tmp_path, loras, weights, strength=0.5)
    for name, result in changed.items():
        assert result.keys() == expected.keys(), name
        for key, weight in result.items():
            torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}")
    assert "not loaded" not in log


def test_dora_embeddings_and_lokr_of_peft(comfyui, tmp_path):
    weights = random_weights()
    down, up = factors(Q).values()
    magnitude = torch.rand(len(up)) + 0.5
    dora = {**factors(Q), f"base_model.model.{Q}.lora_magnitude_vector": magnitude}

    embedding = "language_model.model.embed_tokens"
    words, width = LINEAR[embedding]
    a, b = torch.rand(RANK, words), torch.rand(width, RANK)
    path = f"base_model.model.{embedding}.lora_embedding"

    w1, w2 = torch.rand(8, 8), torch.rand(16, 16)
    lycoris = "lycoris_" + Q.replace(".", "_")

    loras = {
        "dora": convert(dora).tensors,
        "embedding": convert({path + "_A": a, path + "_B": b}).tensors,
        "lokr": convert({f"{lycoris}.lokr_w1": w1, f"{lycoris}.lokr_w2": w2}).tensors,
    }
    changed, log = changed_weights(comfyui, tmp_path, loras, weights)
    q = weights[f"{Q}.weight"]
    expected = {  # ComfyUI divides by the norms of the weight before the change, PEFT by those after it
        "dora": magnitude[:, None] * (q + up @ down) / q.norm(dim=1, keepdim=True),
        "embedding": weights[f"{embedding}.weight"] + (b @ a).T,
        "lokr": q + torch.kron(w1, w2),
    }
    for name, weight in expected.items():
        (result,) = changed[name].values()
        torch.testing.assert_close(result, weight, msg=name)
    assert "not loaded" not in log
