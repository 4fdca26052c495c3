"""Quantised weights: their numbers, the layers that compute with them, and the files that hold them."""

from __future__ import annotations

import json
import shutil
from math import ceil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from goldens import TINY
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from lance_core import stages
from lance_core.__main__ import main
from lance_core.checkpoint import POSITION_TABLE, load_lance, official_shapes
from lance_core.config import LanceConfig
from lance_core.errors import LanceError
from lance_core.inspection import inspect
from lance_core.quantized import (
    FORMATS,
    STORED_FORMATS,
    Packed,
    QuantizedLinear,
    dequantize,
    nf4_levels,
    nf4_pairs,
    packed_bytes,
    quantizable,
    quantize,
    quantize_model,
    stored_as,
)
from lance_core.quantizing import quantize_checkpoint
from lance_core.saving import save_checkpoint
from lance_core.tiny import random_lance
from lance_core.vae import VAEConfig

UP = "language_model.model.layers.1.mlp.up_proj"
PICTURE = {"width": 64, "height": 64, "steps": 4, "seed": 3}
# Relative errors of weights: half a step of a uniform grid, or of e4m3's last digit, for normally distributed numbers.
ERRORS = {"fp8": 0.03, "int8": 0.012, "int4": 0.11, "nf4": 0.1}
# And of a picture of a random model after four steps, twice what they are.
PICTURE_ERRORS = {"fp8": 0.2, "int8": 0.05, "int8-dynamic": 0.08, "int4": 0.55, "nf4": 0.55}


def values(packed: Packed, format: str, inputs: int) -> torch.Tensor:
    """A quantised weight in float32."""
    return dequantize(packed, format, inputs, torch.float32, nf4_pairs(torch.device("cpu")))


def normal(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


# ---- numbers


@st.composite
def weights(draw) -> torch.Tensor:
    """Rows of very different sizes, some of zeros, some with outliers, down to subnormal numbers."""
    rows, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    weight = normal(rows, inputs, draw(st.integers(0, 2**31)))
    exponents = draw(st.lists(st.integers(-148, 120), min_size=rows, max_size=rows))
    weight = weight.double() * torch.tensor([2.0**e for e in exponents], dtype=torch.float64)[:, None]
    if draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, inputs - 1))] *= 30
    return weight.float()


def bound(weight: torch.Tensor, format: str) -> torch.Tensor:
    """The largest error that each weight may have."""
    groups = F.pad(weight.double(), (0, -weight.shape[1] % 64)).unflatten(1, (-1, 64))
    largest = groups.abs().amax(-1, keepdim=True)
    row = weight.double().abs().amax(1, keepdim=True)
    if format == "fp8":  # three binary digits behind the point; below 2^-6 of the scale a fixed step
        step = 2.0 ** torch.ceil(torch.log2(row.clamp_min(2.0**-126 * 448) / 448))
        return torch.maximum(weight.double().abs() * 2**-4, step * 2**-10) * (1 + 1e-6)
    if format == "int8":
        return (row / 127 * (0.5 + 2**-7)).clamp_min(2.0**-126).expand_as(weight)
    if format == "int4":
        span = groups.amax(-1, keepdim=True).clamp_min(0) - groups.amin(-1, keepdim=True).clamp_max(0)
        half = span / 15 * (0.5 + 2**-7)
    else:
        levels = torch.tensor(nf4_levels(), dtype=torch.float64)
        half = largest * (levels.diff().max() / 2 + 2**-7)
    return half.clamp_min(2.0**-126).expand_as(groups).flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("format", STORED_FORMATS)
@settings(max_examples=150, deadline=None)
@given(weight=weights())
def test_no_weight_is_off_by_more_than_half_a_step(format, weight):
    packed = quantize(weight, format)
    result = values(packed, format, weight.shape[1]).double()
    assert torch.isfinite(result).all()
    assert ((result - weight.double()).abs() <= bound(weight, format)).all()
    assert (result[(weight == 0).all(1)].abs() < 1e-37).all()
    assert sum(tensor.nbytes for tensor in packed) == packed_bytes(format, tuple(weight.shape))
    scales = packed.weight_scale
    assert torch.equal(scales.float(), scales.bfloat16().float())  # bf16 computes with the same numbers
    if format == "fp8":
        assert (torch.frexp(scales)[0] == 0.5).all()
        assert (packed.weight.float().abs() <= 448).all()


@pytest.mark.parametrize("format", STORED_FORMATS)
def test_the_error_of_ordinary_weights(format):
    weight = normal(64, 2048)
    error = (values(quantize(weight, format), format, 2048) - weight).norm() / weight.norm()
    assert ERRORS[format] / 2 < error < ERRORS[format]


@pytest.mark.parametrize("format", STORED_FORMATS)
def test_very_large_numbers_stay_finite(format):
    weight = torch.tensor([[1e38, -1e38, 1.0, 0.0]])
    result = values(quantize(weight, format), format, 4)
    assert torch.isfinite(result).all() and (result[0, :2] / weight[0, :2] - 1).abs().max() < 0.07


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_every_number_of_four_bits_comes_back(format, rows, groups, seed):
    """Weights that are exactly on the grid."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups, 64), generator=generator)
    codes[..., :2] = torch.tensor([0, 15])  # so that the ends of the grid are those of the group
    levels = torch.arange(-7.0, 9.0) if format == "int4" else torch.tensor(nf4_levels())
    weight = (levels[codes] * 2.0**-5).flatten(1)
    assert torch.equal(values(quantize(weight, format), format, groups * 64), weight)


def test_the_levels_of_nf4_are_those_of_the_paper():
    """Appendix E of arXiv 2305.14314."""
    levels = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    levels += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert torch.allclose(torch.tensor(nf4_levels()), torch.tensor(levels), atol=1e-6, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_by_name(format, bad):
    weight = normal(3, 70)
    weight[2, 69] = bad
    with pytest.raises(LanceError, match=r"^up_proj holds NaN or infinity and cannot be quantised; .*\.$"):
        quantize(weight, format, "up_proj")


def test_an_unknown_format_is_refused():
    with pytest.raises(LanceError, match="'int3' is not a format of weights; use fp8, int8, int8-dynamic, int4 or nf4"):
        quantize(normal(2, 2), "int3")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_stored_type_and_any_block_of_rows_give_the_same(format, dtype, monkeypatch):
    weight = normal(37, 200).to(dtype)
    whole = quantize(weight.float(), format)
    monkeypatch.setattr("lance_core.quantized.BLOCK", 200 * 5)
    for a, b in zip(whole, quantize(weight, format)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- layers


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs, outputs", [(128, 96), (200, 24), (77, 13)])
def test_a_layer_computes_with_the_weight_it_stands_for(format, dtype, inputs, outputs):
    packed, bias = quantize(normal(outputs, inputs), format), normal(1, outputs)[0].to(dtype)
    layer = QuantizedLinear(packed, bias, format, inputs)
    weight = values(packed, stored_as(format), inputs)
    precision = 1e-5 if dtype == torch.float32 else 8e-3
    for tokens in (1, 2, 4, 5, 16, 17, 40, 300):
        x = normal(tokens, inputs, tokens).to(dtype)
        y, expected = layer(x), F.linear(x.float(), weight, bias.float())
        rounded = layer.dynamic and tokens > 16
        error = (y.float() - expected).norm() / expected.norm()
        assert y.dtype == dtype and y.shape == (tokens, outputs)
        assert error < (0.012 if rounded else 0) + precision
        assert not rounded or error > 1e-3  # inputs are rounded indeed
        assert torch.equal(layer(x.view(1, tokens, inputs)), y[None])


def test_tokens_of_eight_bits_are_rounded_each_with_its_own_scale(monkeypatch):
    layer = QuantizedLinear(quantize(normal(64, 128), "int8"), None, "int8-dynamic", 128)
    monkeypatch.setattr("lance_core.quantized.BLOCK", 64 * 40)  # in several parts, none of fewer than 17 tokens
    x = normal(131, 128) * 1.5 ** torch.arange(-60, 71)[:, None]
    x[7] = 0
    expected = F.linear(x, layer.dequantized(torch.float32))
    error = (layer(x) - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    assert error.max() < 0.03 and (layer(x)[7] == 0).all()


def test_a_layer_holds_its_weight_scale_and_bias_and_nothing_that_is_saved_beside_them():
    for format in FORMATS:
        layer = QuantizedLinear(quantize(normal(8, 64), format), torch.zeros(8), format, 64)
        assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_the_projections_of_both_experts_are_quantised_and_nothing_else():
    shapes = official_shapes(LanceConfig(), VAEConfig(), variant="video")
    names = [name for tensors in shapes.values() for name in tensors]
    chosen = [name for name in names if quantizable(name)]
    assert len(chosen) == 36 * 2 * 7
    assert all(".layers." in name and "_proj" in name and name.endswith(".weight") for name in chosen)
    language = shapes["Lance_3B_Video/model.safetensors"]
    assert sum(torch.Size(language[name]).numel() for name in chosen) > 0.88 * 6_185_205_808


def test_the_published_bytes_of_the_release():
    """Of its projections, 5.5 billion weights."""
    shapes = official_shapes(LanceConfig(), VAEConfig(), variant="image")["Lance_3B/model.safetensors"]
    chosen = [shape for name, shape in shapes.items() if quantizable(name)]
    weights = sum(rows * inputs for rows, inputs in chosen)
    rows = sum(rows for rows, _ in chosen)
    assert sum(packed_bytes("int8", shape) for shape in chosen) == weights + 4 * rows
    assert sum(packed_bytes("fp8", shape) for shape in chosen) == weights + 4 * rows
    assert sum(packed_bytes("int4", shape) for shape in chosen) == weights // 64 * 36
    assert sum(packed_bytes("nf4", shape) for shape in chosen) == weights // 64 * 34
    assert packed_bytes("nf4", (3, 65)) == 3 * 34 * ceil(65 / 64)


# ---- models


@pytest.fixture(scope="module")
def dense():
    return load_lance(TINY, device="cpu")


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_paints_nearly_the_same_and_keeps_the_rest_as_it_is(dense, format):
    lance = load_lance(TINY, device="cpu", weights=format)
    originals = dict(dense.transformer.named_parameters())
    size = 0
    for name, parameter in lance.transformer.named_parameters():
        if quantizable(name):
            size += packed_bytes(stored_as(format), tuple(originals[name].shape))
        elif not name.endswith("weight_scale"):
            assert torch.equal(parameter, originals[name]), name
            size += originals[name].nbytes
    assert sum(parameter.nbytes for parameter in lance.transformer.parameters()) == size
    one, other = (stages.generate(model, "a fox", **PICTURE) for model in (lance, dense))
    error = float((one - other).norm() / other.norm())
    assert PICTURE_ERRORS[format] / 20 < error < PICTURE_ERRORS[format]


def test_eight_bits_answer_the_same(dense):
    expected = stages.understand(dense, None, "What is red?", max_new_tokens=12)
    for format in ("int8", "int8-dynamic"):
        lance = load_lance(TINY, device="cpu", weights=format)
        assert stages.understand(lance, None, "What is red?", max_new_tokens=12) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_model_is_quantised_in_place(dense, format):
    lance = load_lance(TINY, device="cpu")
    quantize_model(lance.transformer, format)
    same(lance.transformer, load_lance(TINY, device="cpu", weights=format).transformer)
    assert torch.equal(
        stages.generate(lance, "a fox", **PICTURE),
        stages.generate(load_lance(TINY, device="cpu", weights=format), "a fox", **PICTURE),
    )


def test_a_model_without_memory_can_be_quantised_to_count_it():
    real, counted = random_lance().transformer, random_lance().transformer.to("meta")
    for transformer in (real, counted):
        quantize_model(transformer, "nf4")
    assert all(p.is_meta and p.nbytes == q.nbytes for p, q in zip(counted.parameters(), real.parameters(), strict=True))


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (n, p), (m, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert n == m and p.dtype == q.dtype and torch.equal(p.view(torch.uint8), q.view(torch.uint8)), n


# ---- files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """The tiny checkpoint in every format."""
    root = tmp_path_factory.mktemp("quantised")
    return {format: quantize_checkpoint(TINY, root / format, format).folder for format in STORED_FORMATS}


def weights_of(root: Path) -> Path:
    return root / "Lance_3B" / "model.safetensors"


@pytest.mark.parametrize("format", STORED_FORMATS)
def test_saved_and_loaded_is_what_is_made_on_load(written, format):
    for dtype in ("fp32", "bf16"):
        saved, made = (
            load_lance(path, device="cpu", dtype=dtype, **options)
            for path, options in ((written[format], {}), (TINY, {"weights": format}))
        )
        same(saved.transformer, made.transformer)
        same(saved.vision, made.vision)
        same(saved.vae, made.vae)
        assert torch.equal(*(stages.generate(lance, "a fox", **PICTURE) for lance in (saved, made)))
    assert not inspect(written[format]).problems


@pytest.mark.parametrize("format", STORED_FORMATS)
def test_the_file_has_comfyui_s_marker_beside_every_layer(written, format):
    stored, original = load_file(weights_of(written[format])), load_file(weights_of(TINY))
    layers = {name.removesuffix(".weight") for name in original if quantizable(name)}
    for layer in layers:
        marker = json.loads(bytes(stored.pop(f"{layer}.comfy_quant").tolist()))
        name = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "int4": "lance_int4", "nf4": "lance_nf4"}[format]
        assert marker == {"format": name} | ({"group_size": 64} if format in ("int4", "nf4") else {})
        packed = quantize(original[f"{layer}.weight"], format)
        for part, tensor in packed._asdict().items():
            assert torch.equal(stored.pop(f"{layer}.{part}").view(torch.uint8), tensor.view(torch.uint8))
    rest = {name for name in original if not quantizable(name)} - {POSITION_TABLE}
    assert stored.keys() == rest
    assert all(torch.equal(stored[name], original[name]) for name in rest)


def test_int8_is_for_dynamic_use_too_and_nothing_else_is(written):
    lance = load_lance(written["int8"], device="cpu", weights="int8-dynamic")
    same(lance.transformer, load_lance(TINY, device="cpu", weights="int8-dynamic").transformer)
    with pytest.raises(LanceError, match=r"model\.safetensors holds int8 weights, which cannot become nf4; leave"):
        load_lance(written["int8"], weights="nf4")
    with pytest.raises(LanceError, match=r"^weights is 'int3'; use auto, fp8, int8, int8-dynamic, int4 or nf4\.$"):
        load_lance(TINY, weights="int3")


@pytest.mark.parametrize("format", STORED_FORMATS)
def test_inspect_names_the_format_and_counts_what_it_stands_for(written, format, tmp_path):
    inspection = inspect(written[format])
    assert inspection.formats == (format,) and "quantised  " in str(inspection) and format in str(inspection)
    if format in ("fp8", "int8"):
        assert inspection.parameters == inspect(TINY).parameters
    assert inspect(TINY).formats == ()


def test_experts_may_be_in_different_formats(written, tmp_path):
    """A file whose understanding expert is in nf4 and whose generation expert is dense."""
    root = Path(shutil.copytree(TINY, tmp_path / "mixed"))
    dense, packed = load_file(weights_of(TINY)), load_file(weights_of(written["nf4"]))
    tensors = {name: tensor for name, tensor in packed.items() if "_moe_gen" not in name}
    tensors |= {name: tensor for name, tensor in dense.items() if "_moe_gen" in name}
    save_file(tensors, weights_of(root))
    layer = load_lance(root, device="cpu").transformer.language_model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, QuantizedLinear) and isinstance(layer.mlp_moe_gen.up_proj, torch.nn.Linear)
    layer = load_lance(root, device="cpu", weights="nf4").transformer.language_model.model.layers[0]
    assert layer.mlp.up_proj.format == layer.mlp_moe_gen.up_proj.format == "nf4"
    assert "holds nf4 weights" in refusal(root, weights="int8")


# ---- what is refused


def refusal(path: Path, **options) -> str:
    with pytest.raises(LanceError) as caught:
        load_lance(path, **options)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message.replace("...", "")
    return message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({".weight_scale": None}, "weight_scale' is missing"),
        ({".weight": None}, "up_proj.weight' is missing"),
        ({".comfy_quant": None}, "weight_scale' is no part of Lance"),
        ({".weight_scale": torch.ones(96)}, "[96] where [96, 1] is expected"),
        ({".weight_scale": torch.ones(96, 1, dtype=torch.bfloat16)}, "stored as BF16 where F32 is expected"),
        ({".weight": torch.zeros(96, 64)}, "stored as F32 where I8 is expected"),
        ({".weight": torch.zeros(96, 32, dtype=torch.int8)}, "[96, 32] where [96, 64] is expected"),
        ({".comfy_quant": torch.zeros(0, dtype=torch.uint8)}, "quantised in a way that Lance does not know"),
        ({".comfy_quant": torch.zeros(9)}, "quantised in a way that Lance does not know"),
        ({".comfy_quant": b"[" * 4000}, "quantised in a way that Lance does not know"),
        ({".comfy_quant": b'{"format": "nvfp4"}'}, "nvfp4"),
        ({".comfy_quant": b'{"format": "int8_tensorwise", "convrot": true}'}, "convrot"),
        ({".comfy_quant": b'{"format": "lance_nf4", "group_size": 64}'}, "[96, 64] where [96, 32] is expected"),
    ],
)
def test_a_header_that_contradicts_itself(written, tmp_path, changes, words):
    root = Path(shutil.copytree(written["int8"], tmp_path / "int8"))
    tensors = load_file(weights_of(root))
    for suffix, value in changes.items():
        if isinstance(value, bytes):
            value = torch.tensor(list(value), dtype=torch.uint8)
        tensors[UP + suffix] = value
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, weights_of(root))
    message = refusal(root)
    assert words in message and UP in message and str(weights_of(root)) in message
    assert message == inspect(root).problems[0] and len(inspect(root).problems) <= 2


def test_a_marker_beside_what_is_never_quantised(written, tmp_path):
    root = Path(shutil.copytree(written["int8"], tmp_path / "int8"))
    tensors = load_file(weights_of(root))
    save_file(tensors | {"llm2vae.comfy_quant": tensors[f"{UP}.comfy_quant"].clone()}, weights_of(root))
    assert "'llm2vae.comfy_quant' is no part of Lance" in refusal(root)


def test_weights_that_cannot_be_quantised_are_named(tmp_path):
    root = Path(shutil.copytree(TINY, tmp_path / "tiny"))
    tensors = load_file(weights_of(root))
    tensors[f"{UP}.weight"][3, 4] = float("nan")
    save_file(tensors, weights_of(root))
    load_lance(root)
    for attempt in (lambda: load_lance(root, weights="fp8"), lambda: quantize_checkpoint(root, tmp_path / "x", "fp8")):
        with pytest.raises(LanceError, match=rf"model\.safetensors: the tensor '{UP}\.weight' holds NaN or infinity"):
            attempt()
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}  # nothing half written stays


# ---- the command


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_says_what_it_saved(capsys, tmp_path):
    folder = tmp_path / "new" / "int8"
    code, out, _ = run(capsys, "quantize", TINY, folder, "--format", "int8")
    sizes = [sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) for root in (folder, TINY)]
    assert code == 0 and out == f"{folder}: int8, {sizes[0] / 1e6:.1f} MB instead of {sizes[1] / 1e6:.1f} MB\n"
    copied = {path.relative_to(TINY) for path in TINY.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == copied
    code, _, err = run(capsys, "quantize", TINY, folder, "--format", "nf4")
    assert code == 2 and "is not empty" in err
    assert run(capsys, "quantize", TINY, folder, "--format", "nf4", "--overwrite")[0] == 0
    assert inspect(folder).formats == ("nf4",)
    code, out, _ = run(capsys, "understand", "--model", folder, "--weights", "nf4", "--max-new-tokens", "3", "Hello?")
    assert code == 0 and out
    code, _, err = run(capsys, "understand", "--model", folder, "--weights", "int8", "Hello?")
    assert code == 2 and "holds nf4 weights" in err


def test_what_the_command_refuses(capsys, tmp_path, written):
    root = Path(shutil.copytree(TINY, tmp_path / "release" / "tiny"))

    def refused(source: Path, folder: Path, *words: str) -> None:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, out, err = run(capsys, "quantize", source, folder, "--format", "int8", "--overwrite")
        assert code == 2 and not out and err.count("\n") == 1 and all(word in err for word in words), err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    apart = "is where the checkpoint itself is"
    refused(root, root, apart)
    refused(root, root / "int8", apart)
    refused(root / "Lance_3B", root, apart)
    refused(root / "Lance_3B", root / "Lance_3B", apart)
    refused(weights_of(root), root / "Lance_3B", apart)
    refused(written["nf4"], tmp_path / "again", "is quantised already")
    refused(tmp_path / "nothing", tmp_path / "x", "does not exist")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    refused(root, tmp_path / "mine", "holds more than a Lance checkpoint")


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(LanceError, match=r"needs 0\.0 GB and .* has 0\.0 GB free; free some, or name a folder"):
        quantize_checkpoint(TINY, tmp_path / "new" / "int8", "int8")
    assert not list(tmp_path.iterdir())


def test_a_single_file_with_everything_in_it_and_shards(tmp_path):
    tensors = load_file(weights_of(TINY))
    vision = load_file(TINY / "Qwen2.5-VL-ViT" / "vit.safetensors")
    vae = torch.load(TINY / "Wan2.2_VAE.pth", weights_only=True)
    bundle = {"model.diffusion_model." + name: tensor for name, tensor in tensors.items()}
    bundle |= {"vit_model." + name: tensor for name, tensor in vision.items()} | {"vae." + n: t for n, t in vae.items()}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: names[i % 2] for i, name in enumerate(sorted(bundle))}
    (tmp_path / "shards").mkdir()
    save_file(bundle, tmp_path / "lance.safetensors")
    for file in names:
        save_file({name: t for name, t in bundle.items() if index[name] == file}, tmp_path / "shards" / file)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("llm_config.json", "tokenizer.json"):
        for folder in (tmp_path, tmp_path / "shards"):
            shutil.copy(TINY / "Lance_3B" / name, folder)
    expected = load_lance(TINY, weights="int4", device="cpu")
    for source in (tmp_path / "lance.safetensors", tmp_path / "shards"):
        lance = load_lance(quantize_checkpoint(source, tmp_path / f"{source.stem}-int4", "int4").folder, device="cpu")
        same(lance.transformer, expected.transformer)
        same(lance.vision, expected.vision)
        same(lance.vae, expected.vae)


def test_a_quantised_model_is_not_saved_as_if_it_were_dense(tmp_path):
    lance = load_lance(TINY, weights="int8")
    with pytest.raises(LanceError, match="quantised weights cannot be saved"):
        save_checkpoint(tmp_path / "copy", lance, "{}")
    assert not (tmp_path / "copy").exists()


def test_what_quantising_wrote_can_be_overwritten(tmp_path):
    """Also where the VAE is a safetensors file."""
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    vae = next(source.rglob("Wan2.2_VAE.pth"))
    save_file(torch.load(vae, weights_only=True), vae.with_suffix(".safetensors"))
    vae.unlink()
    quantize_checkpoint(source, tmp_path / "copy", "int8")
    quantize_checkpoint(source, tmp_path / "copy", "fp8", overwrite=True)
    assert load_lance(tmp_path / "copy").vae is not None
