"""What a script in ComfyUI's own interpreter begins with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).parents[2]


def begin(comfyui: str, *flags: str) -> None:
    """Makes ComfyUI importable as its `main.py` does with these flags, on the CPU, and the pack as `lance`."""
    sys.argv = ["main.py", "--cpu", *flags]
    sys.path.insert(0, comfyui)
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.install_util")  # before anything else brings a module `utils`
    spec = importlib.util.spec_from_file_location("lance", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules["lance"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["lance"])
