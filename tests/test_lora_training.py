"""LoRAs: trained beside frozen weights, saved, applied, merged and taken off again."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from goldens import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lance_core import LanceError, LanceWarning, stages
from lance_core.__main__ import main, read_latent
from lance_core.adapters import LoraLinear, apply_loras, parse_lora
from lance_core.checkpoint import Lance, empty_parts, load_lance
from lance_core.config import Resolution, Resolutions
from lance_core.counting import LiveTensors
from lance_core.layout import find_checkpoint
from lance_core.media import read_image, to_bytes
from lance_core.merging import merge_checkpoint
from lance_core.placement import GIB, weight_bytes
from lance_core.quantized import QuantizedLinear, quantize_model
from lance_core.saving import save_checkpoint
from lance_core.sequence import build, context_blocks
from lance_core.tiny import TINY_TEXT, tokenizer_specification
from lance_core.train.config import Model, TrainConfig, Training
from lance_core.train.learner import recomputed, trainee_of
from lance_core.train.lora import TARGETS, LoraConfig, add_lora, lora_modules, lora_tensors, save_lora
from lance_core.train.objective import Objective
from lance_core.train.plan import training_needs, typical_batch
from lance_core.transformer import DecodeCache, LanceTransformer, latent_position_ids, latent_position_rows
from lance_core.workflow import run_workflow

SAME = 1e-5  # relative L2: the same by another way
EFFECT = 1e-3
GRID = (1, 2, 3)
Q = "language_model.model.layers.0.self_attn.q_proj"
SMALL = dict(width=48, height=32, steps=2)
EVERYTHING = LoraConfig(rank=4, alpha=8.0, targets=TARGETS)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def fresh() -> Lance:
    """The small checkpoint, to be changed in place."""
    return load_lance(TINY, device="cpu", dtype="fp32")


@cache
def plain() -> Lance:
    return fresh()


def paint(lance: Lance) -> Tensor:
    return stages.generate(lance, "a fox", **SMALL)


def loss(lance: Lance) -> Tensor:
    """Something that both experts, and the layers around them, have a share in."""
    transformer = lance.transformer
    sequence = build(lance.tokenizer, "generate", "image", "a fox", target=GRID)
    context = transformer.prefill(context_blocks(sequence, [], [], "cpu"))
    rows = latent_position_rows(latent_position_ids(*GRID), transformer.config.hidden_size, torch.float32)
    x = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(0))
    v = transformer.denoise(x, torch.tensor([[0.3]]), stages.noise_block(lance, sequence, rows), context)
    place = transformer.rotary(torch.full((3, 1), 50), torch.float32)
    logits = transformer.decode(torch.tensor([7]), *place, DecodeCache(context, 1))
    return v.square().mean() + logits.square().mean()


def trained(config: LoraConfig = EVERYTHING, steps: int = 3, lance: Lance | None = None) -> Lance:
    """The small checkpoint with a LoRA that has been trained a little, strongly enough to be seen."""
    lance = lance or fresh()
    optimizer = torch.optim.AdamW(add_lora(lance.transformer, config), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(lance).backward()
        optimizer.step()
    return lance


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> tuple[Lance, Path]:
    """A model in training, and the file that was saved of it."""
    lance = trained()
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return lance, save_lora(path, lora_tensors(lance.transformer), EVERYTHING, lance.config.text, step=3)


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """Another LoRA, of another rank, on some of the layers."""
    config = LoraConfig(rank=2, alpha=1.0, layers=(0, 2), experts=("generation",), targets=("q_proj", "up_proj"))
    lance = trained(config, steps=6)
    path = tmp_path_factory.mktemp("lora") / "second.safetensors"
    return save_lora(path, lora_tensors(lance.transformer), config, lance.config.text)


def random_lora(module: str, shape: tuple[int, int], rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return {f"diffusion_model.{module}.lora_A.weight": a * 0.1, f"diffusion_model.{module}.lora_B.weight": b * 0.1}


# Training


def test_a_new_lora_changes_nothing():
    lance = fresh()
    parameters = add_lora(lance.transformer, EVERYTHING)
    assert len(parameters) == 2 * len(lora_modules(EVERYTHING, lance.config.text))
    assert torch.equal(paint(lance), paint(plain()))


@pytest.mark.parametrize(
    "config",
    [
        EVERYTHING,
        LoraConfig(experts=("understanding",), layers=(1,), targets=("v_proj", "down_proj")),
        LoraConfig(experts=("generation",), targets=("o_proj", "vae2llm")),
    ],
)
def test_gradients_reach_the_lora_alone(config):
    lance = fresh()
    before = {name: weight.clone() for name, weight in lance.transformer.named_parameters()}
    trained(config, steps=2, lance=lance)
    moved = set()
    for name, weight in lance.transformer.named_parameters():
        assert weight.requires_grad == ("lora_" in name) == (weight.grad is not None), name
        if weight.grad is not None and weight.grad.abs().sum() > 0:
            moved.add(name)
        elif weight.grad is None:
            assert torch.equal(weight, before[name.replace(".base.", ".")])
    modules = lora_modules(config, lance.config.text)
    assert moved == {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_B")}


def test_the_chosen_modules_are_those_of_the_experts_and_layers():
    config = LoraConfig(experts=("generation",), layers=(2, 0), targets=("k_proj", "gate_proj", "time_embedder"))
    layers = [f"language_model.model.layers.{layer}" for layer in (0, 2)]
    inside = [f"{layer}.{part}" for layer in layers for part in ("self_attn.k_proj_moe_gen", "mlp_moe_gen.gate_proj")]
    assert lora_modules(config, TINY_TEXT) == [*inside, "time_embedder.mlp.0", "time_embedder.mlp.2"]
    transformer = LanceTransformer(TINY_TEXT, device="meta")
    for module in lora_modules(EVERYTHING, TINY_TEXT):
        assert isinstance(transformer.get_submodule(module), nn.Linear)


def test_all_processes_draw_the_same_lora():
    first, other = (lora_tensors(added(EVERYTHING)) for _ in range(2))
    assert all(torch.equal(first[name], other[name]) for name in first)
    drawn = lora_tensors(added(EVERYTHING, torch.Generator().manual_seed(1)))
    assert any(not torch.equal(first[name], drawn[name]) for name in first)


def test_a_run_s_seed_is_its_lora_s_too():
    configs = [replace(run_of("lora", False), seed=seed) for seed in (1, 1, 2)]
    first, same, other = (trainee_of(config, fresh()).state_dict() for config in configs)
    drawn = [name for name in first if name.endswith("lora_A")]
    assert drawn and all(torch.equal(first[name], same[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def added(config: LoraConfig, generator: torch.Generator | None = None) -> LanceTransformer:
    transformer = LanceTransformer(TINY_TEXT, device="meta").to_empty(device="cpu")
    add_lora(transformer, config, generator)
    return transformer


def test_weights_in_bf16_get_factors_in_float32():
    lance = load_lance(TINY, device="cpu", dtype="bf16")
    parameters = add_lora(lance.transformer, EVERYTHING)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    layer = lance.transformer.get_submodule(Q)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    expected = layer.base(x).float() + 2 * x.float() @ layer.lora_A.T @ layer.lora_B.T
    y = layer(x)
    assert y.dtype == torch.bfloat16 and distance(y.detach().float(), expected.detach()) < 0.01
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and layer.lora_A.grad.abs().sum() > 0


@pytest.mark.parametrize("format", ["int8", "int8-dynamic", "fp8", "int4", "nf4"])
def test_a_quantised_base_has_the_gradients_of_its_values(format):
    """Also where the layers themselves have no LoRA: what is below is reached through them."""
    config = LoraConfig(rank=2, layers=(0,), targets=("v_proj", "down_proj"))
    quantised, dense = fresh(), fresh()
    quantize_model(quantised.transformer, format)
    for name, module in list(quantised.transformer.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense.transformer.get_submodule(name).weight.data = module.dequantized(torch.float32)
    gradients = []
    for lance in (quantised, dense):
        parameters = add_lora(lance.transformer, config)
        for parameter in parameters[1::2]:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        embedding = lance.transformer.language_model.model.embed_tokens
        embedding.register_forward_hook(lambda module, call, rows: rows.requires_grad_())  # or layer 0 rounds inputs
        loss(lance).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert gradients[1].norm() > 0
    assert distance(*gradients) < 1e-4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"rank": 1.5}, "lora.rank is 1.5"),
        ({"alpha": 0}, "lora.alpha is 0"),
        ({"alpha": float("nan")}, "lora.alpha"),
        ({"experts": ()}, "lora.experts is ()"),
        ({"experts": "generation"}, "lora.experts is 'generation'"),
        ({"experts": ("painting",)}, "understanding, generation"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
        ({"targets": ("embed_tokens",)}, "q_proj, k_proj"),
        ({"layers": "some"}, "'all' or a list"),
        ({"layers": (0, -1)}, "-1"),
        ({"experts": ("understanding",), "targets": ("llm2vae",)}, "'llm2vae', which belongs to the generation expert"),
        ({"experts": ("generation",), "targets": ("lm_head",)}, "belongs to the understanding expert"),
    ],
)
def test_impossible_settings_get_a_sentence(values, words):
    with pytest.raises(LanceError) as caught:
        LoraConfig(**values)
    assert words in str(caught.value) and str(caught.value).count(". ") == 0


def test_layers_that_the_model_has_not_are_refused():
    with pytest.raises(LanceError, match="lora.layers has 3, but the model's layers are 0 to 2"):
        lora_modules(LoraConfig(layers=(0, 3)), TINY_TEXT)


# Files


def test_a_file_has_peft_s_names_and_says_what_it_is(lora):
    lance, path = lora
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    suffixes = ("lora_A.weight", "lora_B.weight", "alpha")
    modules = lora_modules(EVERYTHING, lance.config.text)
    assert names == {f"diffusion_model.{module}.{suffix}" for module in modules for suffix in suffixes}
    peft, own = (json.loads(metadata[name]) for name in ("lora_adapter_metadata", "lance_lora"))
    assert (peft["r"], peft["lora_alpha"], set(peft["target_modules"])) == (4, 8.0, set(modules))
    assert (own["hidden_size"], own["experts"], own["layers"]) == (64, ["understanding", "generation"], "all")
    assert own["step"] == 3


def test_a_file_that_cannot_be_written_leaves_the_one_before(lora, tmp_path, monkeypatch):
    lance, _ = lora
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"before")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LanceError, match="style.safetensors cannot be written .No space left"):
        save_lora(path, lora_tensors(lance.transformer), EVERYTHING, lance.config.text)
    monkeypatch.undo()
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


# Applied


def test_a_saved_lora_is_the_trained_one(lora):
    lance, path = lora
    applied = apply_loras(plain(), [(path, 1.0)])
    assert distance(paint(applied), paint(lance)) <= SAME
    assert distance(paint(applied), paint(plain())) > EFFECT
    question = "what is this?"
    assert stages.understand(applied, None, question, max_new_tokens=8) == stages.understand(
        lance, None, question, max_new_tokens=8
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_model_without_its_lora_is_the_same_bit_for_bit(lora, dtype):
    lance = load_lance(TINY, device="cpu", dtype=dtype)
    before = {name: weight.clone() for name, weight in lance.transformer.named_parameters()}
    picture = paint(lance)
    applied = apply_loras(lance, [(lora[1], 1.0)])
    assert distance(paint(applied), picture) > EFFECT
    after = dict(lance.transformer.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(paint(lance), picture)
    shared = {weight.data_ptr() for weight in applied.transformer.parameters()}
    assert shared >= {weight.data_ptr() for weight in after.values()}, "weights were copied"
    assert not any(weight.requires_grad for weight in applied.transformer.parameters())


def test_several_loras_add_up_in_any_order(lora, second):
    both = [(lora[1], 0.5), (second, -1.0)]
    expected = paint(apply_loras(plain(), both))
    assert distance(paint(apply_loras(plain(), both[::-1])), expected) <= SAME
    one_by_one = apply_loras(apply_loras(plain(), both[:1]), both[1:])
    assert distance(paint(one_by_one), expected) <= SAME
    assert distance(paint(apply_loras(plain(), both[:1])), expected) > EFFECT


def test_a_negative_strength_takes_the_same_away(lora):
    path = lora[1]
    assert distance(paint(apply_loras(plain(), [(path, 1.0), (path, -1.0)])), paint(plain())) <= SAME
    assert apply_loras(plain(), [(path, 0.0)]) is plain()
    assert apply_loras(plain(), []) is plain()


def test_a_reading_belongs_to_one_of_the_two(lora):
    semantic = stages.encode_semantic(plain(), torch.rand(1, 56, 56, 3), resolution=None)
    reading = stages.read(plain(), semantic)
    with pytest.raises(LanceError, match="the reading is another model's"):
        stages.understand(apply_loras(plain(), [(lora[1], 1.0)]), reading, "what?", max_new_tokens=1)


def test_weights_that_come_and_go_give_the_same_bits(lora):
    expected = paint(apply_loras(plain(), [(lora[1], 1.0)]))
    limited = load_lance(TINY, device="cpu", dtype="fp32", memory=2.2e6 / GIB)
    without = paint(limited)
    applied = apply_loras(limited, [(lora[1], 1.0)])
    assert limited.placement.budget - applied.placement.budget == sum(
        tensor.nbytes for name, tensor in load_file(lora[1]).items() if "lora_" in name
    )
    for _ in range(2):
        assert torch.equal(paint(applied), expected)
        assert torch.equal(paint(limited), without)
    assert any(not piece.present for part in applied.placement.parts.values() for piece in part.pieces)


def test_uses_of_both_models_nest(lora):
    """One decodes a preview of what the other paints: what the outer use needs is there again when the inner ends."""
    base = load_lance(TINY, device="cpu", dtype="fp32", memory=5.7e6 / GIB)  # for the VAE or the layers
    applied = apply_loras(base, [(lora[1], 1.0)])
    pieces = [piece for name in ("rest", *stages.PAINTING) for piece in base.placement.parts[name].pieces]
    with applied.placement.use(*stages.PAINTING):
        before = [piece.present for piece in pieces]
        with base.placement.use("vae"):
            assert [piece.present for piece in pieces] != before
        assert [piece.present for piece in pieces] == before


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantised_weights_stay_as_they_are(lora, format):
    lance = load_lance(TINY, device="cpu", dtype="fp32", weights=format)
    applied = apply_loras(lance, [(lora[1], 1.0)])
    assert isinstance(applied.transformer.get_submodule(Q).base, QuantizedLinear)
    effect = distance(paint(applied), paint(lance))
    assert effect == pytest.approx(distance(paint(apply_loras(plain(), [(lora[1], 1.0)])), paint(plain())), rel=0.3)


def test_a_lora_beside_the_weights_is_not_saved_with_them(lora, tmp_path):
    with pytest.raises(LanceError, match="python -m lance_core merge"):
        save_checkpoint(tmp_path / "new", apply_loras(plain(), [(lora[1], 1.0)]), tokenizer_specification())


def test_another_model_s_lora_is_named(tmp_path):
    text = replace(TINY_TEXT, hidden_size=192, num_attention_heads=6)
    config = LoraConfig(rank=2)
    transformer = LanceTransformer(text)
    add_lora(transformer, config)
    path = save_lora(tmp_path / "other.safetensors", lora_tensors(transformer), config, text)
    with pytest.raises(LanceError, match=r"other\.safetensors does not fit: for .*q_proj of size \(64, 64\) it has"):
        apply_loras(plain(), [(path, 1.0)])
    with pytest.raises(LanceError, match="does not fit"):
        merge_checkpoint(TINY, tmp_path / "merged", [(path, 1.0)])
    assert not (tmp_path / "merged").exists()


def test_files_that_cannot_be_applied_get_a_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    damaged = tmp_path / "y.pt"
    damaged.write_bytes(b"nothing")
    nan = random_lora(Q, (64, 64))
    nan[f"diffusion_model.{Q}.lora_B.weight"][0, 0] = torch.nan
    embedding = "language_model.model.embed_tokens"
    files = {
        "more than two factors.*lokr_w1": {f"lycoris_{Q.replace('.', '_')}.lokr_w1": torch.ones(2, 2)},
        "more than two factors.*dora_scale": {**random_lora(Q, (64, 64)), f"{Q}.dora_scale": torch.ones(64, 1)},
        f"NaN or infinity for {Q}": nan,
        "embed_tokens cannot be applied beside": random_lora(embedding, (416, 64)),
        "changes no weight of Lance": {"other.lora_A.weight": torch.ones(2, 2)},
    }
    for words, tensors in files.items():
        save_file(tensors, path)
        with pytest.raises(LanceError, match=words):
            apply_loras(plain(), [(path, 1.0)])
    for missing, words in ((tmp_path / "none.safetensors", "does not exist"), (damaged, "damaged or no file")):
        with pytest.raises(LanceError, match=words):
            apply_loras(plain(), [(missing, 1.0)])
    for strength in (float("nan"), 1000.0, "much"):
        with pytest.raises(LanceError, match="the strength of LoRA x.safetensors"):
            apply_loras(plain(), [(path, strength)])


def test_files_of_torch_and_strange_tensors(tmp_path):
    tensors = random_lora(Q, (64, 64))
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({**tensors, "vit.blocks.0.lora_A.weight": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.warns(LanceWarning, match="1 of its tensors are left out.*vit.blocks.0"):
        applied = apply_loras(plain(), [(tmp_path / "x.pt", 1.0)])
    assert torch.equal(paint(applied), paint(apply_loras(plain(), [(tmp_path / "x.safetensors", 1.0)])))


# Merged


@pytest.fixture(scope="module")
def float_checkpoint(tmp_path_factory) -> Path:
    """The small checkpoint in float32, so that merging does not round."""
    tokenizer = (TINY / "Lance_3B/tokenizer.json").read_text(encoding="utf-8")
    return save_checkpoint(tmp_path_factory.mktemp("float") / "tiny", fresh(), tokenizer, dtype=torch.float32)


def test_a_merged_checkpoint_is_the_model_with_its_loras(lora, second, float_checkpoint, tmp_path):
    loras = [(lora[1], 0.7), (second, -0.4)]
    done = merge_checkpoint(float_checkpoint, tmp_path / "merged", loras)
    assert done.before == pytest.approx(done.after, rel=0.01)
    merged, base = (load_lance(path, device="cpu", dtype="fp32") for path in (done.folder, float_checkpoint))
    assert not any(isinstance(module, LoraLinear) for module in merged.transformer.modules())
    assert distance(paint(merged), paint(apply_loras(base, loras))) <= SAME
    assert distance(paint(merged), paint(base)) > EFFECT


def test_only_the_lora_s_weights_change_and_types_stay(second, tmp_path):
    """Rounded once: in bf16 every weight is the one nearest to the sum."""
    folder = merge_checkpoint(TINY, tmp_path / "merged", [(second, 2.0)]).folder
    (before_path,), (after_path,) = TINY.glob("**/model.safetensors"), folder.glob("*/model.safetensors")
    before, after, lora = load_file(before_path), load_file(after_path), load_file(second)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        path = "diffusion_model." + name.removesuffix(".weight")
        assert after[name].dtype == weight.dtype
        if f"{path}.lora_A.weight" in lora:
            factors = lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"]
            expected = weight.float() + 2.0 * float(lora[f"{path}.alpha"]) / 2 * factors
            assert (after[name] == expected.to(weight.dtype)).float().mean() > 0.999  # ties may fall either way
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)


def test_an_embedding_can_be_merged(tmp_path):
    module = "language_model.model.embed_tokens"
    tensors = random_lora(module, (416, 64))
    save_file(tensors, tmp_path / "words.safetensors")
    folder = merge_checkpoint(TINY, tmp_path / "merged", [(tmp_path / "words.safetensors", 1.0)]).folder
    merged = load_lance(folder, device="cpu", dtype="fp32").transformer.get_submodule(module).weight
    expected = (
        plain().transformer.get_submodule(module).weight
        + tensors[f"diffusion_model.{module}.lora_B.weight"] @ (tensors[f"diffusion_model.{module}.lora_A.weight"])
    )
    torch.testing.assert_close(merged, expected, rtol=1e-2, atol=1e-3)


def test_merging_needs_a_new_folder_and_a_lora(lora, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with pytest.raises(LanceError, match="is not empty"):
        merge_checkpoint(TINY, tmp_path / "there", [(lora[1], 1.0)])
    with pytest.raises(LanceError, match="no LoRA to merge"):
        merge_checkpoint(TINY, tmp_path / "new", [])


# From the shell and from workflows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("b/a:-1e-1", ("b/a", -0.1)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
        ("a:b:2", ("a:b", 2.0)),
    ],
)
def test_a_strength_stands_behind_the_file(text, expected):
    assert parse_lora(text) == (Path(expected[0]), expected[1])


def test_the_commands_take_loras(lora, second, tmp_path, capsys):
    sizes = ["--width", "48", "--height", "32", "--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    loras = ["--lora", f"{lora[1]}:0.5", "--lora", str(second)]
    output = tmp_path / "x.safetensors"
    assert main(["generate", "a fox", "--model", str(TINY), *sizes, *loras, "--output", str(output)]) == 0
    expected = paint(apply_loras(plain(), [(lora[1], 0.5), (second, 1.0)]))
    assert distance(read_latent(output), expected) <= SAME
    assert main(["merge", str(TINY), str(tmp_path / "merged"), *loras]) == 0
    assert (tmp_path / "merged/Lance_3B/model.safetensors").is_file()
    assert main(["generate", "a fox", "--model", str(TINY), *sizes, "--lora", "none.safetensors"]) == 2
    assert "LoRA none.safetensors does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("loader", [("LanceLora", "strength"), ("LoraLoaderModelOnly", "strength_model")])
def test_workflows_load_loras(lora, tmp_path, loader):
    kind, strength = loader
    (tmp_path / "models/loras").mkdir(parents=True)
    (tmp_path / "models/loras/style.safetensors").write_bytes(lora[1].read_bytes())
    size = {"size": "custom", "size.width": 48, "size.height": 32, "frames": 1, "steps": 2}
    workflow = {
        "1": {"class_type": "LoadLance", "inputs": {"checkpoint": str(TINY), "weight_dtype": "fp32"}},
        "2": {"class_type": kind, "inputs": {"model": ["1", 0], "lora_name": "style.safetensors", strength: 0.5}},
        "3": {"class_type": "LanceGenerate", "inputs": {"model": ["2", 0], "prompt": "a fox", **size}},
        "4": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 1], "samples": ["3", 0]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0]}},
    }
    places = {"output": tmp_path / "output", "models": [tmp_path / "models"], "device": "cpu"}
    (result,) = run_workflow(workflow, **places)
    applied = apply_loras(plain(), [(lora[1], 0.5)])
    expected = to_bytes(stages.decode_video(applied, paint(applied)))
    assert (to_bytes(read_image(result.files[0])).int() - expected.int()).abs().max() <= 1
    with pytest.raises(LanceError, match=rf"node 2 \({kind}\): there is no LoRA 'other'"):
        run_workflow(workflow, overrides=["2.lora_name=other"], **places)


# The plan

TINY_PICTURES = Resolutions(image=Resolution(vae=64, vit=56))


def run_of(method: str, checkpointing: bool, **options) -> TrainConfig:
    training = Training(method=method, tokens=400, precision="fp32", checkpointing=checkpointing)
    lora = LoraConfig(rank=8) if method == "lora" else None
    return TrainConfig(Path("run"), model=Model(str(TINY)), train=replace(training, **options), lora=lora)


def empty(dtype: torch.dtype = torch.float32) -> Lance:
    lance, *_ = empty_parts(find_checkpoint(TINY), dtype=dtype)
    return replace(lance, config=replace(lance.config, resolutions=TINY_PICTURES))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_plan_is_what_a_step_then_holds(method, checkpointing):
    config = run_of(method, checkpointing)
    planned = training_needs(config, empty())
    lance = replace(fresh(), config=empty().config)
    trainee = trainee_of(config, lance)
    batch = typical_batch(config, lance)
    with LiveTensors("cpu") as count, recomputed(lance) if checkpointing else nullcontext():
        trainee(batch)["loss"].backward()
    weights = [weight for weight in trainee.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert planned.step == pytest.approx(count.peak, rel=0.1)
    assert planned.trained == sum(weight.nbytes for weight in weights)
    assert planned.kept == planned.trained + sum(moment.nbytes for moment in moments)
    assert planned.frozen + planned.trained == weight_bytes(lance.transformer, lance.vision, lance.vae)


def test_a_plan_is_of_a_batch_with_room_for_all_noise_blocks():
    once, thrice = (replace(run_of("lora", True), objective=Objective(draws=draws)) for draws in (1, 3))
    lengths = [typical_batch(config, empty()).positions.shape[1] for config in (once, thrice)]
    assert lengths[1] <= lengths[0]


def test_a_plan_knows_what_saves_memory():
    need = {again: training_needs(run_of("lora", again), empty()).step for again in (True, False)}
    assert need[True] < 0.6 * need[False]
    full, lora = (training_needs(run_of(method, True), empty()) for method in ("full", "lora"))
    assert lora.trained + lora.kept < 0.5 * (full.trained + full.kept)
    halves = training_needs(run_of("lora", True, precision="bf16"), empty(torch.bfloat16))
    assert halves.frozen == pytest.approx(lora.frozen / 2, rel=0.01)
    assert training_needs(run_of("lora", True, ema=0.0), empty()).kept == lora.kept * 2 // 3


def test_the_command_prints_the_plan(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        f"""output = "{tmp_path}/out"
        [model]
        checkpoint = "{TINY}"
        [train]
        method = "lora"
        tokens = 64
        checkpointing = true
        [lora]
        rank = 2
        experts = ["generation"]
        """
    )
    assert main(["train", str(tmp_path / "run.toml"), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "in all" in out and "average" in out and "computed again in the backward pass" in out
    assert not (tmp_path / "out").exists()
