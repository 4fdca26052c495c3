"""Checkpoints: every released form loads, and every bad file gets one sentence."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from goldens import DATA, TINY
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from lance_core.checkpoint import POSITION_TABLE, load_lance, load_parts, official_shapes
from lance_core.config import LanceConfig, Resolution, Resolutions, TextConfig
from lance_core.errors import LanceError
from lance_core.inspection import inspect
from lance_core.layout import find_checkpoint, list_checkpoints
from lance_core.saving import save_checkpoint
from lance_core.storage import read_header
from lance_core.tiny import make_tiny, random_lance, tokenizer_specification
from lance_core.vae import VAEConfig

EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def weights(root: Path) -> Path:
    return root / "Lance_3B" / "model.safetensors"


def change(path: Path, **tensors) -> None:
    """Writes a safetensors file again with other tensors; None removes one. `__` stands for a dot."""
    held = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


def refusal(path: Path, **options) -> str:
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(LanceError) as caught:
        load_lance(path, **options)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert ". " not in message.replace("...", ""), f"more than one sentence: {message}"
    return message


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)


# ---- the release


@pytest.fixture(scope="module")
def manifest() -> dict:
    groups = json.loads((DATA / "manifest_full.json").read_text())["groups"]
    return {group: {name: tuple(shape) for name, shape in tensors.items()} for group, tensors in groups.items()}


@pytest.mark.parametrize(
    "variant, folder, tensors, elements, rows",
    [
        ("image", "Lance_3B", 1021, 6_185_205_808, 4096),
        ("video", "Lance_3B_Video", 1411, 7_105_548_336, 126_976),
    ],
)
def test_full_size_names_and_shapes(manifest, variant, folder, tensors, elements, rows):
    shapes = official_shapes(LanceConfig(), VAEConfig(), variant=variant)
    language = {}
    for group in ("embeddings", "und_expert", "gen_expert", "lm_head", "connectors"):
        language.update(manifest[group])
    language[POSITION_TABLE] = (rows, 2048)
    if variant == "video":
        language.update(manifest["vit"])
    vision = {name.removeprefix("vit_model."): shape for name, shape in manifest["vit"].items()}
    assert shapes == {
        f"{folder}/model.safetensors": language,
        "Qwen2.5-VL-ViT/vit.safetensors": vision,
        "Wan2.2_VAE.pth": manifest["vae"],
    }
    written = shapes[f"{folder}/model.safetensors"]
    assert len(written) == tensors
    assert sum(torch.Size(shape).numel() for shape in written.values()) == elements


# ---- what loads


@pytest.mark.parametrize("name, dtype", [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_tiny_loads_as_stored(name, dtype):
    lance = load_lance(TINY, device="cpu", dtype=name)
    stored = {
        lance.transformer: load_file(weights(TINY)),
        lance.vision: load_file(TINY / "Qwen2.5-VL-ViT" / "vit.safetensors"),
        lance.vae: torch.load(TINY / "Wan2.2_VAE.pth", weights_only=True),
    }
    assert lance.dtype == dtype and lance.device.type == "cpu"
    for module, tensors in stored.items():
        parameters = dict(module.named_parameters())
        assert parameters.keys() == tensors.keys() - {POSITION_TABLE}
        for parameter_name, parameter in parameters.items():
            assert parameter.dtype == dtype and not parameter.requires_grad
            assert torch.equal(parameter, tensors[parameter_name].to(dtype))
        assert not module.training and not list(module.buffers())
    assert lance.config.text.hidden_size == 64 and lance.config.vision.depth == 4
    assert len(lance.tokenizer) == 400


def test_folder_of_the_language_model_is_a_path_too():
    assert find_checkpoint(TINY / "Lance_3B") == find_checkpoint(TINY)
    assert same(load_lance(TINY / "Lance_3B").vae, load_lance(TINY).vae)


def test_file_of_the_language_model_is_a_path_too():
    assert find_checkpoint(weights(TINY)) == find_checkpoint(TINY)


def test_ema_weights_stand_in(tiny):
    weights(tiny).rename(tiny / "Lance_3B" / "ema.safetensors")
    assert same(load_lance(tiny).transformer, load_lance(TINY).transformer)


def test_model_weights_come_before_ema(tiny):
    zero = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights(tiny)).items()}
    save_file(zero, tiny / "Lance_3B" / "ema.safetensors")
    assert same(load_lance(tiny).transformer, load_lance(TINY).transformer)


def test_bundled_vision_tower_overrides_its_file(tiny):
    vision = load_file(TINY / "Qwen2.5-VL-ViT" / "vit.safetensors")
    change(weights(tiny), **{"vit_model." + name: tensor + 1 for name, tensor in vision.items()})
    for lance in (load_lance(tiny), load_lance(without(tiny, "Qwen2.5-VL-ViT/vit.safetensors"))):
        assert all(torch.equal(p, (vision[n] + 1).float()) for n, p in lance.vision.named_parameters())
    assert not inspect(tiny).problems


def without(root: Path, name: str) -> Path:
    (root / name).unlink()
    return root


def test_bundled_vision_tensors_override_one_by_one(tiny):
    norm = "blocks.0.norm1.weight"
    change(weights(tiny), **{"vit_model." + norm: torch.full((32,), 3.0)})
    vision = load_lance(tiny).vision
    assert (vision.blocks[0].norm1.weight == 3).all()
    assert torch.equal(vision.blocks[1].norm1.weight, load_lance(TINY).vision.blocks[1].norm1.weight)


@pytest.mark.parametrize("rows", [4096, 126_976])
def test_either_position_table_is_dropped(tiny, rows):
    change(weights(tiny), **{POSITION_TABLE: torch.zeros(rows, 64, dtype=torch.bfloat16)})
    assert same(load_lance(tiny).transformer, load_lance(TINY).transformer)
    assert inspect(tiny).position_rows == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_stored_types(tiny, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in load_file(weights(tiny)).items()}
    save_file(stored, weights(tiny))
    for compute in (torch.float32, torch.bfloat16):
        parameters = load_lance(tiny, dtype=compute).transformer.named_parameters()
        assert all(torch.equal(parameter, stored[name].to(compute)) for name, parameter in parameters)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_single_file(tmp_path, prefix):
    tensors = load_file(weights(TINY))
    vision = load_file(TINY / "Qwen2.5-VL-ViT" / "vit.safetensors")
    vae = torch.load(TINY / "Wan2.2_VAE.pth", weights_only=True)
    tensors |= {"vit_model." + name: tensor for name, tensor in vision.items()}
    tensors |= {prefix + name: tensor for name, tensor in vae.items()}
    save_file(tensors, tmp_path / "lance.safetensors")
    for name in ("llm_config.json", "tokenizer.json"):
        shutil.copy(TINY / "Lance_3B" / name, tmp_path)
    lance, official = load_lance(tmp_path / "lance.safetensors"), load_lance(TINY)
    assert same(lance.transformer, official.transformer)
    assert same(lance.vision, official.vision) and same(lance.vae, official.vae)


def test_vae_as_safetensors(tiny):
    vae = torch.load(tiny / "Wan2.2_VAE.pth", weights_only=True)
    save_file(vae, without(tiny, "Wan2.2_VAE.pth") / "wan2.2_vae.safetensors")
    assert same(load_lance(tiny).vae, load_lance(TINY).vae)


def test_sharded(tiny):
    folder, tensors = tiny / "Lance_3B", load_file(weights(tiny))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights(tiny).unlink()
    assert same(load_lance(tiny).transformer, load_lance(TINY).transformer)
    (folder / names[1]).unlink()
    assert names[1] in refusal(tiny)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
    assert "model.safetensors.index.json does not name" in refusal(tiny)


def test_tokenizer_config_may_be_missing(tiny):
    assert len(load_lance(without(tiny, "Lance_3B/tokenizer_config.json")).tokenizer) == 400


def test_vision_tower_and_vae_may_be_missing(tiny):
    shutil.rmtree(tiny / "Qwen2.5-VL-ViT")
    lance = load_lance(without(tiny, "Wan2.2_VAE.pth"))
    assert lance.vision is None and lance.vae is None
    problems = inspect(tiny).problems
    assert len(problems) == 2
    assert "vision tower is missing" in problems[0] and "Qwen2.5-VL-ViT/vit.safetensors" in problems[0]
    assert "VAE is missing" in problems[1] and "Wan2.2_VAE.pth" in problems[1]


def test_attention_of_the_host_is_used():
    seen = []

    def attention(q, k, v, mask=None):
        seen.append(q.shape)
        return q

    lance = load_lance(TINY, attention=attention)
    lance.vision(torch.zeros(3, 2, 56, 56))
    assert len(seen) == lance.config.vision.depth
    assert lance.transformer.attention is attention


def test_a_host_brings_its_own_layers_and_leaves_out_the_vae():
    class Linear(torch.nn.Linear):
        pass

    class Operations(SimpleNamespace):
        def __getattr__(self, name):
            return getattr(torch.nn, name)

    files, options = find_checkpoint(TINY), {"device": torch.device("cpu"), "dtype": torch.float32}
    lance = load_parts(files, operations=Operations(Linear=Linear), vae=False, **options)
    linears = [m for m in (*lance.transformer.modules(), *lance.vision.modules()) if isinstance(m, torch.nn.Linear)]
    assert linears and all(type(module) is Linear for module in linears) and lance.vae is None
    assert same(lance.transformer, load_lance(TINY).transformer)


def test_checkpoints_of_a_folder_are_listed(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    shutil.copytree(TINY / "Lance_3B", tmp_path / "Lance_3B_Video")
    shutil.copytree(TINY / "Qwen2.5-VL-ViT", tmp_path / "Qwen2.5-VL-ViT")
    shutil.copy(weights(TINY), tmp_path / "single.safetensors")
    (tmp_path / "wan2.2_vae.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    names = list_checkpoints(tmp_path)
    assert sorted(names) == ["Lance_3B_Video", "single.safetensors", "tiny/Lance_3B"]
    for name in names:
        assert find_checkpoint(tmp_path / name).language_model.is_file()
    assert list_checkpoints(tmp_path / "nothing") == []


# ---- what is refused


def test_no_such_path(tmp_path):
    message = refusal(tmp_path / "nothing")
    assert "nothing does not exist" in message and "hf download bytedance-research/Lance --local-dir" in message


def test_folder_without_checkpoint(tmp_path):
    assert f"{tmp_path} holds no Lance checkpoint" in refusal(tmp_path)
    with pytest.raises(LanceError, match="holds no Lance checkpoint"):
        inspect(tmp_path)


def test_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "lance.bin").write_bytes(b"x")
    assert "lance.bin is not a checkpoint" in refusal(tmp_path / "lance.bin")


def test_two_models_name_both(tiny):
    shutil.copytree(tiny / "Lance_3B", tiny / "Lance_3B_Video")
    message = refusal(tiny)
    assert str(tiny / "Lance_3B") in message and str(tiny / "Lance_3B_Video") in message
    assert find_checkpoint(tiny / "Lance_3B_Video").variant == "video"
    assert find_checkpoint(tiny / "Lance_3B").variant == "image"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_missing_file_names_folder_and_download(tiny, name):
    path = tiny / "Lance_3B" / name
    path.unlink()
    message = refusal(tiny)
    assert f"{path} is missing" in message
    assert f"hf download bytedance-research/Lance Lance_3B/{name} --local-dir {tiny}" in message
    assert any(str(path) in problem for problem in inspect(tiny).problems)


def test_missing_folder_of_the_language_model(tiny):
    shutil.rmtree(tiny / "Lance_3B")
    assert f"{weights(tiny)} is missing" in refusal(tiny)
    assert inspect(tiny).parameters["VAE"] > 0


def test_missing_configuration_needs_the_release_sizes(tiny):
    (tiny / "Lance_3B" / "llm_config.json").unlink()
    assert "llm_config.json" in refusal(tiny)


def test_missing_tensor(tiny):
    change(weights(tiny), **{"llm2vae.bias": None, "llm2vae.weight": None})
    message = refusal(tiny)
    assert str(weights(tiny)) in message and "'llm2vae." in message and "is missing (and 1 more like it)" in message
    assert f"hf download bytedance-research/Lance Lance_3B/model.safetensors --local-dir {tiny}" in message


def test_wrong_shape(tiny):
    change(weights(tiny), **{"llm2vae.bias": torch.zeros(47)})
    message = refusal(tiny)
    assert str(weights(tiny)) in message and "'llm2vae.bias' is [47] where [48] is expected" in message


def test_unexpected_tensor(tiny):
    change(weights(tiny), **{"connector.weight": torch.zeros(3)})
    assert "'connector.weight' is no part of Lance" in refusal(tiny)


def test_unexpected_type(tiny):
    change(weights(tiny), **{"llm2vae.bias": torch.zeros(48, dtype=torch.int32)})
    assert "'llm2vae.bias' is stored as I32 where one of F32, BF16, F16 is expected" in refusal(tiny)


def test_wrong_vision_tower(tiny):
    path = tiny / "Qwen2.5-VL-ViT" / "vit.safetensors"
    change(path, **{"blocks.0.norm1.weight": torch.zeros(31)})
    message = refusal(tiny)
    assert str(path) in message and "'blocks.0.norm1.weight' is [31] where [32] is expected" in message
    assert "Qwen2.5-VL-ViT/vit.safetensors --local-dir" in message


def test_vision_tower_of_another_width(tiny):
    path = tiny / "Qwen2.5-VL-ViT" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"out_hidden_size": 48}))
    change(
        tiny / "Qwen2.5-VL-ViT" / "vit.safetensors",
        **{"merger.mlp.2.weight": torch.zeros(48, 128), "merger.mlp.2.bias": torch.zeros(48)},
    )
    assert "tokens are 48 wide where the language model takes 64" in refusal(tiny)


def test_tokenizer_of_a_larger_model(tiny):
    path = tiny / "Lance_3B" / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 390}))
    small = {name: torch.zeros(390, 64) for name in (EMBEDDING, "language_model.lm_head.weight")}
    change(weights(tiny), **small)
    assert "tokenizer.json has 400 tokens and the language model 390" in refusal(tiny)


@pytest.mark.parametrize(
    "change_config", [{"num_hidden_layers": 10**9}, {"intermediate_size": 2**62}, {"vocab_size": 2**70}]
)
def test_absurd_configuration(tiny, change_config):
    path = tiny / "Lance_3B" / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change_config))
    assert "the configuration describes a model that the weights cannot be" in refusal(tiny)


def test_a_checkpoint_knows_the_sizes_it_was_trained_at(tmp_path):
    own = Resolutions(Resolution(64, 112), Resolution(96, 112, ratio=(16, 9)))
    made = random_lance()
    made = replace(made, config=replace(made.config, resolutions=own))
    save_checkpoint(tmp_path / "own", made, tokenizer_specification())
    assert load_lance(tmp_path / "own").config.resolutions == own
    assert load_lance(TINY).config.resolutions == Resolutions()  # an official file says nothing


@pytest.mark.parametrize(
    "given, words",
    [
        (3, "'resolutions' is 3"),
        ({"image": 64}, "'resolutions' is {'image': 64}"),
        ({"image": {"vae": 64}}, "'vit' is missing"),
        ({"video": {"vae": 0, "vit": 112}}, "'vae' is 0"),
        ({"image": {"vae": 64, "vit": 112, "ratio": [1]}}, "ratio [1]"),
        ({"image": {"vae": 64, "vit": 112, "ratio": "1:1"}}, "'ratio' is '1:1'"),
    ],
)
def test_sizes_that_are_none(tiny, given, words):
    path = tiny / "Lance_3B" / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resolutions": given}))
    message = refusal(tiny)
    assert "llm_config.json" in message and words in message


def test_configuration_that_is_no_json(tiny):
    (tiny / "Lance_3B" / "llm_config.json").write_text("{")
    assert "llm_config.json is not valid JSON" in refusal(tiny)


def test_damaged_tokenizer(tiny):
    (tiny / "Lance_3B" / "tokenizer.json").write_text("{}")
    with pytest.raises(LanceError, match="tokenizer.json is not a tokenizer"):
        load_lance(tiny)


def split(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def lie(path: Path, length: int | None = None, **entry) -> None:
    """Makes the header of a safetensors file tell something else of the embedding."""
    header, data = split(path)
    header[EMBEDDING] |= entry
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


LIES = {
    "offsets beyond the file": {"data_offsets": [0, 10**12]},
    "offsets backwards": {"data_offsets": [64, 0]},
    "overlap": {"data_offsets": [0, 416 * 64 * 2]},
    "larger than its bytes": {"shape": [2**40, 2**20]},
    "beyond 64 bits": {"shape": [2**63, 2**63]},
    "negative": {"shape": [-416, -64]},
    "unknown type": {"dtype": "F128"},
    "not a number": {"shape": ["many"]},
    "header longer than the file": {"length": 10**9},
    "header of exabytes": {"length": 2**63},
    "no header": {"length": 0},
}


@pytest.mark.parametrize("name", LIES)
def test_header_that_lies(tiny, name):
    lie(weights(tiny), **LIES[name])
    message = refusal(tiny)
    assert f"{weights(tiny)} cannot be read, it is cut off or damaged" in message
    assert "hf download bytedance-research/Lance Lance_3B/model.safetensors --local-dir" in message
    assert any(str(weights(tiny)) in problem for problem in inspect(tiny).problems)


@pytest.mark.parametrize("keep", [0, 7, 8, 1000, 540_000])
def test_truncated_weights(tiny, keep):
    weights(tiny).write_bytes(weights(TINY).read_bytes()[:keep])
    assert f"{weights(tiny)} cannot be read, it is cut off or damaged" in refusal(tiny)


def test_header_that_is_not_json(tiny):
    raw = b"this is no header"
    weights(tiny).write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert "cut off or damaged" in refusal(tiny)


def test_git_lfs_pointer(tiny):
    weights(tiny).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12370411616\n")
    assert "cut off or damaged" in refusal(tiny)


class Code:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("archive", [True, False])
def test_vae_with_code_is_refused(tiny, tmp_path, archive):
    path, marker = tiny / "Wan2.2_VAE.pth", tmp_path / "code_ran"
    if archive:
        torch.save({"encoder.conv1.weight": Code(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Code(marker)))
    message = refusal(tiny)
    assert f"{path} was {'refused' if archive else 'not opened'}" in message
    assert "use Wan2.2_VAE.pth of bytedance-research/Lance" in message
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 300, 1_000_000, 2_803_000])
def test_truncated_vae(tiny, keep):
    path = tiny / "Wan2.2_VAE.pth"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(tiny)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(1)])
def test_vae_that_is_no_table_of_tensors(tiny, value):
    torch.save(value, tiny / "Wan2.2_VAE.pth")
    assert "Wan2.2_VAE.pth is not a table of named tensors" in refusal(tiny)


def test_another_vae(tiny):
    torch.save({"encoder.conv1.weight": torch.zeros(3)}, tiny / "Wan2.2_VAE.pth")
    message = refusal(tiny)
    assert str(tiny / "Wan2.2_VAE.pth") in message and "is not a Wan 2.2 VAE" in message


def test_vae_of_integers(tiny):
    vae = torch.load(tiny / "Wan2.2_VAE.pth", weights_only=True)
    torch.save({name: tensor.to(torch.int32) for name, tensor in vae.items()}, tiny / "Wan2.2_VAE.pth")
    assert "is stored as torch.int32" in refusal(tiny)


@pytest.mark.parametrize("name", ["fp16", "float16", torch.float16])
def test_float16_is_refused(name):
    assert "overflows in the language model; use bf16" in refusal(TINY, dtype=name)


def test_unknown_options():
    assert "cannot compute in 'int8'" in refusal(TINY, dtype="int8")
    assert "'gpu' is not a device" in refusal(TINY, device="gpu")
    assert "'flash' is not an attention" in refusal(TINY, attention="flash")
    assert "cuda:99 is not available here" in refusal(TINY, device="cuda:99")


def test_read_header(tmp_path):
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(2, 3)}, tmp_path / "a.pth")
    assert [read_header(tmp_path / name)["a"][2:4] for name in ("a.safetensors", "a.pth")] == [
        ("BF16", (2, 3)),
        ("F32", (2, 3)),
    ]
    with pytest.raises(LanceError, match="b.pth does not exist"):
        read_header(tmp_path / "b.pth")


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads_or_refuses(path: Path) -> None:
    try:
        load_lance(path)
    except LanceError as error:
        assert "\n" not in str(error)


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=8),
    header=st.booleans(),
)
def test_flipped_bytes_of_the_weights(tmp_path_factory, flips, header):
    raw = bytearray(weights(TINY).read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0] if header else len(raw)
    for position, bits in flips:
        raw[position % end] ^= bits
    root = spoilt(tmp_path_factory, "Lance_3B/model.safetensors", bytes(raw))
    loads_or_refuses(root)


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**24), st.integers(1, 255)), max_size=8),
    near_end=st.booleans(),
    cut=st.integers(0, 2000),
)
@example(flips=[(22, 1)], near_end=True, cut=0)  # an archive that claims to span several disks
def test_flipped_and_cut_vae(tmp_path_factory, flips, near_end, cut):
    raw = bytearray((TINY / "Wan2.2_VAE.pth").read_bytes())
    for position, bits in flips:
        # what describes the archive stands in its first and last kilobytes
        raw[-1 - position % 30_000 if near_end else position % 40_000] ^= bits
    root = spoilt(tmp_path_factory, "Wan2.2_VAE.pth", bytes(raw[: len(raw) - cut]))
    loads_or_refuses(root)


@FUZZ
@given(keep=st.integers(0, 543_895))
def test_weights_cut_anywhere(tmp_path_factory, keep):
    root = spoilt(tmp_path_factory, "Lance_3B/model.safetensors", weights(TINY).read_bytes()[:keep])
    with pytest.raises(LanceError, match="cut off or damaged"):
        load_lance(root)


def spoilt(tmp_path_factory, name: str, content: bytes) -> Path:
    """The tiny checkpoint with another content of one file."""
    root = tmp_path_factory.getbasetemp() / "spoilt"
    if not root.exists():
        shutil.copytree(TINY, root)
    for file in ("Lance_3B/model.safetensors", "Wan2.2_VAE.pth"):
        (root / file).write_bytes(content if file == name else (TINY / file).read_bytes())
    return root


# ---- memory

MEASURE = """
import resource, sys, torch
from lance_core.checkpoint import load_lance
load_lance(sys.argv[1], dtype="bf16")  # everything that is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lance = load_lance(sys.argv[2], dtype="bf16")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = sum(p.numel() * p.element_size() for m in (lance.transformer, lance.vision, lance.vae) for p in m.parameters())
print((after - before) * (1 if sys.platform == "darwin" else 1024) - model)
"""
# A process starts with the peak of the one that started it: a small one between keeps that of the tests away.
LAUNCH = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"


def test_loading_never_holds_a_float32_copy(tmp_path):
    text = TextConfig(4096, 512, 1408, 8, 8, 2, mrope_section=(8, 12, 12))
    config = random_lance().config
    config = LanceConfig(text, replace(config.vision, out_hidden_size=512))
    specification = tokenizer_specification()
    save_checkpoint(tmp_path / "large", random_lance(config), specification, dtype=torch.float32)
    file = weights(tmp_path / "large")
    assert file.stat().st_size > 200e6
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, MEASURE, str(make_tiny(tmp_path / "small")), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # Read tensor by tensor, 32 MB at a time; a float32 copy of the model, or the mapped file, would be 1.0.
    assert int(done.stdout) < 0.4 * file.stat().st_size


# ---- inspect


def test_inspect_tells_what_is_there():
    found = inspect(TINY)
    lance = load_lance(TINY)
    count = sum(p.numel() for m in (lance.transformer, lance.vision, lance.vae) for p in m.parameters())
    assert found.variant == "image" and not found.problems and found.tokens == 400
    assert sum(found.parameters.values()) == count
    assert found.parameters["embeddings"] == found.parameters["lm_head"] == 416 * 64
    assert found.parameters["understanding expert"] == found.parameters["generation expert"]
    assert {(path.name, size, types) for path, size, types in found.files} == {
        ("model.safetensors", 543_896, "BF16"),
        ("vit.safetensors", 214_344, "BF16"),
        ("Wan2.2_VAE.pth", 2_803_157, "BF16"),
    }
    table = str(found)
    for words in ("image variant", "generation expert", "BF16", "400  tokens", "complete"):
        assert words in table


def test_inspect_lists_every_problem(tiny):
    change(weights(tiny), **{"llm2vae.bias": None, "vae2llm.bias": torch.zeros(3), "x": torch.zeros(1)})
    (tiny / "Wan2.2_VAE.pth").write_bytes(b"")
    problems = inspect(tiny).problems
    assert len(problems) == 4
    assert all(problem in str(inspect(tiny)) for problem in problems)


def test_inspect_reads_headers_only(tiny):
    header, data = split(weights(tiny))
    lie(weights(tiny))
    with open(weights(tiny), "r+b") as file:  # data of zeros, as sparse as a file system allows
        file.truncate(weights(tiny).stat().st_size - len(data))
        file.truncate(weights(tiny).stat().st_size + len(data))
    assert inspect(tiny).parameters == inspect(TINY).parameters
