"""Painting: pictures and clips from words, from a first frame, and from other pictures by an instruction."""

from __future__ import annotations

from comfy_api.latest import io

from ..lance_core import stages
from ..lance_core.config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ..lance_core.flow import RENORMS, Sampling
from .encode import Semantic
from .model import TEMPLATE_TOKENS, with_decoder
from .report import step_callback, warnings_logged

MAX_PIXELS_WIDE = 1536  # beyond 1024 positions repeat; the largest official width is 1152


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
        io.Int.Input(
            "steps", default=Sampling.steps, min=1, max=200, tooltip="More steps are slower and a little cleaner."
        ),
        io.Float.Input(
            "guidance",
            default=Sampling.guidance,
            min=1.0,
            max=20.0,
            step=0.1,
            tooltip="Higher follows the words more closely, too high looks burnt; 1 is off and takes half the time.",
        ),
        io.Float.Input(
            "shift",
            default=Sampling.shift,
            min=0.1,
            max=20.0,
            step=0.1,
            tooltip="Higher spends more steps on the composition, lower on the detail.",
            advanced=True,
        ),
        io.Float.Input(
            "guidance_start",
            default=Sampling.interval[0],
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Lower guides longer and slower: below this time (1 is noise, 0 the picture) guidance is off.",
            advanced=True,
        ),
        io.Float.Input(
            "guidance_end",
            default=Sampling.interval[1],
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Lower leaves the first, noisiest steps unguided: above this time guidance is off.",
            advanced=True,
        ),
        io.Combo.Input(
            "renorm",
            options=list(RENORMS),
            default=Sampling.renorm,
            tooltip="Keeps strong guidance from burning the picture: over the whole of it, per token, or not at all.",
            advanced=True,
        ),
        io.Float.Input(
            "renorm_min",
            default=Sampling.renorm_min,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Higher lets guidance keep more of its strength; 1 switches the correction off.",
            advanced=True,
        ),
    ]


def tokens(width: int, height: int, frames: int) -> int:
    """Of a target in pixels, nearly: for estimates."""
    return (frames // TEMPORAL_COMPRESSION + 1) * (width // SPATIAL_COMPRESSION) * (height // SPATIAL_COMPRESSION)


def sampling_options(model, values: dict) -> dict:
    """The stages' options from the widgets' values."""
    interval = (values.pop("guidance_start"), values.pop("guidance_end"))
    return {**values, "guidance_interval": interval, "on_step": step_callback(model, values["steps"])}


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
                io.Int.Input(
                    "width",
                    default=768,
                    min=SPATIAL_COMPRESSION,
                    max=MAX_PIXELS_WIDE,
                    step=SPATIAL_COMPRESSION,
                    tooltip="Larger is slower, clips with its square; the model likes 768 for pictures, 848 for clips.",
                ),
                io.Int.Input(
                    "height",
                    default=768,
                    min=SPATIAL_COMPRESSION,
                    max=1024,
                    step=SPATIAL_COMPRESSION,
                    tooltip="Larger is slower, clips with its square; the model likes 768 for pictures, 480 for clips.",
                ),
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
        cls, model, prompt: str, width: int, height: int, frames: int, first_frame: dict | None = None, **sampling
    ) -> io.NodeOutput:
        with warnings_logged():
            samples = stages.generate(
                with_decoder(model, TEMPLATE_TOKENS, tokens(width, height, frames)),
                prompt,
                width=width,
                height=height,
                frames=frames,
                first_frame=None if first_frame is None else first_frame["samples"],
                **sampling_options(model, sampling),
            )
        return io.NodeOutput({"samples": samples})


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
                io.Combo.Input(
                    "task",
                    options=["edit", "idip"],
                    tooltip="Edit changes the picture itself; idip (identity) paints its subject in a new scene.",
                    advanced=True,
                ),
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
        semantics = [s for s in (semantic, semantic_2) if s is not None]
        latents = [x["samples"] for x in (latent, latent_2) if x is not None]
        clean = [x[0, 0].numel() for x in latents]
        context = TEMPLATE_TOKENS + sum(clean) + sum(len(s.embeddings) for s in semantics)
        with warnings_logged():
            samples = stages.edit(
                with_decoder(model, context, clean[-1]),
                semantics,
                latents,
                instruction,
                task=task,
                **sampling_options(model, sampling),
            )
        return io.NodeOutput({"samples": samples})
