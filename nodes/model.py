"""Lance on a MODEL wire: a patcher, so that ComfyUI decides what lies where, and the vision tower beside it."""

from __future__ import annotations

import dataclasses

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from ..lance_core.checkpoint import Lance, load_parts
from ..lance_core.errors import LanceError
from ..lance_core.layout import find_checkpoint

VISION = "lance_vision"  # the attachment's name
TEMPLATE_TOKENS = 256  # of the chat template, a system prompt and an ordinary prompt, for estimates
PATCHER = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LanceHost(torch.nn.Module):
    """The decoder and what belongs to it, in the form that patchers and previews expect of a model."""

    def __init__(self, lance: Lance):
        super().__init__()
        self.diffusion_model = lance.transformer
        self.latent_format = comfy.latent_formats.Wan22()
        self.lance = dataclasses.replace(lance, vision=None, vae=None)

    @property
    def model_sampling(self):
        """What KSampler and its like ask a model for first."""
        raise LanceError("samplers cannot drive Lance yet: use Lance Generate or Lance Edit in the place of KSampler.")


def load_model(path: str, weight_dtype: str) -> comfy.model_patcher.ModelPatcher:
    """The patcher of a checkpoint, loaded to where ComfyUI keeps models that are not in use."""
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    if weight_dtype == "default":
        bf16 = comfy.model_management.should_use_bf16(device)
        dtype = torch.bfloat16 if bf16 and not comfy.model_management.is_device_cpu(device) else torch.float32
    else:
        dtype = WEIGHT_DTYPES[weight_dtype]
    lance = load_parts(
        find_checkpoint(path), device=offload_device, dtype=dtype, operations=comfy.ops.disable_weight_init, vae=False
    )
    model = PATCHER(LanceHost(lance), load_device=device, offload_device=offload_device)
    if lance.vision is not None:
        vision = PATCHER(lance.vision, load_device=device, offload_device=offload_device)
        model.set_attachments(VISION, vision)
    return model


def with_decoder(model: comfy.model_patcher.ModelPatcher, context: int, target: int = 0) -> Lance:
    """The model with its decoder on the device that computes, and room there for so many tokens of a request."""
    lance = lance_of(model)
    decoder = lance.transformer
    memory = decoder.context_memory(context) + decoder.working_memory(max(context, target))
    comfy.model_management.load_models_gpu([model], memory_required=memory)
    return dataclasses.replace(lance, device=model.load_device)


def with_vision(model: comfy.model_patcher.ModelPatcher) -> Lance:
    """The model with its vision tower on the device that computes; the decoder stays where it is."""
    lance = lance_of(model)
    vision = model.get_attachment(VISION)
    if vision is None:
        return lance
    comfy.model_management.load_models_gpu([vision])
    return dataclasses.replace(lance, vision=vision.model, device=vision.load_device)


def lance_of(model: comfy.model_patcher.ModelPatcher) -> Lance:
    host = model.model
    if not isinstance(host, LanceHost):
        raise LanceError("the model on this wire is not Lance: connect the MODEL of Load Lance.")
    return host.lance
