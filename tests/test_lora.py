"""LoRA files of the usual trainers, named for ComfyUI."""

import json
import re

import pytest
import torch
from hypothesis import given, strategies as st

from lance_core.errors import LanceError
from lance_core.lora import convert_lora, match_names, module_weights, peft_alphas, read_config
from lance_core.tiny import TINY_TEXT
from lance_core.transformer import LanceTransformer

RANK = 4
Q = "language_model.model.layers.0.self_attn.q_proj"
Q_GEN = Q + "_moe_gen"


def parameters() -> dict[str, tuple[int, ...]]:
    transformer = LanceTransformer(TINY_TEXT, device="meta")
    return {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}


WEIGHTS = module_weights(parameters())
LINEAR = {module: shape for module, shape in WEIGHTS.items() if len(shape) == 2}
INNER = [module for module in LINEAR if module.startswith("language_model.model.")]

DOTTED = {
    "comfyui": "diffusion_model.{}",
    "ai-toolkit": "transformer.{}",
    "diffusers-unet": "unet.{}",
    "bare": "{}",
    "peft": "base_model.model.{}",
    "peft-wrapped": "base_model.model.module.{}",
    "compiled": "base_model.model._orig_mod.{}",
}
UNDERSCORED = {
    "kohya": "lora_unet_{}",
    "kohya-two": "lora_unet__{}",
    "kohya-text": "lora_te_{}",
    "onetrainer": "lora_transformer_{}",
    "lycoris": "lycoris_{}",
}
PATHS = {
    **{style: (form, ".") for style, form in DOTTED.items()},
    **{s: (form, "_") for s, form in UNDERSCORED.items()},
}
FACTORS = {  # the file's suffixes of the factors [rank, in] and [out, rank], and ComfyUI's
    "peft": (".lora_A.weight", ".lora_B.weight", "lora_A.weight", "lora_B.weight"),
    "peft-named": (".lora_A.default.weight", ".lora_B.default.weight", "lora_A.weight", "lora_B.weight"),
    "parameters": (".lora_A", ".lora_B", "lora_A.weight", "lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight", "lora_down.weight", "lora_up.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight", "lora_down.weight", "lora_up.weight"),
    "diffusers-old": ("_lora.down.weight", "_lora.up.weight", "lora_down.weight", "lora_up.weight"),
    "transformers": (
        ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "lora_down.weight", "lora_up.weight",
    ),
}  # fmt: skip


def spelled(module: str, style: str) -> str:
    form, separator = PATHS[style]
    return form.format(module.replace(".", separator))


def factors(module: str, style: str = "peft", suffixes: str = "peft") -> dict[str, torch.Tensor]:
    """A LoRA of one module as a trainer would save it."""
    rows, columns = LINEAR[module]
    path, (down, up, *_) = spelled(module, style), FACTORS[suffixes]
    generator = torch.Generator().manual_seed(len(module))
    return {
        path + down: torch.randn(RANK, columns, generator=generator),
        path + up: torch.randn(rows, RANK, generator=generator),
    }


def convert(file: dict[str, torch.Tensor], config=None):
    return convert_lora(file, WEIGHTS, config or {}, "x.safetensors")


@pytest.mark.parametrize("suffixes", FACTORS)
@pytest.mark.parametrize("style", PATHS)
def test_every_style_names_every_module(style, suffixes):
    file = {name: tensor for module in LINEAR for name, tensor in factors(module, style, suffixes).items()}
    expected = {f"diffusion_model.{module}.{suffix}" for module in LINEAR for suffix in FACTORS[suffixes][2:]}
    lora = convert(file)
    assert lora.unmatched == () and lora.tensors.keys() == expected
    assert all(any(tensor is other for other in file.values()) for tensor in lora.tensors.values())


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(LINEAR)), st.sampled_from(sorted(PATHS)), st.sampled_from(sorted(FACTORS))),
        min_size=1,
        unique_by=lambda choice: choice[0],
    ),
    st.lists(
        st.sampled_from(["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "vit.blocks.0.lora_A.weight", "x"])
    ),
)
def test_mixed_styles_lose_nothing(choices, others):
    files = [factors(*choice) for choice in choices]
    file = {name: tensor for one in files for name, tensor in one.items()} | {name: torch.zeros(1) for name in others}
    lora = convert(file)
    assert set(lora.unmatched) == set(others)
    assert len(lora.tensors) == 2 * len(choices)
    for (module, _, suffixes), one in zip(choices, files):
        for name, tensor in zip(FACTORS[suffixes][2:], one.values()):
            assert lora.tensors[f"diffusion_model.{module}.{name}"] is tensor


@pytest.mark.parametrize("root", ["language_model.", "language_model.model."])
@pytest.mark.parametrize("style", PATHS)
def test_adapters_of_the_language_model_alone(style, root):
    names = {spelled(module.removeprefix(root), style) + ".lora_A.weight": module for module in INNER}
    matched = match_names(names, WEIGHTS, "x")
    assert matched.names == {name: f"diffusion_model.{module}.lora_A.weight" for name, module in names.items()}


@pytest.mark.parametrize(
    "suffix",
    "alpha dora_scale diff diff_b w_norm b_norm set_weight oft_blocks rescale a1.weight b2.weight lokr_w1 lokr_w1_a"
    " lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2".split(),
)
@pytest.mark.parametrize("style", PATHS)
def test_other_tensors_keep_their_suffix(style, suffix):
    for module in (Q, Q_GEN, "language_model.model.layers.1.mlp_moe_gen.up_proj", "vae2llm", "time_embedder.mlp.0"):
        name = f"{spelled(module, style)}.{suffix}"
        assert match_names([name], WEIGHTS, "x").names == {name: f"diffusion_model.{module}.{suffix}"}


def test_adapter_names_of_peft_are_removed():
    path = f"base_model.model.{Q_GEN}"
    names = [f"{path}.{part}" for part in ("hada_w1_a.my-style", "lora_magnitude_vector.my-style.weight")]
    targets = match_names(names, WEIGHTS, "x").names.values()
    assert list(targets) == [f"diffusion_model.{Q_GEN}.{part}" for part in ("hada_w1_a", "dora_scale")]


def test_magnitudes_broadcast_over_inputs():
    vector = torch.rand(LINEAR[Q][0])
    lora = convert({**factors(Q), f"base_model.model.{Q}.lora_magnitude_vector": vector})
    assert torch.equal(lora.tensors[f"diffusion_model.{Q}.dora_scale"], vector[:, None])


def test_embeddings_of_peft_are_transposed():
    module = "language_model.model.embed_tokens"
    words, width = LINEAR[module]
    a, b = torch.rand(RANK, words), torch.rand(width, RANK)
    path = f"base_model.model.{module}.lora_embedding"
    lora = convert({path + "_A": a, path + "_B": b}, {"lora_alpha": 8})
    names = ("lora_up.weight", "lora_down.weight", "alpha")
    up, down, alpha = (lora.tensors[f"diffusion_model.{module}.{name}"] for name in names)
    torch.testing.assert_close(up @ down * alpha / RANK, (b @ a).T * 8 / RANK)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "base_model.model.language_model.model.layers.99.self_attn.q_proj.lora_A.weight",
        f"{Q}.weight",
        f"{Q}.lora_B.bias",
    ],
)
def test_files_without_anything_of_lance_are_refused(name):
    with pytest.raises(LanceError, match=rf"x\.safetensors.*'{re.escape(name)}'.*trained on Lance"):
        convert({name: torch.zeros(4, 4)})


def test_empty_files_are_refused():
    with pytest.raises(LanceError, match="holds no tensors"):
        convert({})


def test_another_language_model_s_sizes_are_refused():
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    file = {f"{path}.lora_A.weight": torch.zeros(8, 3584), f"{path}.lora_B.weight": torch.zeros(3584, 8)}
    with pytest.raises(LanceError, match=rf"does not fit: for {re.escape(Q)} of size \(128, 128\)"):
        convert(file)


@pytest.mark.parametrize("suffixes", FACTORS)
@pytest.mark.parametrize("kept", [0, 1])
def test_half_a_pair_is_refused(suffixes, kept):
    file = dict([list(factors(Q, suffixes=suffixes).items())[kept]])
    with pytest.raises(LanceError, match=f"lacks '{re.escape(Q)}.{FACTORS[suffixes][3 - kept]}'"):
        convert(file)


@pytest.mark.parametrize("shape", [(), (4,), (4, 128, 1), (3, 128), (4, 127)])
def test_odd_shapes_are_refused(shape):
    down, up = factors(Q).items()
    with pytest.raises(LanceError, match="does not fit"):
        convert({down[0]: torch.zeros(shape), up[0]: up[1]})


def test_two_adapters_in_one_file_are_refused():
    names = [f"base_model.model.{Q}.lora_A.{adapter}.weight" for adapter in ("one", "two")]
    with pytest.raises(LanceError, match="one.*two.*one of its adapters"):
        match_names(names, WEIGHTS, "x")


def test_underscores_that_can_mean_two_modules_are_refused():
    modules = ["a.b_c", "a_b.c"]
    with pytest.raises(LanceError, match=r"can mean a\.b_c or a_b\.c"):
        match_names(["lora_unet_a_b_c.alpha"], modules, "x")
    assert list(match_names(["a.b_c.alpha"], modules, "x").names.values()) == ["diffusion_model.a.b_c.alpha"]


@pytest.mark.parametrize("rslora, scale", [(False, 16 / RANK), (True, 16 / RANK**0.5)])
def test_scale_is_that_of_peft(rslora, scale):
    config = {"lora_alpha": 16, "r": RANK, "use_rslora": rslora}
    alpha = convert(factors(Q_GEN), config).tensors[f"diffusion_model.{Q_GEN}.alpha"]
    assert alpha / RANK == pytest.approx(scale)


def test_some_modules_have_their_own_alpha():
    config = {"lora_alpha": 16, "alpha_pattern": {"q_proj": 2, r"^model\.layers\.0\.self_attn\.q_proj_moe_gen": 3}}
    lora = convert({**factors(Q), **factors(Q_GEN), **factors("vae2llm")}, config).tensors
    alphas = {module: float(lora[f"diffusion_model.{module}.alpha"]) for module in (Q, Q_GEN, "vae2llm")}
    assert alphas == {Q: 2, Q_GEN: 3, "vae2llm": 16}


def test_the_file_s_own_alpha_wins():
    name = f"base_model.model.{Q}.alpha"
    lora = convert({**factors(Q), name: torch.tensor(3.0)}, {"lora_alpha": 16})
    assert lora.tensors[f"diffusion_model.{Q}.alpha"] == 3


def test_settings_of_another_adapter_are_refused():
    lora = convert(factors(Q)).tensors
    with pytest.raises(LanceError, match="r=8, but its tensors have rank 4"):
        peft_alphas(lora, WEIGHTS, {"lora_alpha": 16, "r": 8}, "x")
    assert peft_alphas(lora, WEIGHTS, {"lora_alpha": 16, "r": 8, "rank_pattern": {"q_proj": 4}}, "x")


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"lora_A.weight": torch.ones(0, LINEAR[Q][1]), "lora_B.weight": torch.ones(LINEAR[Q][0], 0)}, "of rank 0"),
        ({"alpha": torch.ones(2)}, f"has 2 numbers as '{Q}.alpha'"),
    ],
)
def test_changes_that_mean_nothing_are_refused(changed, words):
    with pytest.raises(LanceError, match=words):
        convert({**factors(Q), **{f"base_model.model.{Q}.{suffix}": tensor for suffix, tensor in changed.items()}})


@pytest.mark.parametrize("bad", [{"lora_alpha": "much"}, {"lora_alpha": 1, "alpha_pattern": {"(": 1}}])
def test_unusable_alpha_is_refused(bad):
    with pytest.raises(LanceError, match="no usable lora_alpha"):
        convert(factors(Q), bad)


def test_settings_lie_beside_peft_s_files_only(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK}))
    path = tmp_path / "adapter_model.safetensors"
    assert read_config(path, factors(Q, "peft"), None) == {"lora_alpha": 16, "r": RANK}
    assert read_config(path, factors(Q, "kohya", "kohya"), {}) == {}
    assert read_config(tmp_path / "elsewhere" / "x.safetensors", factors(Q, "peft"), None) == {}


def test_settings_of_diffusers_lie_in_the_header(tmp_path):
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16, "transformer.r": RANK})}
    assert read_config(tmp_path / "x", factors(Q), header) == {"lora_alpha": 16, "r": RANK}


@pytest.mark.parametrize("text", ["{", "3", "null", '["lora_alpha"]', "\udcff"])
def test_damaged_settings_are_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LanceError, match=r"adapter_config\.json of x cannot be read"):
        read_config(tmp_path / "x", factors(Q, "peft"), None)
