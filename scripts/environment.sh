#!/bin/sh
# environment.sh REQUIREMENT: installs it into .venv, which is made where there is none. PYTHON chooses the interpreter.
# Torch comes from constraints.txt; nothing else is pinned.
set -eu
cd "$(dirname "$0")/.."
[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$1"
