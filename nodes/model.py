"""Lance on a MODEL wire: a patcher, so that ComfyUI decides what lies where, and the vision tower beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import prod

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..lance_core.checkpoint import Lance, examine
from ..lance_core.config import VisionConfig
from ..lance_core.layout import find_checkpoint
from ..lance_core.storage import Stored
from ..lance_core.vit import VisionTower
from .attention import attention
from .diffusion import LanceModel, LanceModelConfig, lance_of
from .guidance import attach_guidance
from .sampling import attach_sampling
from .weights import read_weights

VISION = "lance_vision"  # the attachment's name
TEMPLATE_TOKENS = 256  # of the chat template, a system prompt and an ordinary prompt, for estimates
PATCHER = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
SUPPORTED_DTYPES = LanceModelConfig.supported_inference_dtypes
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(path: str, weight_dtype: str) -> ModelPatcher:
    """The patcher of a checkpoint, with its vision tower attached where it has one.

    Raises LanceError for whatever is missing, damaged or of the wrong shape.
    """
    patcher = load_decoder(path, weight_dtype)
    config, contents, _ = examine(find_checkpoint(path))
    if contents.vision:
        vision = load_vision(config.vision, contents.vision, patcher.model.get_dtype())
        patcher.set_attachments(VISION, vision)
    return patcher


def load_decoder(path: str, weight_dtype: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The patcher without the vision tower; core calls this for copies, which keep the attachment of the original.

    disable_dynamic: core asks for it where a feature needs weights that are loaded as a whole.
    """
    config, contents, tokenizer = examine(find_checkpoint(path))
    dtype = weight_type(weight_dtype, sum(prod(stored.shape) for stored in contents.language.values()))
    management = comfy.model_management
    cast = management.unet_manual_cast(dtype, management.get_torch_device(), SUPPORTED_DTYPES)

    model_config = LanceModelConfig({"text_config": config.text})
    model_config.set_inference_dtype(dtype, cast)
    model = LanceModel(model_config, config, tokenizer, device=management.unet_offload_device())
    patcher = patcher_of(model, disable_dynamic)
    model.load_model_weights(read_weights(contents.language), assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_decoder, (path, weight_dtype))
    attach_sampling(patcher)
    attach_guidance(patcher)
    return patcher


def weight_type(weight_dtype: str, parameters: int) -> torch.dtype:
    """The dtype of so many weights for one of the node's choices; core's for "default"."""
    if weight_dtype == "default":
        device = comfy.model_management.get_torch_device()
        return comfy.model_management.unet_dtype(device, parameters, SUPPORTED_DTYPES)
    return WEIGHT_DTYPES[weight_dtype]


def load_vision(config: VisionConfig, stored: Mapping[str, Stored], dtype: torch.dtype) -> ModelPatcher:
    """The patcher of the vision tower, whose layers cast their weights to what they are given."""
    offload_device = comfy.model_management.unet_offload_device()
    layers = {"operations": comfy.ops.manual_cast, "dtype": dtype, "device": offload_device}
    vision = VisionTower(config, attention=attention, **layers).requires_grad_(False).eval()
    comfy.model_management.archive_model_dtypes(vision)
    patcher = patcher_of(vision)
    vision.load_state_dict(read_weights(stored), assign=patcher.is_dynamic())
    return patcher


def patcher_of(model: torch.nn.Module, disable_dynamic: bool = False) -> ModelPatcher:
    management = comfy.model_management
    devices = {"load_device": management.get_torch_device(), "offload_device": management.unet_offload_device()}
    return (ModelPatcher if disable_dynamic else PATCHER)(model, **devices)


def with_decoder(model: ModelPatcher, context: int) -> Lance:
    """The model with its decoder on the device that computes, and room there for a context of so many tokens."""
    host = lance_of(model)
    decoder, dtype = host.diffusion_model, host.get_dtype_inference()
    memory = decoder.context_memory(context, dtype) + decoder.working_memory(context, dtype)
    comfy.model_management.load_models_gpu([model], memory_required=memory)
    return host.lance(model.load_device)


def with_vision(model: ModelPatcher, frames: Tensor) -> Lance:
    """The model with its vision tower on the device that computes, and room there to look at frames `[F, H, W, 3]`.

    The decoder stays where it is.
    """
    host, vision = lance_of(model), model.get_attachment(VISION)
    lance = host.lance(model.load_device)
    if vision is None:
        return lance
    memory = vision.model.working_memory(*frames.shape[:3], lance.dtype)
    comfy.model_management.load_models_gpu([vision], memory_required=memory)
    return dataclasses.replace(lance, vision=vision.model)
