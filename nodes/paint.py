"""Painting: pictures and clips from words, from a first frame, and from other pictures by an instruction."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..lance_core import flow, stages
from ..lance_core.config import LATENT_CHANNELS, SPATIAL_COMPRESSION
from ..lance_core.errors import LanceError
from ..lance_core.flow import Sampling
from ..lance_core.request import Request
from ..lance_core.resize import OFFICIAL_RATIOS, RATIOS, official_size, size_of
from ..lance_core.sequence import Grid
from .conditioning import conditioning, request_of_nodes, task_input
from .diffusion import lance_of
from .encode import Semantic
from .report import warnings_logged
from .sigmas import shift_input, steps_input

OFFICIAL_SIZES = {"image_768res": "1:1", "image_512res": "1:1", "video_480p": "16:9", "video_360p": "16:9"}
MAX_PIXELS_WIDE = 1536  # beyond 1024 positions repeat; the largest official width is 1152
MAX_BATCH = 64


def size_input() -> io.DynamicCombo.Input:
    """The checkpoint's own size, or one by an official bucket, by shape and area, or in pixels."""

    def ratio(options: tuple[str, ...], default: str) -> io.Combo.Input:
        return io.Combo.Input(
            "aspect_ratio", options=list(options), default=default, tooltip="The shape: width to height."
        )

    def side(name: str, high: int) -> io.Int.Input:
        return io.Int.Input(
            name,
            default=768,
            min=SPATIAL_COMPRESSION,
            max=high,
            step=SPATIAL_COMPRESSION,
            tooltip="Larger is slower, clips with its square. Pixels, a multiple of 16.",
        )

    area = io.Float.Input(
        "megapixels",
        default=0.6,
        min=0.06,
        max=1.6,
        step=0.01,
        tooltip="Larger is slower, clips with its square. Million pixels: 0.59 is 768x768, 0.41 is 848x480.",
    )
    official = [
        io.DynamicCombo.Option(name, [ratio(OFFICIAL_RATIOS, default)]) for name, default in OFFICIAL_SIZES.items()
    ]
    return io.DynamicCombo.Input(
        "size",
        options=[
            io.DynamicCombo.Option("auto", []),
            *official,
            io.DynamicCombo.Option("megapixels", [ratio(RATIOS, "1:1"), area]),
            io.DynamicCombo.Option("custom", [side("width", MAX_PIXELS_WIDE), side("height", 1024)]),
        ],
        tooltip="Sizes that the model was trained on give the best results. Auto takes them from the checkpoint:"
        " 768x768 for pictures and 848x480 for clips of Lance_3B, 48x48 for nano.",
    )


def pixels_of(size: dict | None) -> tuple[int | None, int | None]:
    """Width and height of what the size widget holds, None for the checkpoint's own.

    Raises LanceError where core has found nothing in it that it knows.
    """
    if size is None:
        raise LanceError("the size is missing or unknown, as in a workflow of another version: choose one on the node.")
    match size["size"]:
        case "auto":
            return None, None
        case "custom":
            return size["width"], size["height"]
        case "megapixels":
            return size_of(size["aspect_ratio"], size["megapixels"])
        case name:
            return official_size(name, size["aspect_ratio"])


def sampling_inputs() -> list[io.Input]:
    """The widgets that painting nodes share, with the official defaults."""
    return [
        io.Int.Input(
            "seed",
            default=stages.SEED,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Another seed gives another picture; the same one gives the same again.",
        ),
        steps_input(),
        io.Float.Input(
            "guidance",
            default=Sampling.guidance,
            min=1.0,
            max=20.0,
            step=0.1,
            tooltip="Higher follows the words more closely, too high looks burnt; 1 is off and takes half the time.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=MAX_BATCH,
            tooltip="Paints several variants at once, which takes as many times longer.",
            advanced=True,
        ),
        shift_input(advanced=True),
    ]


def paint(
    model: ModelPatcher,
    request: Request,
    target: Grid,
    *,
    seed: int,
    steps: int,
    guidance: float,
    batch_size: int,
    shift: float,
    first_frame: Tensor | None = None,
) -> dict:
    """The LATENT `[B, 48, T, h, w]` of a request, by core's sampler with Euler steps along the official times.

    first_frame: a raw latent `[1 or B, 48, 1, h, w]` with which the clip begins, and which stays exactly as it is.
    """
    lance_of(model)
    latent = torch.zeros(batch_size, LATENT_CHANNELS, *target, device=comfy.model_management.intermediate_device())
    mask = None
    if first_frame is not None:
        stages.check_first_batch(first_frame, batch_size)
        latent[:, :, :1] = first_frame
        mask = torch.ones(1, 1, *target)
        mask[:, :, 0] = 0
    sampling = Sampling(steps, guidance, shift)
    samples = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, seed),
        sampling.guidance,
        comfy.samplers.ksampler("euler"),
        flow.schedule(sampling.steps, sampling.shift),
        conditioning(request),
        conditioning(request.against()),
        latent,
        noise_mask=mask,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {"samples": samples}


class LanceGenerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceGenerate",
            display_name="Lance Generate",
            category="Lance",
            description="Paints a picture or a clip from words, or a clip that begins with a picture.",
            search_aliases=["lance text to image", "lance text to video", "image to video", "t2i", "t2v", "i2v"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="A red fox in the snow, golden hour",
                    tooltip="What is to be seen. Whole sentences with colours, places and, for clips, motion do best.",
                ),
                size_input(),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=stages.MAX_FRAMES,
                    step=4,
                    tooltip="1 paints a picture, more a clip at 12 frames per second: 49 are four seconds, 121 ten.",
                ),
                *sampling_inputs(),
                io.Latent.Input(
                    "first_frame",
                    optional=True,
                    tooltip="The clip begins with exactly this picture and has its size. From Encode Latent.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, model, prompt: str, frames: int, size: dict | None = None, first_frame: dict | None = None, **sampling
    ) -> io.NodeOutput:
        first = None if first_frame is None else first_frame["samples"]
        with warnings_logged():
            own = lance_of(model).config.resolutions
            target = stages.generation_grid(own, *pixels_of(size), frames, first)
            return io.NodeOutput(paint(model, Request("generate", prompt), target, first_frame=first, **sampling))


class LanceEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceEdit",
            display_name="Lance Edit",
            category="Lance",
            description="Changes a picture or clip by an instruction, or paints its subject anew. Connect both"
            " encodings of the same picture.",
            search_aliases=["lance image edit", "lance video edit", "instruct edit", "reference image", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance."),
                Semantic.Input("semantic", tooltip="What the picture shows, from Encode Semantic."),
                io.Latent.Input("latent", tooltip="What the same picture looks like, from Encode Latent."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="Make it winter, keep the fox",
                    tooltip="What is to change, and what is to stay.",
                ),
                task_input(),
                *sampling_inputs(),
                Semantic.Input(
                    "semantic_2",
                    optional=True,
                    tooltip="A second reference, which the instruction may mention. The result has its size.",
                ),
                io.Latent.Input("latent_2", optional=True, tooltip="What the second reference looks like."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, model, semantic, latent: dict, instruction: str, task: str, semantic_2=None, latent_2=None, **sampling
    ) -> io.NodeOutput:
        with warnings_logged():
            request = request_of_nodes(task, instruction, [semantic, semantic_2], [latent, latent_2])
            return io.NodeOutput(paint(model, request, request.latents[-1].shape[2:], **sampling))
