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


def write_extra_model_paths(path: Path, models: Path) -> None:
    """What people write who keep their models on another disk (JSON is YAML)."""
    path.write_text(json.dumps({"elsewhere": {"base_path": str(models), "lance": "lance"}}))


def make_tiny(folder: Path) -> Path:
    """A small random checkpoint in the official layout."""
    command = [sys.executable, "-m", "lance_core", "make-tiny", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def server_in(folder: Path, comfyui: Path, tiny: Path | None = None) -> ComfyServer:
    """ComfyUI with this pack and, unless the built-in one is enough, small checkpoints, all inside an empty folder.

    The checkpoints lie as the README's download puts the release: `Lance_3B` and `Lance_3B_Video` in models/lance. A
    third, `tiny/Lance_3B`, is found through extra_model_paths.
    """
    base, elsewhere = folder / "comfyui", folder / "other_models"
    (base / "custom_nodes").mkdir(parents=True)
    os.symlink(ROOT, base / "custom_nodes" / PACK, target_is_directory=True)
    if tiny is None:
        return ComfyServer(comfyui, find_python(comfyui), base)
    shutil.copytree(tiny, base / "models/lance")
    shutil.copytree(tiny / "Lance_3B", base / "models/lance/Lance_3B_Video")
    shutil.copytree(tiny, elsewhere / "lance/tiny")
    write_extra_model_paths(base / "extra_model_paths.yaml", elsewhere)
    arguments = ("--extra-model-paths-config", str(base / "extra_model_paths.yaml"))
    return ComfyServer(comfyui, find_python(comfyui), base, arguments)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI to test with; what needs one is skipped where there is none."""
    if (path := find_comfyui()) is None:
        pytest.skip("no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI (tests/comfyui/setup_server.sh says how to get one)")
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, comfyui: Path, tiny_checkpoint: Path) -> Iterator[ComfyServer]:
    with server_in(tmp_path_factory.mktemp("server"), comfyui, tiny_checkpoint) as running:
        yield running
