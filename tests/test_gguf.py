"""GGUF files: real ones, written by the package `gguf`, and damaged ones."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from goldens import TINY
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from lance_core.__main__ import main
from lance_core.checkpoint import POSITION_TABLE, load_lance
from lance_core.errors import LanceError
from lance_core.gguf import read_entries
from lance_core.inspection import inspect
from lance_core.layout import list_checkpoints
from lance_core.quantized import quantizable
from lance_core.storage import fill, read_header

ROOT = Path(__file__).parents[1]
ERRORS = {"F32": 1e-9, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q5_1": 0.06, "Q4_0": 0.12}  # relative, of a weight


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    stored = load_file(TINY / "Lance_3B" / "model.safetensors")
    return {name: tensor.float() for name, tensor in stored.items() if name != POSITION_TABLE}


def write(path: Path, tensors: dict[str, torch.Tensor], kind: str = "Q8_0", prefix: str = "") -> Path:
    """A GGUF file whose projections are of that type, with configuration and tokenizer beside it."""
    writer = GGUFWriter(path, "lance")
    writer.add_uint32("lance.block_count", 3)
    writer.add_array("lance.words", ["a", "red", "fox"])
    writer.add_array("lance.numbers", [1, 2, 3])
    writer.add_bool("lance.flag", True)
    for name, tensor in tensors.items():
        type = GGMLQuantizationType[kind] if quantizable(name) else GGMLQuantizationType.F32
        writer.add_tensor(prefix + name, gguf.quants.quantize(tensor.numpy(), type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("llm_config.json", "tokenizer.json"):
        shutil.copy(TINY / "Lance_3B" / name, path.parent)
    return path


@pytest.mark.parametrize("kind", ERRORS)
def test_every_type_loads_close_to_what_it_was_made_of(tmp_path, tensors, kind):
    lance = load_lance(write(tmp_path / "lance.gguf", tensors, kind), device="cpu")
    for name, parameter in lance.transformer.named_parameters():
        assert parameter.dtype == torch.float32
        error = (parameter - tensors[name]).norm() / tensors[name].norm()
        assert error <= (ERRORS[kind] if quantizable(name) else 0), name


def test_the_numbers_are_those_of_the_package(tmp_path, tensors):
    """Read in pieces of blocks, and dequantised as a whole."""
    path = write(tmp_path / "lance.gguf", tensors, "Q5_1")
    header, reader = read_header(path), gguf.GGUFReader(path)
    for entry in reader.tensors:
        target = torch.empty(header[entry.name].shape)
        fill([(target, header[entry.name])])
        assert torch.equal(target, torch.tensor(gguf.quants.dequantize(entry.data, entry.tensor_type)))


def test_a_large_tensor_is_read_in_pieces(tmp_path):
    weight = torch.randn(1500, 2048)
    path = write(tmp_path / "large.gguf", {"language_model.model.layers.0.mlp.up_proj.weight": weight})
    ((_, stored),) = read_header(path).items()
    target = torch.empty(1500, 2048)
    fill([(target, stored)])
    assert (target - weight).norm() / weight.norm() < 0.01


def test_comfyui_s_prefix_and_bf16(tmp_path, tensors):
    plain = load_lance(write(tmp_path / "plain.gguf", tensors), dtype="bf16")
    prefixed = load_lance(write(tmp_path / "prefixed.gguf", tensors, prefix="model.diffusion_model."), dtype="bf16")
    for (_, a), (_, b) in zip(plain.transformer.named_parameters(), prefixed.transformer.named_parameters()):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def test_weights_are_quantised_again_like_those_of_any_source(tmp_path, tensors):
    path = write(tmp_path / "lance.gguf", tensors)
    loaded = load_lance(path, weights="int8").transformer
    assert main(["quantize", str(path), str(tmp_path / "int8"), "--format", "int8"]) == 0
    for (name, a), (_, b) in zip(
        loaded.named_parameters(), load_lance(tmp_path / "int8").transformer.named_parameters(), strict=True
    ):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_inspect_and_list(tmp_path, tensors):
    path = write(tmp_path / "lance.gguf", tensors)
    inspection = inspect(path)
    assert inspection.files[0][2] == "F32, Q8_0" and not inspection.formats
    assert inspection.parameters == inspect(TINY).parameters | {"vision tower": 0, "VAE": 0}
    assert list_checkpoints(tmp_path) == ["lance.gguf"]


# ---- what is refused


def refusal(path: Path) -> str:
    with pytest.raises(LanceError) as caught:
        load_lance(path)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message.replace("...", "")
    return message


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path, tensors):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    path = write(tmp_path / "lance.gguf", {key: value for key, value in tensors.items() if key != name})
    assert f"'{name}' is missing" in refusal(path)
    path = write(path, tensors | {name: torch.zeros(96, 32)})
    assert f"'{name}' is [96, 32] where [96, 64] is expected" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_off(tmp_path, tensors, share):
    path = write(tmp_path / "lance.gguf", tensors)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "lance.gguf cannot be read, it is cut off or damaged" in refusal(path)


def test_what_is_no_gguf(tmp_path, tensors):
    path = write(tmp_path / "lance.gguf", tensors)
    content = path.read_bytes()
    path.write_bytes(b"GGML" + content[4:])
    assert "does not begin with GGUF" in refusal(path)
    path.write_bytes(content[:4] + struct.pack("<I", 99) + content[8:])
    assert "version 99" in refusal(path)


def header(*values: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values) if count is None else count) + b"".join(values)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "content, words",
    [
        (header(count=2**60), "ends early"),
        (header(tensors=2**60), "ends early"),
        (header(text(b"a") + struct.pack("<IIQ", 9, 8, 2**60)), "ends early"),
        (header(text(b"a") + struct.pack("<IIQ", 9, 0, 2**60)), "ends early"),
        (header(text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "list of type 9"),
        (header(text(b"a") + struct.pack("<I", 77)), "value of type 77"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment of 0"),
        (header(tensors=1) + text(b"x") + struct.pack("<I", 500), "ends early"),
        (header(tensors=1) + text(b"x") + struct.pack("<I", 500) + bytes(64), "has 500 dimensions"),
        (header(tensors=1) + text(b"x") + struct.pack("<IQIQ", 1, 2**62, 0, 0), "'x' ends behind the file"),
        (header(tensors=1) + text(b"x") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64), "Q8_0 has the shape [33]"),
        (header(tensors=1) + text(b"x") + struct.pack("<IQIQ", 1, 1, 999, 0), "'x' is of type 999"),
        (header(tensors=1) + text(b"x") + struct.pack("<IQIQ", 1, 1, 27, 0), "'x' is of type 27"),  # int64
        (header(tensors=2) + 2 * (text(b"x") + struct.pack("<IQIQ", 1, 1, 0, 0)) + bytes(64), "stands there twice"),
    ],
)
def test_hostile_headers(tmp_path, content, words):
    path = tmp_path / "lance.gguf"
    path.write_bytes(content)
    assert words in refusal(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_to_a_header_is_one_sentence_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("gguf") / "lance.gguf"
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_entries(path, "download it again")
    except LanceError as error:
        assert str(path) in str(error)


SMALL = (
    header(
        text(b"general.alignment") + struct.pack("<II", 4, 32),
        text(b"words") + struct.pack("<IIQ", 9, 8, 1) + text(b"a"),
        tensors=1,
    )
    + text(b"x")
    + struct.pack("<IQQIQ", 2, 32, 1, 8, 0)
    + bytes(128)
)


def test_without_the_package_it_is_named(tmp_path, tensors):
    path = write(tmp_path / "lance.gguf", tensors)
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from lance_core.__main__ import main\n"
        f"sys.exit(main(['generate', '--model', {str(path)!r}, 'a fox']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "pip install gguf" in done.stderr and done.stderr.count("\n") == 1


def test_damage_beside_the_header_is_only_other_numbers(tmp_path, tensors):
    path = write(tmp_path / "lance.gguf", tensors, "F16")
    content = np.fromfile(path, np.uint8)
    content[-8:] = 0
    content.tofile(path)
    load_lance(path)
