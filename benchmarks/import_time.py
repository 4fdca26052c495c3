"""What importing the pack adds to ComfyUI's start: run it with ComfyUI's own interpreter.

Every measurement is a fresh process that first imports what `main.py` imports before it loads custom nodes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PACK = "lance_pack"
MARK = "lance-pack-begins"

START = f"""
import importlib.util, json, sys, time
sys.path.insert(0, "")
begin = time.perf_counter()
import comfy.options
comfy.options.enable_args_parsing()
import execution, server, nodes
host = time.perf_counter() - begin
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("{PACK}", {str(ROOT / "__init__.py")!r})
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
print("{MARK}", file=sys.stderr, flush=True)
begin = time.perf_counter()
spec.loader.exec_module(module)
pack = time.perf_counter() - begin
foreign = sorted({{name.split(".")[0] for name in sys.modules.keys() - before}} - {{"{PACK}"}})
print(json.dumps({{"host": host, "pack": pack, "foreign": foreign}}))
"""


def start(comfyui: Path, *options: str) -> tuple[dict, str]:
    """One start: seconds of ComfyUI's imports and of the pack's, with top-level modules new to it; and stderr."""
    command = [sys.executable, *options, "-c", START, "--cpu"]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def costs(importtime: str) -> list[tuple[float, str]]:
    """Milliseconds that each module took by itself, greatest first, from what `-X importtime` wrote after the mark."""
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", importtime.split(MARK)[-1])
    return sorted(((int(micro) / 1e3, name) for micro, name in rows), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    start(arguments.comfyui)  # compiles to bytecode
    runs = [start(arguments.comfyui)[0] for _ in range(arguments.repeats)]
    print(f"ComfyUI's imports   {median(run['host'] for run in runs):7.3f} s")
    print(f"this pack's beyond  {median(run['pack'] for run in runs):7.3f} s (median of {arguments.repeats})")
    print(f"packages that only the pack imports: {', '.join(runs[0]['foreign']) or 'none'}")
    for milliseconds, name in costs(start(arguments.comfyui, "-X", "importtime")[1])[:8]:
        print(f"  {milliseconds:5.1f} ms  {name}")


if __name__ == "__main__":
    main()
