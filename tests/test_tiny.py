"""The small random checkpoint."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lance_core.checkpoint import load_lance, official_shapes
from lance_core.config import LanceConfig, TextConfig
from lance_core.errors import LanceError
from lance_core.inspection import inspect
from lance_core.prompts import system_prompt
from lance_core.storage import read_header
from lance_core.tiny import TINY_TEXT, TINY_VAE, TINY_VISION, make_tiny, random_lance, tokenizer_specification
from lance_core.tokenizer import IM_END, IM_START, VIDEO_PAD, VISION_END, VISION_START


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


def test_official_layout_below_10_mb(tiny):
    files = contents(tiny)
    assert files.keys() == {
        "Lance_3B/model.safetensors",
        "Lance_3B/llm_config.json",
        "Lance_3B/generation_config.json",
        "Lance_3B/vocab.json",
        "Lance_3B/merges.txt",
        "Lance_3B/tokenizer.json",
        "Lance_3B/tokenizer_config.json",
        "Qwen2.5-VL-ViT/config.json",
        "Qwen2.5-VL-ViT/vit.safetensors",
        "Wan2.2_VAE.pth",
    }
    assert sum(map(len, files.values())) < 10e6
    assert not inspect(tiny).problems


@pytest.mark.parametrize("variant", ["image", "video"])
def test_names_and_shapes_are_the_releases(tmp_path, variant):
    folder = make_tiny(tmp_path / "checkpoint", variant=variant)
    shapes = official_shapes(LanceConfig(TINY_TEXT, TINY_VISION), TINY_VAE, variant=variant)
    for file, expected in shapes.items():
        assert {name: stored.shape for name, stored in read_header(folder / file).items()} == expected
    assert inspect(folder).variant == variant and not inspect(folder).problems


def test_same_seed_same_bytes(tiny, tmp_path):
    assert contents(make_tiny(tmp_path / "again")) == contents(tiny)
    other = contents(make_tiny(tmp_path / "other", seed=1))
    assert {name for name, raw in contents(tiny).items() if raw != other[name]} == {
        "Lance_3B/model.safetensors",
        "Qwen2.5-VL-ViT/vit.safetensors",
        "Wan2.2_VAE.pth",
    }


def test_loads_what_was_made(tiny):
    lance, made = load_lance(tiny), random_lance()
    assert lance.config == made.config == LanceConfig(TINY_TEXT, TINY_VISION)
    assert lance.vae.config == TINY_VAE
    for name in ("transformer", "vision"):
        for loaded, original in zip(getattr(lance, name).parameters(), getattr(made, name).parameters(), strict=True):
            assert torch.equal(loaded, original.bfloat16().float())
    for loaded, original in zip(lance.vae.parameters(), made.vae.parameters(), strict=True):
        assert torch.equal(loaded, original)


def test_tokenizer_reads_every_text(tiny):
    tokenizer = load_lance(tiny).tokenizer
    assert len(tokenizer) <= TINY_TEXT.vocab_size
    for text in (system_prompt("edit", "image"), "你好, 世界! 😀\n\tx = 3.14", "<|im_end|>", "\x00\x7f\u0301e"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("Describe the image")) < len("Describe the image") / 2
    ids = [tokenizer.special(name) for name in (IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD)]
    assert len(set(ids)) == 5 and not set(ids) & set(tokenizer.encode("<|im_start|><|im_end|><|video_pad|>"))
    assert tokenizer_specification() == tokenizer_specification()


def test_activations_stay_sane():
    lance = random_lance()
    generator = torch.Generator().manual_seed(0)
    picture = lance.vae.decode(torch.randn(1, 48, 2, 4, 4, generator=generator))
    assert 0.2 < picture.std() < 0.9 and (picture.abs() == 1).float().mean() < 0.3
    mean, logvar = lance.vae.encode(torch.rand(1, 3, 5, 64, 64, generator=generator) * 2 - 1)
    assert 0.05 < mean.std() < 5 and logvar.abs().max() < 5
    tokens = lance.vision(torch.randn(3, 2, 56, 56, generator=generator))
    assert 0.1 < tokens.std() < 10


def test_answers_are_readable():
    lance = random_lance()
    head = lance.transformer.language_model.lm_head.weight
    written = [lance.tokenizer.decode([i]) for i in range(len(lance.tokenizer)) if head[i].any()]
    assert len(written) > 200 and IM_END in written
    assert all(text == IM_END or text.replace("\n", " ").isprintable() for text in written)
    assert not {VISION_START, VIDEO_PAD, "\x1b", "\ufffd"} & set(written)


def test_other_sizes(tmp_path):
    text = TextConfig(1024, 96, 128, 2, 6, 2, mrope_section=(2, 3, 3))
    lance = load_lance(make_tiny(tmp_path / "checkpoint", text=text, vae=replace(TINY_VAE, encoder_width=4)))
    assert lance.config.text == text and lance.config.vision.out_hidden_size == 96
    assert lance.vae.config.encoder_width == 4


def test_in_memory_in_bf16():
    lance = random_lance(dtype=torch.bfloat16, seed=3)
    assert {p.dtype for p in lance.transformer.parameters()} == {torch.bfloat16} == {lance.dtype}
    full = dict(random_lance(seed=3).transformer.named_parameters())
    assert all(torch.equal(p, full[name].bfloat16()) for name, p in lance.transformer.named_parameters())


def test_vocabulary_too_small_for_the_tokenizer():
    with pytest.raises(LanceError, match="A vocabulary of 300 is too small for the tokenizer's 526 tokens"):
        random_lance(LanceConfig(replace(TINY_TEXT, vocab_size=300), TINY_VISION))


def test_a_folder_in_use_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    make_tiny(folder)  # empty: taken
    before = contents(folder)
    with pytest.raises(LanceError, match="mine is not empty"):
        make_tiny(folder, seed=1)
    assert contents(folder) == before
    make_tiny(folder, seed=1, overwrite=True)
    assert contents(folder) != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(LanceError, match=r"mine holds more than a Lance checkpoint \(notes.txt\)"):
        make_tiny(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("room", [50_000, 4_000_000])  # less than the weights, and than the VAE
def test_a_full_disk_leaves_nothing_half_written(tmp_path, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(LanceError, match="new cannot be written"):
            make_tiny(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_weights_can_be_read_by_whom_the_rest_can(tmp_path):
    make_tiny(tmp_path / "new")
    modes = {path.stat().st_mode for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LanceError, match="name another"):
            make_tiny(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
