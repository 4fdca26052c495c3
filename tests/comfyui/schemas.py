"""What saved workflows rely on in a node: `python -m tests.comfyui.schemas` renews the snapshot and node_list.json."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .conftest import ROOT, make_tiny, server_in
from .server import PACK, find_comfyui

SNAPSHOT = ROOT / "tests/data/schemas.json"
NODE_LIST = ROOT / "node_list.json"
PROSE = {"tooltip", "placeholder", "display_name"}  # may change without a workflow noticing
USER_FILES = {"checkpoint", "lora_name"}  # inputs whose options and default are what lies in the user's folders

Schema = dict[str, Any]


def of_pack(object_info: dict[str, Schema]) -> dict[str, Schema]:
    return {id: node for id, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK}"}


def snapshot(object_info: dict[str, Schema]) -> dict[str, Schema]:
    """Inputs in order with type, kind and options, and outputs in order, of every node of the pack."""
    return {
        id: {
            "inputs": _inputs(node["input"]),
            "outputs": [list(output) for output in zip(node["output_name"], node["output"], strict=True)],
        }
        for id, node in sorted(of_pack(object_info).items())
    }


def node_list(object_info: dict[str, Schema]) -> dict[str, str]:
    """Node ids and descriptions: ComfyUI-Manager finds by them which pack a workflow lacks."""
    return {id: node["description"] for id, node in sorted(of_pack(object_info).items())}


def _inputs(kinds: dict[str, dict[str, list]]) -> list[Schema]:
    return [
        {"name": name, "type": type, "kind": kind, **_options(name, *options)}
        for kind in ("required", "optional")
        for name, (type, *options) in kinds.get(kind, {}).items()
    ]


def _options(name: str, options: Schema | None = None) -> Schema:
    kept = {key: value for key, value in (options or {}).items() if key not in PROSE}
    if name in USER_FILES:
        kept = {key: value for key, value in kept.items() if key not in ("options", "default")}
    if "options" in kept:
        kept["options"] = [_choice(choice) for choice in kept["options"]]
    return kept


def _choice(choice: str | Schema) -> str | Schema:
    """A combo's word, or a dynamic combo's word with the inputs that it brings."""
    return choice if isinstance(choice, str) else {"key": choice["key"], "inputs": _inputs(choice["inputs"])}


def write(path: Path, value: Schema) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    if (comfyui := find_comfyui()) is None:
        sys.exit("no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server_in(folder, comfyui, make_tiny(folder / "tiny")) as server:
            object_info = server.object_info()
    write(SNAPSHOT, snapshot(object_info))
    write(NODE_LIST, node_list(object_info))


if __name__ == "__main__":
    main()
