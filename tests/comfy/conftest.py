"""Fixtures of the tests that need a ComfyUI. `setup_server.sh` makes one able to run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .server import PACK, ComfyServer, find_comfyui, find_python

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / "workflows"


def write_extra_model_paths(path: Path, models: Path) -> None:
    """What people write who keep their models on another disk (JSON is YAML)."""
    path.write_text(json.dumps({"elsewhere": {"base_path": str(models), "lance": "lance"}}))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint in the official layout."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    command = [sys.executable, "-m", "lance_core", "make-tiny", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[ComfyServer]:
    """ComfyUI with this pack, the example media, and small checkpoints.

    They lie as the README's download puts the release: `Lance_3B` and `Lance_3B_Video` in models/lance. A third,
    `tiny/Lance_3B`, is found through extra_model_paths.
    """
    if (comfyui := find_comfyui()) is None:
        pytest.skip("no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI (tests/comfy/setup_server.sh says how to get one)")
    folder = tmp_path_factory.mktemp("comfyui")
    other_models = tmp_path_factory.mktemp("other_models")
    (folder / "custom_nodes").mkdir()
    os.symlink(ROOT, folder / "custom_nodes" / PACK, target_is_directory=True)
    shutil.copytree(tiny_checkpoint, folder / "models/lance")
    shutil.copytree(tiny_checkpoint / "Lance_3B", folder / "models/lance/Lance_3B_Video")
    shutil.copytree(tiny_checkpoint, other_models / "lance/tiny")
    shutil.copytree(WORKFLOWS / "media", folder / "input")
    write_extra_model_paths(folder / "extra_model_paths.yaml", other_models)
    arguments = ("--extra-model-paths-config", str(folder / "extra_model_paths.yaml"))
    with ComfyServer(comfyui, find_python(comfyui), folder, arguments) as running:
        yield running
