"""Looking at pictures and clips: once for meaning, once for appearance."""

from __future__ import annotations

from comfy_api.latest import Input, io
from torch import Tensor

from ..lance_core import stages
from ..lance_core.config import TEMPORAL_COMPRESSION
from ..lance_core.errors import LanceError
from ..lance_core.resize import resolution_of
from .diffusion import lance_of
from .media import frames_of, media_input, resolution_input
from .model import with_vision
from .report import warnings_logged
from .vae import encode, require_vae, resolutions_of

Semantic = io.Custom("LANCE_SEMANTIC")


class EncodeSemantic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EncodeSemantic",
            display_name="Encode Semantic (Lance)",
            category="Lance",
            description="What a picture or clip shows, for Lance to answer questions about and to edit by.",
            search_aliases=["lance vision", "look at image", "vision encode", "clip vision"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance; its vision tower looks at the picture."),
                media_input("Lance sees this and nothing else."),
                resolution_input(),
            ],
            outputs=[Semantic.Output(display_name="semantic")],
        )

    @classmethod
    def execute(cls, model, media: Tensor | Input.Video, resolution: str) -> io.NodeOutput:
        with warnings_logged():
            config = lance_of(model).config
            frames = stages.semantic_frames(config, frames_of(media), resolution_of(resolution))
            semantic = stages.encode_semantic(with_vision(model, frames), frames, resolution=None)
        return io.NodeOutput(semantic)


class EncodeLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EncodeLatent",
            display_name="Encode Latent (Lance)",
            category="Lance",
            description="What a picture or clip looks like, for Lance to edit, or to begin a clip with. As VAE Encode,"
            " after scaling to a size that the model knows.",
            search_aliases=["lance vae encode", "reference latent", "image to latent"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of Load Lance, or Wan 2.2's from Load VAE."),
                media_input("The result keeps what this looks like."),
                resolution_input(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, vae, media: Tensor | Input.Video, resolution: str) -> io.NodeOutput:
        require_vae(vae)
        if isinstance(media, Tensor) and 1 < len(media) <= TEMPORAL_COMPRESSION:
            raise LanceError(
                f"{len(media)} images are one clip here, of which the first alone would be left:"
                f" give one picture, or {TEMPORAL_COMPRESSION + 1} frames or more."
            )
        with warnings_logged():
            frames = stages.latent_frames(resolutions_of(vae), frames_of(media), resolution_of(resolution))
        return io.NodeOutput({"samples": encode(vae, frames)})
