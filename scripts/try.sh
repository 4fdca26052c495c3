#!/bin/sh
# Makes an environment, installs Lance and runs two workflows with its built-in model, which knows coloured shapes:
# "understand then edit" to a PNG and an answer on the screen, and "text to video" to an MP4. Nothing is downloaded but
# Python packages.
set -eu
cd "$(dirname "$0")/.."
sh scripts/environment.sh .

for workflow in understand_then_edit text_to_video; do
    .venv/bin/python -m lance_core run "workflows/api/$workflow.json" --output output
done
