"""From a latent to pictures and a clip."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import InputImpl, Types, io

from ..lance_core.config import VIDEO_FPS
from ..lance_core.stages import check_latent
from .vae import require_vae


class DecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DecodeVideo",
            display_name="Decode Video (Lance)",
            category="Lance",
            description="Turns a latent into pictures, and into a clip that Save Video takes. A picture is one frame.",
            search_aliases=["lance vae decode", "latent to video", "latent to image"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of Load Lance, or Wan 2.2's from Load VAE."),
                io.Latent.Input("latent", tooltip="From Lance Generate, Lance Edit or a sampler."),
                io.Float.Input(
                    "fps",
                    default=float(VIDEO_FPS),
                    min=1.0,
                    max=120.0,
                    step=0.01,
                    tooltip="Speed of the clip; 12 frames per second is the speed at which Lance thinks of motion.",
                    advanced=True,
                ),
            ],
            outputs=[io.Image.Output(), io.Video.Output()],
        )

    @classmethod
    def execute(cls, vae, latent: dict, fps: float) -> io.NodeOutput:
        samples = latent["samples"]
        check_latent("the latent", samples)
        images = require_vae(vae).decode(samples)  # [B, F, H, W, 3]
        images = images.flatten(0, -4)
        components = Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(fps).limit_denominator(1000))
        return io.NodeOutput(images, InputImpl.VideoFromComponents(components))
