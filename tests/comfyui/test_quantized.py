"""Quantised models in ComfyUI's own interpreter: measured by `quantized_inside.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file
from test_gguf import write

from lance_core.checkpoint import POSITION_TABLE

from .conftest import ROOT
from .server import find_python
from .test_server import assert_sentence

SAME = 1e-5  # relative L2: the same numbers in another order
LAYOUTS = ("fp8", "int8", "w4a8")
ALL = "every_way,files,lora,saved,partial_loading,compiled,layer,folding,prefetch"


def measure(comfyui: Path, checkpoint: Path, folder: Path, names: str, *flags: str) -> dict:
    """The measurements of that name in a ComfyUI with these flags, where the package `gguf` is installed."""
    results, packages = folder / "results.json", folder / "packages"
    packages.mkdir()
    (packages / "gguf").symlink_to(Path(gguf.__file__).parent)
    command = [find_python(comfyui), ROOT / "tests/comfyui/quantized_inside.py", comfyui, checkpoint, results, names]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    command = [*map(str, command), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())


def of(measurements: dict, name: str):
    """A layout's or file's measurement, where this ComfyUI is new enough for it."""
    if name not in measurements:
        pytest.skip(f"this ComfyUI has no {name} weights")
    return measurements[name]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Path:
    return tiny_checkpoint / "Lance_3B"


@pytest.fixture(scope="module")
def measured(tmp_path_factory, comfyui, checkpoint) -> dict:
    folder = tmp_path_factory.mktemp("measured")
    stored = load_file(checkpoint / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in stored.items() if name != POSITION_TABLE}
    for kind in ("Q8_0", "Q4_0"):
        write(folder / f"{kind}.gguf", tensors, kind)
    for name in ("llm_config.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, folder)
    return measure(comfyui, checkpoint, folder, ALL)


@pytest.mark.parametrize(("layout", "error"), [("fp8", 0.08), ("int8", 0.05), ("w4a8", 0.2)])
def test_every_node_computes_with_quantised_weights(measured, layout, error):
    """Bounds: a weight's relative rounding error (0.026, 0.009, 0.07), and that of eight-bit inputs, thrice."""
    way = of(measured["every_way"]["layouts"], layout)
    assert way["quantised"] == measured["every_way"]["names"]
    assert 0 < way["dense"] < error and 0 < way["edit"] < error
    assert way["KSampler"] <= SAME
    assert way["answer"]


def test_fp8_is_the_library_s(measured):
    """Without float8 arithmetic core computes with what the weights stand for, as the library does."""
    assert measured["every_way"]["layouts"]["fp8"]["library"]["fp8"] <= SAME


def test_int8_is_the_library_s_with_rounded_inputs(measured):
    """A layer is the same; over a sampling, roundings that differ in the last digit fall either way."""
    way = of(measured["every_way"]["layouts"], "int8")
    assert measured["layer"]["int8-dynamic"] <= SAME < measured["layer"]["int8"]
    assert way["library"]["int8-dynamic"] < 2 * way["dense"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_core_counts_the_bytes_that_there_are(measured, layout):
    way = of(measured["every_way"]["layouts"], layout)
    markers = way["size"] - way["expected size"]
    assert 0 < markers < 100 * len(way["quantised"])
    assert way["size"] < way["dense size"]
    products = 4 * way["largest product"]  # of 8 bits, which core makes in 32
    assert way["estimate"] - way["dense estimate"] == (0 if way["layout"] == "fp8" else products)


@pytest.mark.parametrize(
    ("name", "layout", "error"),
    [("fp8", "fp8", SAME), ("int8", "int8", 0.05), ("int4", "int8", 0.05), ("nf4", "int8", 0.05),
     ("Q8_0.gguf", "int8", 0.05), ("Q4_0.gguf", "int8", 0.05)],
)  # fmt: skip
def test_a_quantised_file_is_loaded_as_it_is_or_in_eight_bits(measured, name, layout, error):
    """As dense weights it is what the library reads; int8 rounds to eight bits, weights and inputs."""
    file = of(measured["files"], name)
    if "int8" not in measured["lora"]:
        layout, error = "fp8", 0.08  # what an older ComfyUI has in eight bits
    assert file["layout"] == layout
    assert file["distance"] < error
    assert file["dense"] <= SAME


@pytest.mark.parametrize(("layout", "error"), [("fp8", 0.25), ("int8", 0.25), ("w4a8", 0.6)])
def test_a_lora_has_its_effect_and_leaves_no_trace(measured, layout, error):
    """The effect differs from that on dense weights by what quantising the changed weights once more costs."""
    lora = of(measured["lora"], layout)
    assert lora["effect"] > 0.2 and lora["error"] < error
    assert lora["unpatched"] is True and lora["again"] is True


@pytest.mark.parametrize("layout", ["fp8", "int8"])
def test_a_saved_model_loads_again(measured, layout):
    saved = of(measured["saved"], layout)
    assert saved["same"] is True and saved["equal"] is True
    assert saved["library"] <= SAME


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_partly_loaded_model_computes_the_same_bits(measured, layout):
    part = of(measured["partial_loading"], layout)
    assert part["loaded"] < 0.5 and part["equal"] is True


def test_compiled_it_is_the_same(measured):
    assert measured["compiled"]["fp8"]["plain"] <= SAME


def test_compiled_int8_is_as_near_to_dense_weights(measured):
    """Its inputs are rounded, and sums in another order make some of them fall the other way."""
    int8 = of(measured["compiled"], "int8")
    assert int8["dense"] < 1.5 * int8["both"]


def test_four_bits_are_not_compiled(measured):
    kind, sentence = of(measured["compiled"], "w4a8").split(": ", 1)
    assert kind == "LanceError" and "TorchCompileModel" in sentence
    assert_sentence(sentence)


def test_one_scale_costs_only_values_too_small_for_it(measured):
    folding = measured["folding"]
    assert folding["scale's elements"] == 1
    assert folding["changed where rows are alike"] == 0
    assert 0 < folding["changed"] < folding["of"] / 20
    assert folding["error in scales"] <= 2**-10  # half a step of e4m3's smallest numbers


def test_layers_are_prefetched_in_order_and_only_where_core_can(measured):
    prefetch = measured["prefetch"]
    assert prefetch["on a CPU"] is True and prefetch["equal"] is True
    assert len(prefetch["began"]) > 6 and prefetch["fetched"] == prefetch["began"]
    assert prefetch["left"] == [None]


@pytest.mark.parametrize(
    ("flags", "quantised", "error"),
    [
        ((), False, SAME),
        (("--supports-fp8-compute", "--fast", "fp8_matrix_mult"), False, SAME),
        (("--fp8_e4m3fn-unet",), True, 0.08),
        (("--fp8_e4m3fn-unet", "--supports-fp8-compute", "--fast", "fp8_matrix_mult"), True, 0.15),
    ],
    ids=["none", "fast", "fp8", "fp8-fast"],
)
def test_core_s_flags_for_float8_mean_scaled_weights(comfyui, checkpoint, tmp_path, flags, quantised, error):
    """Norms and embeddings stay as they are; where inputs are float8 too, the error is about twice as large."""
    found = measure(comfyui, checkpoint, tmp_path, "flags", *flags)["flags"]
    assert bool(found["quantised"]) is quantised
    assert not any("float8" in dtype for dtype in found["dtypes"])
    assert found["distance"] < error
    assert found["dense"] <= SAME


def test_weights_too_coarse_for_lance_are_refused(comfyui, checkpoint, tmp_path):
    refused = measure(comfyui, checkpoint, tmp_path, "refused", "--fp8_e5m2-unet")["refused"]
    kind, sentence = refused.pop("default").split(": ", 1)
    assert kind == "LanceError" and "float8_e5m2" in sentence
    assert_sentence(sentence)
    assert refused["fp8"] == "no error"
    for error in {*refused.values()} - {"no error"}:
        assert "which came with version" in error
