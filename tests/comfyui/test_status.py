"""What the server tells Load Lance's lines in the editor."""

from __future__ import annotations

import shutil
from math import prod
from urllib.error import HTTPError
from urllib.parse import urlencode

import pytest

from lance_core.checkpoint import read_contents
from lance_core.layout import find_checkpoint
from lance_core.quantized import quantizable


def status(server, name: str, weight_dtype: str = "default") -> dict:
    return server.get(f"/lance/checkpoint?{urlencode({'name': name, 'weight_dtype': weight_dtype})}")


@pytest.fixture
def checkpoint(server, tiny_checkpoint):
    """A folder of models/lance that a test may spoil, named as nothing in the release."""
    folder = server.folder / "models/lance/spoiled"
    shutil.copytree(tiny_checkpoint, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("weight_dtype, size", [("bf16", 2), ("fp32", 4)])
def test_it_counts_the_bytes_of_every_part(server, tiny_checkpoint, weight_dtype, size):
    contents = read_contents(find_checkpoint(tiny_checkpoint))
    expected = {
        part: sum(prod(stored.shape) for stored in tensors.values())
        for part, tensors in (("model", contents.language), ("vision", contents.vision), ("vae", contents.vae))
    }
    told = status(server, "Lance_3B", weight_dtype)
    assert (told["offered"], told["missing"], told["problems"]) == (True, [], [])
    assert told["needs"] == {
        "dtype": weight_dtype,
        "model": size * expected["model"],
        "vision": size * expected["vision"],
        "vae": 4 * expected["vae"],  # core computes it in fp32 on a CPU
    }
    assert told["machine"]["vram"] is None
    total, free = told["machine"]["ram"]
    assert total == server.get("/system_stats")["system"]["ram_total"]
    assert 0 < free < total


def test_it_counts_the_bytes_of_quantised_weights(server, tiny_checkpoint):
    """A byte for each weight and a scale for each row; the rest is in what a CPU computes in."""
    language = read_contents(find_checkpoint(tiny_checkpoint)).language
    large = {name: stored.shape for name, stored in language.items() if quantizable(name)}
    rest = sum(prod(stored.shape) for name, stored in language.items() if name not in large)
    needs = status(server, "Lance_3B", "int8")["needs"]
    assert needs["dtype"] == "int8"
    assert needs["model"] == sum(rows * (columns + 4) for rows, columns in large.values()) + 4 * rest


def test_it_names_what_is_missing_and_where_it_belongs(server, checkpoint):
    shutil.rmtree(checkpoint / "Qwen2.5-VL-ViT")
    (checkpoint / "Lance_3B/tokenizer.json").unlink()
    told = status(server, "spoiled/Lance_3B")
    assert [(entry["file"], entry["folder"]) for entry in told["missing"]] == [
        ("tokenizer.json", str(checkpoint / "Lance_3B")),
        ("vit.safetensors", str(checkpoint / "Qwen2.5-VL-ViT")),
    ]
    assert told["problems"] == []


def test_a_damaged_file_is_a_sentence(server, checkpoint):
    (checkpoint / "Lance_3B/model.safetensors").write_bytes(b"no tensors")
    told = status(server, "spoiled/Lance_3B")
    assert told["missing"] == [] and told["needs"] is None
    assert "model.safetensors cannot be read" in told["problems"][0]


@pytest.mark.parametrize("name", ["", "none", "../lance/Lance_3B", "/etc", "Lance_3B/../Lance_3B"])
def test_only_names_of_the_list_are_looked_for(server, name):
    told = status(server, name)
    assert not told["offered"] and told["needs"] is None and told["missing"] == told["problems"] == []
    assert told["command"].endswith(told["folder"])


def test_a_checkpoint_that_was_never_downloaded_is_told_file_by_file(server):
    """Of the release's names the list has only what is there; a half-finished download is not."""
    folder, moved = server.folder / "models/lance/Lance_3B", server.folder / "models/lance_3b"
    folder.rename(moved)
    try:
        told = status(server, "Lance_3B")
    finally:
        moved.rename(folder)
    assert not told["offered"]
    assert [(entry["file"], entry["folder"]) for entry in told["missing"][:3]] == [
        (name, f"{told['folder']}/Lance_3B") for name in ("model.safetensors", "llm_config.json", "tokenizer.json")
    ]
    assert told["missing"][0]["url"].endswith("/Lance_3B/model.safetensors")


def test_a_download_that_has_only_begun_is_told_file_by_file(server):
    """Files that are there already, the vision tower's and the VAE's, are not asked for again."""
    weights = server.folder / "models/lance/Lance_3B/model.safetensors"
    weights.rename(weights.with_suffix(".part"))
    try:
        told = status(server, "Lance_3B")
    finally:
        weights.with_suffix(".part").rename(weights)
    assert [(entry["file"], entry["folder"]) for entry in told["missing"]] == [(weights.name, str(weights.parent))]


def test_an_unknown_dtype_is_refused(server):
    with pytest.raises(HTTPError) as refusal:
        status(server, "Lance_3B", "fp4")
    assert refusal.value.code == 400


def test_the_built_in_model_lacks_nothing(server):
    told = status(server, "nano (built in)")
    assert told["offered"] and told["missing"] == told["problems"] == []
    assert 0 < sum(size for part, size in told["needs"].items() if part != "dtype") < 100e6
