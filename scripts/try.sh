#!/bin/sh
# Makes an environment, installs Lance, makes a small random checkpoint and runs two workflows with it:
# "understand then edit" to a PNG and an answer on the screen, and "text to video" to an MP4.
set -eu
cd "$(dirname "$0")/.."
sh scripts/environment.sh .

# The small checkpoint has random weights: it shows that everything runs, not what Lance can do.
python=.venv/bin/python
[ -d models/lance/tiny ] || $python -m lance_core make-tiny models/lance/tiny

run() {
    workflow=$1
    shift
    $python -m lance_core run "workflows/api/$workflow.json" --output output --set LoadLance.checkpoint=tiny "$@"
}
run understand_then_edit --set EncodeSemantic.resolution=image_256res --set EncodeLatent.resolution=image_256res \
    --set LanceEdit.steps=8
run text_to_video --set LanceGenerate.size=custom --set LanceGenerate.size.width=128 \
    --set LanceGenerate.size.height=80 --set LanceGenerate.frames=17 --set LanceGenerate.steps=8
