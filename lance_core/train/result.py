"""What a run leaves in the end: a checkpoint in the release's layout, or a LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint import COMPUTE_TYPES, Lance
from ..saving import check_dense, check_replaceable, save_checkpoint
from ..transformer import LanceTransformer
from ..vit import VisionTower
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL, LORA = "model", "lora.safetensors"  # in the run's folder


def check_savable(config: TrainConfig, lance: Lance) -> None:
    """Raises LanceError, before a long run, where its result could not be written."""
    if config.train.method == "full":
        check_dense(lance)
        check_replaceable(config.output / MODEL, overwrite=True)


def write_result(config: TrainConfig, lance: Lance, accelerator: Accelerator) -> Path:
    """Writes the model, or its LoRA, as it is now, by one process, and returns the path."""
    if config.train.method == "lora":
        from .lora import lora_tensors, save_lora

        path = config.output / LORA
        tensors = whole(lora_tensors(lance.transformer), accelerator)
        if accelerator.is_main_process:
            save_lora(path, tensors, config.lora, lance.config.text, step=config.train.steps)
    else:
        path = config.output / MODEL
        complete = gathered(lance, accelerator) if config.train.shard else lance
        if accelerator.is_main_process:
            save_checkpoint(
                path,
                complete,
                lance.tokenizer.specification,
                dtype=COMPUTE_TYPES[config.save.dtype],
                overwrite=True,
            )
    accelerator.wait_for_everyone()
    return path


def gathered(lance: Lance, accelerator: Accelerator) -> Lance:
    """The model with whole weights, on the CPU of one process; on the others they are left out."""
    transformer = LanceTransformer(lance.config.text, dtype=torch.float32, device="meta")
    vision = VisionTower(lance.config.vision, dtype=torch.float32, device="meta")
    for module, sharded in ((transformer, lance.transformer), (vision, lance.vision)):
        fill(module, whole(dict(sharded.named_parameters()), accelerator))
    return replace(lance, transformer=transformer, vision=vision)


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    if tensors:
        module.load_state_dict(tensors, assign=True)


def whole(tensors: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Tensors of which each process may have a share, whole on the CPU of one process; on the others none."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if accelerator.is_main_process:
            found[name] = full.cpu()
    return found
