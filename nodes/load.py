"""Load Lance: from a folder of models/lance, or from this pack, to MODEL and VAE."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..lance_core.errors import LanceError
from ..lance_core.layout import BUILT_IN_CHOICE, BUILT_IN_FOLDER, find_checkpoint, list_checkpoints
from .model import WEIGHT_DTYPES, load_model
from .vae import load_lance_vae, require_vae, shared_vae

FOLDER = "lance"
VAE_SLOT = 1  # of the node's outputs
DOWNLOAD = "hf download bytedance-research/Lance --local-dir"


def register_folder() -> None:
    """Makes models/lance a folder that ComfyUI knows, beside what extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def checkpoints() -> dict[str, Path]:
    """Names that the node offers, and where they lie: the built-in model, and all of `downloaded`."""
    return {BUILT_IN_CHOICE: BUILT_IN_FOLDER, **downloaded()}


def downloaded() -> dict[str, Path]:
    """The checkpoints of models/lance by name; the first folder that has a name wins."""
    found: dict[str, Path] = {}
    for folder in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for name in list_checkpoints(folder):
            found.setdefault(name, folder / name)
    return dict(sorted(found.items()))


def find(checkpoint: str) -> Path:
    """Where the checkpoint of a name lies; LanceError with the names there are, and how to get it, for others."""
    known = checkpoints()
    if checkpoint in known:
        return known[checkpoint]
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    raise LanceError(
        f"no checkpoint '{checkpoint}' in {folder} (known: {', '.join(known)}); choose one of the list, or download it"
        f" with: {DOWNLOAD} {folder}"
    )


class LoadLance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadLance",
            display_name="Load Lance",
            category="Lance",
            description="Loads a Lance checkpoint from models/lance, or the toy that comes with this pack: one model"
            " that understands, generates and edits.",
            search_aliases=["lance", "bytedance lance", "lance loader", "lance checkpoint"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=list(checkpoints()),
                    default=next(iter(downloaded()), BUILT_IN_CHOICE),
                    tooltip="Decides what the model is good at: Lance_3B for pictures, Lance_3B_Video for clips (and"
                    " pictures). Folders and single files of models/lance are listed. Nano is a toy that knows coloured"
                    " shapes in 48 x 48 pixels and nothing else, for trying out graphs at once; for real pictures"
                    " download Lance_3B.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", *WEIGHT_DTYPES],
                    tooltip="Memory against exactness: fp32 needs 25 GB, bf16 (as released) 12 GB, int8 and fp8 7 GB,"
                    " w4a8 4.4 GB. int8 rounds weights by 1 %, fp8 by 3 %, w4a8 (four bits) by 7 %. Default keeps"
                    " quantised files as they are; others it loads in bf16 where the GPU knows it, otherwise in fp32.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        if checkpoint is None:  # it comes by a wire, and is not known yet
            return True
        try:
            find(checkpoint)
        except LanceError as error:
            return f"Load Lance: {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weight_dtype: str) -> tuple:
        """Another one when a file of the checkpoint comes, goes or changes."""
        files = find_checkpoint(find(checkpoint))
        paths = [*vars(files).values(), files.tokenizer / "tokenizer.json", shared_vae()]
        there = [path for path in paths if isinstance(path, Path) and path.is_file()]
        return tuple((str(path), path.stat().st_mtime_ns) for path in there)

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        path = str(find(checkpoint))
        vae = load_lance_vae(path)
        wire = [cls.hidden.unique_id, VAE_SLOT]
        if any(wire in node["inputs"].values() for node in cls.hidden.prompt.values()):
            require_vae(vae)  # now, and not after the sampling
        return io.NodeOutput(load_model(path, weight_dtype), vae)
