#!/bin/sh
# Makes an environment and runs all tests; arguments go to pytest. Tests of the server and the browser need ComfyUI
# (at COMFYUI_PATH or ~/comfy/ComfyUI) and Chromium, and say so where they are skipped.
set -eu
cd "$(dirname "$0")/.."
sh scripts/environment.sh ".[test]"
.venv/bin/python -m pytest tests "$@"
