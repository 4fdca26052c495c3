"""A LoRA as our training saves it: in ComfyUI, by its own loader and by ours, what it is in the library."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lance_core import load_lance
from lance_core.train.lora import TARGETS, LoraConfig, add_lora, lora_tensors, save_lora

from .server import run_inside

SAME = 1e-5  # relative L2
EFFECT = 1e-3
SCRIPT = """
import json, pathlib
import folder_paths
from nodes import LoraLoaderModelOnly
from lance.lance_core import load_lance, stages
from lance.lance_core.adapters import apply_loras
from lance.nodes.lora import LanceLora
from lance.nodes.model import load_model
from lance.nodes.paint import LanceGenerate

checkpoint, lora, results = {checkpoint!r}, pathlib.Path({lora!r}), pathlib.Path({results!r})
folder_paths.add_model_folder_path("loras", str(lora.parent))
size = {{"size": "custom", "width": 64, "height": 48}}
widgets = {{"seed": 7, "steps": 4, "guidance": 4.0, "batch_size": 1, "shift": 3.5}}

def painted(model):
    return LanceGenerate.execute(model, "a red fox", 1, size, None, **widgets).args[0]["samples"]

def expected(strength):
    lance = apply_loras(library, [(lora, strength)])
    return stages.generate(lance, "a red fox", width=64, height=48, seed=7, steps=4)

def distance(a, b):
    return float((a - b).norm() / b.norm())

library, model = load_lance(checkpoint, device="cpu", dtype="fp32"), load_model(checkpoint, "default")
loaders = {{
    "LoraLoaderModelOnly": lambda strength: LoraLoaderModelOnly().load_lora_model_only(model, lora.name, strength)[0],
    "LanceLora": lambda strength: LanceLora.execute(model, lora.name, strength).args[0],
}}
results.write_text(json.dumps({{
    "effect": distance(expected(1.0), expected(0.0)),
    "same": {{
        f"{{name}} {{strength}}": distance(painted(load(strength)), expected(strength))
        for name, load in loaders.items() for strength in (1.0, -0.5)
    }},
}}))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory, comfyui, tiny_checkpoint):
    lance = load_lance(tiny_checkpoint / "Lance_3B", device="cpu", dtype="fp32")
    config = LoraConfig(rank=4, alpha=6.0, targets=TARGETS)
    for parameter in add_lora(lance.transformer, config)[1::2]:
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("trained")
    path = save_lora(folder / "style.safetensors", lora_tensors(lance.transformer), config, lance.config.text)
    places = {"checkpoint": tiny_checkpoint / "Lance_3B", "lora": path, "results": folder / "results.json"}
    done = run_inside(comfyui, SCRIPT.format(**{name: str(place) for name, place in places.items()}))
    return {**json.loads((folder / "results.json").read_text()), "log": done.stderr}


def test_every_loader_gives_the_library_s_picture(measured):
    assert measured["effect"] > EFFECT
    assert {name: error for name, error in measured["same"].items() if error > SAME} == {}


def test_no_tensor_is_left_over(measured):
    assert "lora key not loaded" not in measured["log"]
