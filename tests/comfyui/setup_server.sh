#!/usr/bin/env bash
# Makes a ComfyUI checkout able to run `main.py --cpu`, for the tests in this folder. Safe to run again.
#
#   COMFYUI_PATH     the checkout                    (default ~/comfy/ComfyUI)
#   COMFYUI_PYTHON   the interpreter to set up       (default $COMFYUI_PATH/../venv/bin/python, made when missing)
#   PYTHON           what makes that environment     (default python3)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
comfyui="${COMFYUI_PATH:-$HOME/comfy/ComfyUI}"
if [ ! -f "$comfyui/main.py" ]; then
    echo "No ComfyUI at $comfyui: clone https://github.com/comfyanonymous/ComfyUI to it, or set COMFYUI_PATH." >&2
    exit 1
fi
comfyui="$(cd "$comfyui" && pwd)"
venv="$(dirname "$comfyui")/venv"
python="${COMFYUI_PYTHON:-$venv/bin/python}"
if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    python="$venv/bin/python"
fi

# torch, torchvision and torchaudio are pinned together. The last two and what depends on them are installed without
# their dependencies, or pip would exchange torch for another build.
pins="$(mktemp)"
trap 'rm -f "$pins"' EXIT
printf 'torch==2.13.0\ntorchvision==0.28.0\ntorchaudio==2.11.0\n' > "$pins"
alone='^(torchvision|torchaudio|kornia|spandrel)([^a-z]|$)'
"$python" -m pip install --quiet -c "$pins" -r <(grep -vE "$alone" "$comfyui/requirements.txt") kornia_rs
"$python" -m pip install --quiet -c "$pins" --no-deps -r <(grep -E "$alone" "$comfyui/requirements.txt")

site="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
if ! "$python" -c 'import torchvision' 2>/dev/null; then
    cp "$here/torchvision_ops.py" "$site/_torchvision_ops.py"
    echo 'import _torchvision_ops' > "$site/_torchvision_ops.pth"
fi
if ! "$python" -c 'import torchaudio' 2>/dev/null; then
    mkdir -p "$site/torchaudio/lib.unused"
    find "$site/torchaudio/lib" -maxdepth 1 \( -name '*.so' -o -name '*.pyd' \) \
        -exec mv {} "$site/torchaudio/lib.unused/" \;
fi

"$python" -c 'import torch, torchvision, torchaudio, kornia, spandrel; print("torch", torch.__version__)'
echo "Ready: $python $comfyui/main.py --cpu"
