"""What is installed, imported and published."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "lance_core").glob("*.py"), *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]


def project_requirements() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    return [Requirement(line) for line in re.findall(r'"(.+?)"', block)]


def test_installing_brings_lance_core_alone(tmp_path):
    """A top-level package `nodes` in site-packages would stand before ComfyUI's own module of that name."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, source)
    for name in ("lance_core", "nodes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lance_core"}


def test_requirements_pin_nothing():
    """Installing the pack never changes a user's torch, numpy or transformers."""
    for requirement in project_requirements():
        assert {clause.operator for clause in requirement.specifier} <= {">="}, requirement


def test_the_manager_s_list_is_the_project_s_without_torch():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert listed == {str(r) for r in project_requirements() if r.name != "torch"}


def test_lance_core_needs_neither_comfyui_nor_transformers():
    code = (
        "import sys, lance_core.__main__\n"
        "foreign = {'comfy', 'comfy_api', 'folder_paths', 'nodes', 'server', 'transformers', 'torchvision'}\n"
        "print(sorted(foreign & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_layers_know_only_what_is_below_them(path):
    text = path.read_text(encoding="utf-8")
    if path.parent.name == "lance_core":
        hosts = "comfy|comfy_api|folder_paths|nodes|server|latent_preview"
        assert not re.search(rf"^\s*(from|import) ({hosts})\b", text, re.MULTILINE)
        assert not re.search(r"from \.\.", text)
    else:
        assert not re.search(r"^\s*(from|import) (lance_core|nodes)\b", text, re.MULTILINE)  # relative imports only


def test_nothing_loads_or_runs_code_from_files():
    unsafe = r"(?<!\.)\b(eval|exec)\(|weights_only=False|pickle\.load|os\.system|subprocess|shell=True"
    for path in SOURCES:
        assert not re.search(unsafe, path.read_text(encoding="utf-8")), path


def test_every_node_is_translated_and_explained():
    names = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    schemas = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    nodes = set(re.findall(r'node_id="(\w+)"', schemas))
    assert set(names) == nodes
    for language in ("en", "zh"):
        assert {page.parent.name for page in (ROOT / "web/docs").glob(f"*/{language}.md")} == nodes
