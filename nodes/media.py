"""IMAGE and VIDEO as the frames that `lance_core` takes."""

from __future__ import annotations

from comfy_api.latest import Input, io
from torch import Tensor

from ..lance_core.media import read_video, sample_indices
from ..lance_core.resize import RESOLUTION_CHOICES


def media_input(consequence: str) -> io.MultiType.Input:
    return io.MultiType.Input(
        "media",
        types=[io.Image, io.Video],
        display_name="image or video",
        tooltip=f"{consequence} A batch of images is one clip; a video is read at 12 frames per second, six seconds'"
        " worth of frames at most.",
    )


def resolution_input() -> io.Combo.Input:
    return io.Combo.Input(
        "resolution",
        options=list(RESOLUTION_CHOICES),
        tooltip="Detail against time and memory: the picture is cropped and scaled to the nearest size of this class."
        " Auto is 768 for pictures and 480p for clips, as the model was trained; native keeps the size.",
        advanced=True,
    )


def frames_of(media: Tensor | Input.Video) -> Tensor:
    """Frames `[F, H, W, 3]` of an IMAGE batch, transparency on white, or of a VIDEO, sampled as the model reads it."""
    if isinstance(media, Tensor):
        return on_white(media)
    source, trimmed = media.get_stream_source(), getattr(media, "get_active_trim_window", lambda: (0.0, 0.0))()
    if isinstance(source, str) and not any(trimmed):
        return read_video(source)  # decodes no more frames than it keeps
    components = media.get_components()
    indices = sample_indices(components.images.shape[0], float(components.frame_rate))
    return on_white(components.images[indices])


def on_white(images: Tensor) -> Tensor:
    if images.shape[-1] != 4:
        return images
    colour, alpha = images[..., :3], images[..., 3:]
    return colour * alpha + (1 - alpha)
