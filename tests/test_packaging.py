"""What is installed, imported and published."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from tests.comfyui.server import find_comfyui, find_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "lance_core").rglob("*.py"), *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]

# Modules that ComfyUI is or brings, and that its own nodes import in the same way.
HOST = {"aiohttp", "comfy", "comfy_api", "folder_paths", "latent_preview", "server", "typing_extensions"}

# What the registry forbids, or makes reviewers distrust a pack: processes, network, installing, code from data.
FORBIDDEN = {
    *("subprocess", "multiprocessing", "pty", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv"),
    *("socket", "http.client", "http.server", "ftplib", "smtplib", "urllib.request", "urllib3", "requests", "httpx"),
    *("aiohttp", "websocket", "websockets", "huggingface_hub", "torch.hub"),
    *("pip", "ensurepip", "venv", "site", "sys.path", "sys.meta_path", "importlib.import_module", "importlib.util"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "code", "codeop", "runpy"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal", "shelve", "dill"),
}
ALLOWED = {"aiohttp.web"}  # routes of ComfyUI's own server


def comfyui_python() -> tuple[Path, Path]:
    if (comfyui := find_comfyui()) is None:
        pytest.skip("no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI (tests/comfyui/setup_server.sh says how to get one)")
    return comfyui, find_python(comfyui)


def shipped(folder: Path) -> list[str]:
    """Paths in the registry's archive, as git reads .gitignore and .comfyignore; `folder` is an empty one."""
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    command = [
        *("git", f"--git-dir={folder / '.git'}", f"--work-tree={ROOT}", "ls-files", "-z", "--others"),
        *("--exclude-per-directory=.gitignore", f"--exclude-from={ROOT / '.comfyignore'}"),
    ]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, encoding="utf-8")
    return listed.stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> list[str]:
    return shipped(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in (ROOT / name for name in shipped(tmp_path_factory.mktemp("git"))):
        (target := source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_installing_brings_lance_core_alone(wheel):
    """A top-level package `nodes` in site-packages would stand before ComfyUI's own module of that name."""
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lance_core"}


def test_wheel_and_archive_bring_every_module_and_the_built_in_model(wheel, archive):
    package = ROOT / "lance_core"
    files = [*package.rglob("*.py"), *(path for path in (package / "nano").rglob("*") if path.is_file())]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as contents:
        assert expected <= set(contents.namelist())
    assert expected <= set(archive)


def test_installing_changes_nothing_in_comfyui_s_environment(wheel, tmp_path):
    """pip, without any index to take packages from, finds that all but the pack itself is there already."""
    _, python = comfyui_python()
    report = tmp_path / "report.json"
    for arguments, expected in (
        (["-r", str(ROOT / "requirements.txt")], []),
        ([str(wheel)], [canonicalize_name(PROJECT["name"])]),
    ):
        command = [
            *(sys.executable, "-m", "pip", "--python", str(python), "--isolated", "install", "--quiet"),
            *("--dry-run", "--no-index", "--report", str(report), *arguments),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
        assert done.returncode == 0, done.stderr
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
        assert [canonicalize_name(entry["metadata"]["name"]) for entry in installs] == expected


def test_requirements_pin_nothing():
    """Installing the pack never changes a user's torch, numpy or transformers."""
    for requirement in REQUIREMENTS:
        assert {clause.operator for clause in requirement.specifier} <= {">="}, requirement


def test_the_manager_s_list_is_the_project_s_without_torch():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert listed == {str(r) for r in REQUIREMENTS if r.name != "torch"}


def test_what_is_imported_is_what_is_required():
    provided = packages_distributions()
    imported = {
        name.split(".")[0] for path in SOURCES for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    foreign = imported - sys.stdlib_module_names - HOST
    extras = [lines for extra, lines in PROJECT["optional-dependencies"].items() if extra != "test"]
    optional = {wanted.name: wanted.marker for lines in extras for wanted in map(Requirement, lines)}
    elsewhere = {name for name, marker in optional.items() if marker and not marker.evaluate()}
    required = {requirement.name for requirement in REQUIREMENTS}
    found = {provided[name][0].lower() for name in foreign - elsewhere}
    assert found == required | (optional.keys() - elsewhere)


def test_lance_core_needs_neither_comfyui_nor_transformers():
    code = (
        "import sys, lance_core.__main__\n"
        "foreign = {'comfy', 'comfy_api', 'folder_paths', 'nodes', 'server', 'transformers', 'torchvision', 'gguf'}\n"
        "print(sorted(foreign & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_pack_imports_nothing_that_comfyui_has_not():
    """So that the pack costs ComfyUI's start its own modules alone; benchmarks/import_time.py has the seconds."""
    comfyui, python = comfyui_python()
    benchmark = [str(python), str(ROOT / "benchmarks/import_time.py"), "--comfyui", str(comfyui), "--repeats", "1"]
    done = subprocess.run(benchmark, capture_output=True, text=True, check=True)
    assert "packages that only the pack imports: none" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_layers_know_only_what_is_below_them(path):
    text = path.read_text(encoding="utf-8")
    if "lance_core" in path.relative_to(ROOT).parts:
        hosts = "comfy|comfy_api|folder_paths|nodes|server|latent_preview"
        assert not re.search(rf"^\s*(from|import) ({hosts})\b", text, re.MULTILINE)
        outside = r"from \.\.\." if path.parent.name != "lance_core" else r"from \.\."
        assert not re.search(outside, text)
    else:
        assert not re.search(r"^\s*(from|import) (lance_core|nodes)\b", text, re.MULTILINE)  # relative imports only


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(local name, what it stands for) of every absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, alias.name
                if alias.asname is None:
                    yield (root := alias.name.split(".")[0]), root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def names(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of all that is imported, and of all that is used of imports and built-ins."""
    origin = {name: f"builtins.{name}" for name in dir(builtins)} | dict(imports(tree))
    yield from (full for _, full in imports(tree))
    for node in ast.walk(tree):
        tail = ""
        while isinstance(node, ast.Attribute):
            node, tail = node.value, f".{node.attr}{tail}"
        if isinstance(node, ast.Name):
            yield origin.get(node.id, "") + tail


def breaches(source: str) -> set[str]:
    """What in a Python source the registry does not want."""
    tree = ast.parse(source)

    def within(name: str, rules: set[str]) -> bool:
        return any(name == rule or name.startswith(f"{rule}.") for rule in rules)

    found = {name for name in names(tree) if within(name, FORBIDDEN) and not within(name, ALLOWED)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found |= set() if safe.get("weights_only") == "True" else {"torch.load"}
    return found


def test_no_shipped_file_breaks_the_registry_s_rules(archive):
    sources = [ROOT / name for name in archive if name.endswith(".py")]
    assert set(sources) == set(SOURCES)
    found = {str(path.relative_to(ROOT)): breaches(path.read_text(encoding="utf-8")) for path in sources}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "source, breach",
    [
        ("import subprocess", "subprocess"),
        ("from os import system as run\nrun('ls')", "os.system"),
        ("import os\nos.popen('ls')", "os.popen"),
        ("from urllib import request", "urllib.request"),
        ("def get():\n    import requests.sessions", "requests.sessions"),
        ("from aiohttp import ClientSession", "aiohttp.ClientSession"),
        ("import sys\nsys.path.insert(0, '.')", "sys.path"),
        ("eval('1')", "builtins.eval"),
        ("run = exec", "builtins.exec"),
        ("import pickle as p\np.load(open('x', 'rb'))", "pickle.load"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch\ntorch.load('x', weights_only=False)", "torch.load"),
    ],
)
def test_a_breach_is_found(source, breach):
    assert any(name == breach or name.startswith(f"{breach}.") for name in breaches(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "import torch\nmodel.eval()\ntorch.compile(model)\ntorch.load('x', weights_only=True)",
        "from aiohttp import web\nweb.json_response({})",
        "import pickle\npickle.UnpicklingError",
        "from urllib.parse import quote\nquote('x')",
        "import os\nos.path.join(code, site)",
    ],
)
def test_what_is_harmless_passes(source):
    assert not breaches(source)


def test_the_archive_has_what_the_editor_shows(archive):
    for language in ("en", "zh"):
        pages = {f"web/docs/{node}/{language}.md" for node in node_ids()}
        assert pages | {f"locales/{language}/nodeDefs.json"} <= set(archive)
    assert {"README.md", "LICENSE", "requirements.txt", "node_list.json"} <= set(archive)
    assert not {name.split("/")[0] for name in archive} & {"tests", "benchmarks", "docs", "scripts", ".ci"}


def test_the_registry_accepts_the_project():
    """The fields of docs.comfy.org/registry/specifications."""
    name, repository = PROJECT["name"], PROJECT["urls"]["Repository"]
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9])*", name) and len(name) < 100 and "comfy" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert PROJECT["description"] and COMFY["PublisherId"] and COMFY["DisplayName"] and "text" in PROJECT["license"]
    assert repository.startswith("https://github.com/")
    pictures = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    icon, banner = (Image.open(ROOT / COMFY[field].removeprefix(pictures)) for field in ("Icon", "Banner"))
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21


def test_workflows_and_blueprints_name_the_pack_as_the_registry_does():
    """The editor offers by `cnr_id` which pack to install where a node is missing."""
    ours = node_ids()
    for path in (*ROOT.glob("workflows/*.json"), *ROOT.glob("subgraphs/*.json")):
        graph = json.loads(path.read_text(encoding="utf-8"))
        inner = graph.get("definitions", {}).get("subgraphs", [])
        nodes = [node for part in (graph, *inner) for node in part["nodes"] if node["type"] in ours]
        assert {node["properties"]["cnr_id"] for node in nodes} == {PROJECT["name"]}, path.name


def test_comfyui_reads_the_project_as_it_is_meant():
    comfyui, python = comfyui_python()
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "from comfy_config.config_parser import extract_node_configuration\n"
        f"print(extract_node_configuration({str(ROOT)!r}).model_dump_json())"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd=comfyui)
    project, comfy = (json.loads(done.stdout)[part] for part in ("project", "tool_comfy"))
    assert project["name"] == PROJECT["name"] and project["version"] == PROJECT["version"]
    assert project["license"]["text"] == "Apache-2.0"
    assert project["urls"]["repository"] == PROJECT["urls"]["Repository"]
    assert project["supported_os"] == ["OS Independent"]
    assert project["supported_comfyui_version"] == COMFY["requires-comfyui"]
    assert comfy["publisher_id"] == COMFY["PublisherId"] and comfy["icon"] == COMFY["Icon"]
    assert comfy["web"] is None  # WEB_DIRECTORY says it; both would serve every script twice


def test_the_changelog_begins_with_this_version():
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading[1] == PROJECT["version"]


def node_ids() -> set[str]:
    schemas = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    return set(re.findall(r'node_id="(\w+)"', schemas))


def test_every_node_is_translated_and_explained():
    for language in ("en", "zh"):
        names = json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))
        assert set(names) == node_ids()
        assert {page.parent.name for page in (ROOT / "web/docs").glob(f"*/{language}.md")} == node_ids()
