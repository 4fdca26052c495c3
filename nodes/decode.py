"""From a latent to pictures and clips."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import Input, InputImpl, Types, io

from ..lance_core.config import VIDEO_FPS
from ..lance_core.stages import check_latent
from .media import sound_for
from .report import warnings_logged
from .vae import decode, require_vae


class DecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DecodeVideo",
            display_name="Decode Video (Lance)",
            category="Lance",
            description="Turns a latent into pictures, and into a clip that Save Video takes. A picture is one frame."
            " A batch gives all its pictures in one IMAGE, clip after clip, and each clip as a VIDEO of its own.",
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
                io.Video.Input(
                    "source",
                    optional=True,
                    tooltip="The clip gets the sound of this one, the video that was edited, where both have as many"
                    " frames and last as long; otherwise it is silent, and the log says why.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="All frames; of a batch, clip after clip."),
                io.Video.Output(is_output_list=True, tooltip="The clip; of a batch, one each."),
            ],
        )

    @classmethod
    def execute(cls, vae, latent: dict, fps: float, source: Input.Video | None = None) -> io.NodeOutput:
        samples = latent["samples"]
        check_latent("the latent", samples)
        clips = decode(require_vae(vae), samples)  # [B, F, H, W, 3]
        with warnings_logged():
            sound = None if source is None else sound_for(source, clips.shape[1], fps)
        rate = Fraction(fps).limit_denominator(1000)
        videos = [Types.VideoComponents(images=clip, audio=sound, frame_rate=rate) for clip in clips]
        return io.NodeOutput(clips.flatten(0, 1), [InputImpl.VideoFromComponents(video) for video in videos])
