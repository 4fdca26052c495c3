"""Lance on a MODEL wire: a patcher, so that ComfyUI decides what lies where, and the vision tower beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..lance_core.checkpoint import Lance, examine, parameter_shapes
from ..lance_core.config import LanceConfig, VisionConfig
from ..lance_core.errors import LanceError
from ..lance_core.layout import find_checkpoint
from ..lance_core.storage import Stored
from ..lance_core.transformer import LanceTransformer
from ..lance_core.vit import VisionTower
from .attention import attention
from .diffusion import LanceModel, LanceModelConfig, lance_of
from .guidance import attach_guidance
from .prefetch import prefetch_layers
from .quantized import LAYOUT, LAYOUTS, check_layout
from .sampling import attach_sampling
from .weights import read_decoder, read_weights, stored_layout

VISION = "lance_vision"  # the attachment's name
TEMPLATE_TOKENS = 256  # of the chat template, a system prompt and an ordinary prompt, for estimates
PATCHER = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
SUPPORTED_DTYPES = LanceModelConfig.supported_inference_dtypes
DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHT_DTYPES = (*DENSE, *LAYOUTS)  # the node's choices beside "default"


@dataclass(frozen=True)
class Precision:
    """How the decoder's weights lie in memory: the large layers' in a layout if there is one, the others in dtype."""

    dtype: torch.dtype
    layout: str | None = None


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
    shapes = parameter_shapes(LanceTransformer(config.text, device="meta"))
    precision = precision_of(weight_dtype, shapes, stored_layout(contents.language))
    weights = read_decoder(contents.language, shapes, precision.dtype, precision.layout)

    model = LanceModel(model_config(config, precision), config, tokenizer, comfy.model_management.unet_offload_device())
    patcher = patcher_of(model, disable_dynamic)
    if patcher.is_dynamic():
        prefetch_layers(model.diffusion_model.language_model.model)
    model.load_model_weights(weights, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_decoder, (path, weight_dtype))
    attach_sampling(patcher)
    attach_guidance(patcher)
    return patcher


def model_config(config: LanceConfig, precision: Precision) -> LanceModelConfig:
    """What core builds the decoder by: its sizes, its layers, and the dtype that it computes in."""
    out = LanceModelConfig({"text_config": config.text})
    out.quant_config = {LAYOUT: precision.layout} if precision.layout else None
    out.set_inference_dtype(precision.dtype, compute_type(None if precision.layout else precision.dtype))
    return out


def compute_type(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that core computes in with weights in dtype, None where it is the same; for None one of ours."""
    device = comfy.model_management.get_torch_device()
    return comfy.model_management.unet_manual_cast(dtype, device, SUPPORTED_DTYPES)


def precision_of(weight_dtype: str, shapes: Mapping[str, tuple[int, ...]], stored: str | None) -> Precision:
    """What one of the node's choices means for weights of these shapes.

    "default" is the layout in which they are stored or, for dense ones, what ComfyUI was started with.
    """
    if weight_dtype == "default" and stored:
        weight_dtype = stored
    elif weight_dtype == "default":
        device = comfy.model_management.get_torch_device()
        dtype = comfy.model_management.unet_dtype(device, sum(map(prod, shapes.values())), SUPPORTED_DTYPES)
        if dtype == torch.float8_e4m3fn:  # of --fp8_e4m3fn-unet: norms and embeddings would not survive it unscaled
            weight_dtype = "fp8"
        elif dtype.itemsize == 1:
            raise LanceError(
                f"ComfyUI is set to weights in {short_name(dtype)}, too coarse for Lance: start it with"
                " --fp8_e4m3fn-unet instead, or choose another weight_dtype."
            )
        else:
            return Precision(dtype)
    if weight_dtype in DENSE:
        return Precision(DENSE[weight_dtype])
    check_layout(weight_dtype)
    # Core keeps what is not quantised in the dtype that it computes in.
    return Precision(compute_type(None), weight_dtype)


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
