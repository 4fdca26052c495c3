"""IMAGE and VIDEO as the frames that `lance_core` takes, and the sound of a VIDEO."""

from __future__ import annotations

import av
import numpy as np
import torch
from comfy_api.latest import Input, InputImpl, io
from torch import Tensor

from ..lance_core.checks import warn
from ..lance_core.errors import LanceError
from ..lance_core.media import read_video, sample_indices
from ..lance_core.resize import RESOLUTION_CHOICES

SOUND_DRIFT = 0.5  # seconds; a clip is up to 0.3 shorter than its source, since it has 4k+1 frames


def media_input(consequence: str) -> io.MultiType.Input:
    return io.MultiType.Input(
        "media",
        types=[io.Image, io.Video],
        display_name="image or video",
        tooltip=f"{consequence} A batch of images is one clip; a video is read at 12 frames per second, evenly"
        " thinned out where it is longer than six seconds.",
    )


def resolution_input() -> io.Combo.Input:
    return io.Combo.Input(
        "resolution",
        options=list(RESOLUTION_CHOICES),
        tooltip="Detail against time and memory: the picture is cropped and scaled to the nearest size of this class."
        " Auto is what the model was trained with (Lance_3B: 768 for pictures, 480p for clips); native keeps the"
        " size.",
        advanced=True,
    )


def frames_of(media: Tensor | Input.Video) -> Tensor:
    """Frames `[F, H, W, 3]` of an IMAGE batch, transparency on white, or of a VIDEO, sampled as the model reads it."""
    if isinstance(media, Tensor):
        return on_white(media)
    if path := whole_file(media):
        return read_video(path)  # decodes no more frames than it keeps
    components = media.get_components()
    indices = sample_indices(components.images.shape[0], float(components.frame_rate))
    return on_white(components.images[indices])


def whole_file(media: Input.Video) -> str | None:
    """The path of a VIDEO that is a file from its beginning to its end; None for other VIDEOs."""
    if isinstance(media, InputImpl.VideoFromComponents):
        return None  # asked for its source, it would encode all its frames
    source, trimmed = media.get_stream_source(), getattr(media, "get_active_trim_window", lambda: (0.0, 0.0))()
    return source if isinstance(source, str) and not any(trimmed) else None


def on_white(images: Tensor) -> Tensor:
    if images.shape[-1] != 4:
        return images
    colour, alpha = images[..., :3], images[..., 3:]
    return colour * alpha + (1 - alpha)


def sound_for(source: Input.Video, frames: int, fps: float) -> dict | None:
    """The sound of the VIDEO that a clip was made of, cut to the clip's length, as an AUDIO.

    None, with a LanceWarning, where the source has no sound, and where it would be out of step: where the model reads
    another number of frames of it than the clip has, or the clip lasts longer or shorter. Raises LanceError for a
    damaged source.
    """
    seconds = frames / fps
    path = whole_file(source)
    sound = read_sound(path, seconds) if path else source.get_components().audio
    if sound is None:
        warn("the clip is silent, because its source has no sound.")
        return None
    if (read := frames_of(source).shape[0]) != frames:
        warn(f"the clip is silent, because it has {frames} frames and its source is read as {read}.")
        return None
    if abs((lasts := source.get_duration()) - seconds) > SOUND_DRIFT:
        warn(f"the clip is silent, because it lasts {seconds:.1f} seconds and its source {lasts:.1f}.")
        return None
    return sound | {"waveform": sound["waveform"][..., : round(seconds * sound["sample_rate"])]}


def read_sound(path: str, seconds: float) -> dict | None:
    """The beginning of a file's sound as an AUDIO, of `seconds` or little more; None where it has no sound.

    Unlike the VIDEO's own components this decodes no pictures.
    """
    parts, samples = [], 0
    try:
        with av.open(path, container_options={"protocol_whitelist": "file"}) as container:
            # The last that can be decoded, as core chooses.
            stream = next((s for s in reversed(container.streams.audio) if s.codec_context is not None), None)
            if stream is None:
                return None
            resampler = av.AudioResampler(format="fltp")
            for frame in container.decode(stream):
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray())
                    samples += part.samples
                if samples >= seconds * stream.sample_rate:
                    break
            rate = stream.sample_rate
    except av.FFmpegError as error:
        raise LanceError(
            f"the sound of {path} cannot be read ({error.strerror}): disconnect the source, or convert it to MP4."
        ) from None
    return {"waveform": torch.from_numpy(np.concatenate(parts, axis=1))[None], "sample_rate": rate} if parts else None
