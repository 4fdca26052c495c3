"""Load LoRA (Lance): from a file of models/loras to a MODEL with its changes."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..lance_core.checkpoint import parameter_shapes
from ..lance_core.errors import LanceError
from ..lance_core.lora import Lora, convert_lora, module_weights, read_config
from .diffusion import lance_of

FOLDER = "loras"


def read_lora(path: str, shapes: dict[str, tuple[int, ...]]) -> Lora:
    """The LoRA of a file under the names that ComfyUI maps to a decoder with parameters of these shapes."""
    name = Path(path).name
    try:
        content, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # each format has its own; torch's text for a damaged file advises to load it unsafely
        raise LanceError(f"LoRA {name} is damaged or no file of tensors: download or save it again.") from error
    return convert_lora(tensors, module_weights(shapes), read_config(path, tensors, metadata), name)


class LanceLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceLora",
            display_name="Load LoRA (Lance)",
            category="Lance",
            description="Changes Lance by a LoRA, for pictures, clips or answers, whichever expert it was trained on."
            " Reads the files of PEFT, diffusers, kohya, OneTrainer, LyCORIS and ai-toolkit.",
            search_aliases=["lance lora", "lora", "load lora", "lora loader", "peft", "lokr", "dora", "lycoris"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="What is changed: the MODEL of Load Lance. The wire itself stays as it"
                    " was, so the plain model can be used beside the changed one.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="Decides the style or skill that is added. Files of models/loras are listed; only those"
                    " trained on Lance fit.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How far the model is changed: 1 as trained, less is weaker, 0 not at all, negative the"
                    " other way.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        lance_of(model)
        if strength == 0:
            return io.NodeOutput(model)
        path = folder_paths.get_full_path_or_raise(FOLDER, lora_name)
        lora = read_lora(path, parameter_shapes(model.model.diffusion_model))
        if lora.unmatched:
            logging.warning(
                "LoRA %s: %d tensors are left out, because Lance has no such weight, e.g. %s",
                lora_name,
                len(lora.unmatched),
                lora.unmatched[0],
            )
        changed, _ = comfy.sd.load_lora_for_models(model, None, lora.tensors, strength, 0)
        return io.NodeOutput(changed)
