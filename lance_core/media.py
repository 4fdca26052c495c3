"""Frames from files and to files: pictures through Pillow, clips through PyAV.

Frames are float32 tensors `[F, H, W, 3]` in 0..1, RGB; a picture has F = 1. Whether a file is a picture or a clip is
decided by its content, never by its name.
"""

from __future__ import annotations

import json
import math
import os
import struct
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .config import TEMPORAL_COMPRESSION, VIDEO_FPS
from .errors import LanceError

MAX_PIXELS = 2**27  # per frame; beyond it a small file could fill the memory
MAX_SECONDS = 6.0  # of a clip that the model reads
FALLBACK_FPS = 24  # of a file that does not tell its rate
ANIMATION_FORMATS = {"GIF", "WEBP", "PNG", "AVIF"}  # several images of other formats are pages or thumbnails
SCRIPT_FORMATS = {"tty", "hls", "concat", "dash", "ffmetadata"}  # texts that FFmpeg draws, or follows to other files
INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}  # in others a seek may miss its frame
PICTURE_ERRORS = (  # what Pillow raises for damage; RuntimeError of AVIF, and as NotImplementedError of DDS
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, RuntimeError, struct.error, zlib.error),
)
BT709, BT601, MPEG_RANGE = 1, 5, 1  # FFmpeg's numbers
ATTACHED_PICTURE = 0x400
PART = ".part"  # the end of a file's name until all of it is written


def to_bytes(frames: Tensor) -> Tensor:
    """uint8 `round(255 x)` of values in 0..1, of any shape; values outside are clamped."""
    return (frames * 255).round().clamp(0, 255).to(torch.uint8)


def _to_frames(pixels: Sequence[np.ndarray]) -> Tensor:
    """Float frames `[F, H, W, 3]` from F arrays `[H, W, 3]`, each of bytes or of float32 in 0..1."""
    stacked = torch.from_numpy(np.stack(pixels))
    return stacked.float() / 255 if stacked.dtype == torch.uint8 else stacked


def sample_count(seconds: float, *, sample_fps: float = VIDEO_FPS, max_seconds: float = MAX_SECONDS) -> int:
    """How many frames, 4k+1 and at least one, are taken of a clip of so many seconds.

    The largest such number below `seconds` times `sample_fps`, or equal to it. Source: the official
    `data/video/sampler/frames.py`.
    """
    frames = round(min(seconds, max_seconds) * sample_fps)
    return max(0, (frames - 1) // TEMPORAL_COMPRESSION) * TEMPORAL_COMPRESSION + 1


def sample_indices(
    total: int, fps: float, *, sample_fps: float = VIDEO_FPS, max_seconds: float = MAX_SECONDS
) -> list[int]:
    """The frames to take of a clip of constant rate: 4k+1 indices, evenly from the first frame to the last.

    A clip longer than `max_seconds` is still seen to its end, at a lower rate; one slower than `sample_fps` has frames
    repeated. `fps` is rounded to a whole number, as in the official `data/datasets_custom/validation_dataset.py`.
    Raises LanceError where there is no frame or a rate or time is not positive.
    """
    if total < 1:
        raise LanceError("The clip has no frames; use one that has at least one.")
    for name, value in (("fps", fps), ("sample_fps", sample_fps), ("max_seconds", max_seconds)):
        if not (math.isfinite(value) and value > 0):
            raise LanceError(f"{name} is {value}; it must be a number above zero.")
    count = sample_count(total / (round(fps) or fps), sample_fps=sample_fps, max_seconds=max_seconds)
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def _is_steady(times: np.ndarray) -> bool:
    """True where no frame is shown further than half an interval from its place at a constant rate."""
    even = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - even).max() <= 0.5 * (times[-1] - times[0]) / max(1, len(times) - 1))


def _choose(times: np.ndarray, fps: float, sample_fps: float, max_seconds: float) -> list[int]:
    """The frames to take of a clip whose frames are shown at `times` (seconds, increasing); fps is its mean rate.

    At a variable rate, the frames that are on the screen at evenly spaced times.
    """
    total = len(times)
    indices = sample_indices(total, fps, sample_fps=sample_fps, max_seconds=max_seconds)
    if _is_steady(times):
        return indices
    seconds = (times[-1] - times[0]) * total / (total - 1)
    count = sample_count(seconds, sample_fps=sample_fps, max_seconds=max_seconds)
    return (np.searchsorted(times, np.linspace(times[0], times[-1], count), side="right") - 1).tolist()


def _existing(path: str | os.PathLike) -> Path:
    """The path of a file that exists and is not empty."""
    path = Path(path)
    try:
        size = path.stat().st_size
    except (OSError, ValueError):
        raise LanceError(f"{path} does not exist; check the name and the folder.") from None
    if path.is_dir():
        raise LanceError(f"{path} is a folder; name a picture or a video file inside it.")
    if size == 0:
        raise LanceError(f"{path} is empty (0 bytes); copy or download the file again.")
    return path


@contextmanager
def _reading(path: Path, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns the decoders' errors into a LanceError that names the file."""
    try:
        yield
    except LanceError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except errors as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".") or type(error).__name__
        raise LanceError(
            f"{path} is damaged, cut off or no picture or video at all ({reason}); copy or download the file again."
        ) from None


def _too_large(path: Path) -> LanceError:
    return LanceError(f"{path} has more than {MAX_PIXELS:,} pixels in a frame; scale it down first.")


def _open_picture(path: Path) -> Image.Image | None:
    """The picture or animation in a file, not decoded yet; None where Pillow does not know the content."""
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        return None
    if image.format == "MPEG":  # Pillow recognises such videos but cannot decode them
        image.close()
        return None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(path)
    return image


def _is_animation(image: Image.Image) -> bool:
    return image.format in ANIMATION_FORMATS and getattr(image, "n_frames", 1) > 1


def _picture_pixels(image: Image.Image) -> np.ndarray:
    """The current frame, upright and on white: bytes `[H, W, 3]`, or float32 in 0..1 where a grey has more depth."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        full_scale = 1 if image.mode == "F" else 65535
        grey = np.asarray(image).astype(np.float32) / full_scale
        return np.repeat(grey.clip(0, 1)[..., None], 3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


def _animation_times(image: Image.Image) -> tuple[np.ndarray, float]:
    """When each frame of an animation is shown, in seconds, and the mean rate in frames per second."""
    seconds = []
    for index in range(image.n_frames):
        image.seek(index)
        image.load()
        # Browsers show frames without a duration for a tenth of a second.
        seconds.append((image.info.get("duration") or 100) / 1000)
    ends = np.cumsum(seconds)
    return ends - seconds, len(seconds) / float(ends[-1])


def _animation_pixels(image: Image.Image, sample_fps: float, max_seconds: float) -> list[np.ndarray]:
    times, fps = _animation_times(image)
    pixels = []
    for index in _choose(times, fps, sample_fps, max_seconds):
        image.seek(index)
        pixels.append(_picture_pixels(image))
    return pixels


def read_image(path: str | os.PathLike) -> Tensor:
    """The picture in a file, `[1, H, W, 3]` float32 in 0..1: turned as EXIF says, transparency on white.

    Greys of 16 bits keep their depth; an animation gives its first frame. Raises LanceError where the file is missing,
    damaged, larger than `MAX_PIXELS` or not a picture.
    """
    path = _existing(path)
    with _reading(path, PICTURE_ERRORS):
        image = _open_picture(path)
        if image is None:
            raise LanceError(f"{path} is not a picture that can be read; convert it to PNG, JPEG or WebP.")
        with image:
            pixels = _picture_pixels(image)
    return _to_frames([pixels])  # outside, for a lack of memory is a RuntimeError too


@dataclass(frozen=True)
class _Index:
    """Where and when the frames of a video stream are, found without converting any of them.

    positions: of each frame in presentation order, its timestamp, or its rank where `timed` is false; keyframes: the
    positions that a seek reaches exactly (none: decode from the beginning); times: of each frame in seconds.
    """

    positions: list[int]
    keyframes: list[int]
    times: np.ndarray
    fps: float
    timed: bool


@contextmanager
def _video_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream that is not a cover picture."""
    # A playlist inside the file must not make FFmpeg fetch anything over the network. Options for the container
    # alone: `options` crashes PyAV before 17 where streams appear after the header, as in FLV.
    with av.open(str(path.absolute()), container_options={"protocol_whitelist": "file"}) as container:
        if container.format.name in SCRIPT_FORMATS:
            raise LanceError(f"{path} is not a picture or a video; give a file such as PNG, JPEG, MP4 or WebM.")
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            kind = "sound only, no video" if container.streams.audio else "no video"
            raise LanceError(f"{path} holds {kind}; give a file with moving pictures, such as MP4 or WebM.")
        stream = streams[0]
        if stream.codec_context is None:
            raise LanceError(f"{path} has a codec that cannot be decoded here; convert it to PNG or to MP4 (H.264).")
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise _too_large(path)
        stream.thread_type = "AUTO"
        yield container, stream


def _is_cover(stream) -> bool:
    """True for a still attached to a sound file (a PyAV too old to tell takes it for a video of one frame)."""
    return bool(getattr(getattr(stream, "disposition", None), "value", 0) & ATTACHED_PICTURE)


def _index_packets(path: Path, container, stream, fps: float) -> _Index:
    """The index of a container that stores one, from its packets; nothing is decoded."""
    is_keyframe = {}
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise LanceError(f"{path} is damaged or cut off; copy or download the file again.")
        if packet.size and not packet.is_discard:
            is_keyframe[packet.pts] = packet.is_keyframe
    positions = sorted(is_keyframe)
    keyframes = [position for position in positions if is_keyframe[position]]
    return _Index(positions, keyframes, np.array(positions) * float(stream.time_base), fps, timed=True)


def _index_frames(container, stream, fps: float) -> _Index:
    """The index of any other container, whose packets may lack times or frames: every frame is decoded once."""
    times = [frame.time for frame in container.decode(stream)]
    ranks = list(range(len(times)))
    if None in times or any(later <= earlier for earlier, later in zip(times, times[1:])):
        times = [rank / fps for rank in ranks]
    return _Index(ranks, [], np.array(times), fps, timed=False)


def _index(path: Path) -> _Index:
    with _video_stream(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
        if container.format.name in INDEXED_FORMATS:
            return _index_packets(path, container, stream, fps)
        return _index_frames(container, stream, fps)


def _positioned(container, stream, timed: bool) -> Iterator[tuple[int, Any]]:
    for rank, frame in enumerate(container.decode(stream)):
        position = frame.pts if timed else rank
        if position is not None:
            yield position, frame


def _decode(path: Path, index: _Index, wanted: Sequence[int]) -> Iterator[Any]:
    """The frames at the wanted positions (not decreasing), reached from the keyframe nearest before each."""
    with _video_stream(path) as (container, stream):
        frames = _positioned(container, stream, index.timed)
        reached, frame = None, None
        for position in wanted:
            if reached is not None and reached < position:
                keyframe = index.keyframes[: bisect_right(index.keyframes, position)][-1:]
                if keyframe and keyframe[0] > reached:
                    container.seek(keyframe[0], stream=stream)
                    frames = _positioned(container, stream, index.timed)
            if reached is None or reached < position:
                # Where the stream ends early its last frame stays on the screen.
                reached, frame = next((item for item in frames if item[0] >= position), (reached, frame))
            if frame is None:
                raise LanceError(f"{path} has no frame that can be decoded; copy or download the file again.")
            yield frame


def _frame_pixels(frame, width: int, height: int) -> np.ndarray:
    """Bytes `[H, W, 3]` of a decoded frame of that size, upright as its display matrix says."""
    turns = round(getattr(frame, "rotation", 0) / 90)
    # Told no other target, PyAV before 17 ignores the colour matrix of the source.
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, dst_colorspace=BT601)
    return np.rot90(pixels, turns)


def _video_pixels(path: Path, sample_fps: float, max_seconds: float) -> list[np.ndarray]:
    index = _index(path)
    if not index.positions:
        raise LanceError(f"{path} has no frames; copy or download the file again.")
    wanted = [index.positions[i] for i in _choose(index.times, index.fps, sample_fps, max_seconds)]
    pixels: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    for frame in _decode(path, index, wanted):
        size = size or (frame.width, frame.height)
        pixels.append(_frame_pixels(frame, *size))
    return pixels


def read_video(path: str | os.PathLike, *, fps: float = float(VIDEO_FPS), max_seconds: float = MAX_SECONDS) -> Tensor:
    """Frames of a clip, sampled as the model expects: `[F, H, W, 3]` float32 in 0..1, F = 4k+1.

    `fps` frames per second, at most `max_seconds` of them, spread over the whole clip (see `sample_indices`); a clip of
    variable rate is sampled at even times. Animated GIF, WebP, PNG and AVIF count as clips, a picture as a clip of one
    frame. Raises LanceError where the file is missing, empty, damaged, has no moving pictures or too large ones.
    """
    path = _existing(path)
    with _reading(path, PICTURE_ERRORS):
        image = _open_picture(path)
        if image is not None:
            with image:
                animated = _is_animation(image)
                pixels = _animation_pixels(image, fps, max_seconds) if animated else [_picture_pixels(image)]
    if image is None:
        with _reading(path, (*PICTURE_ERRORS, av.error.FFmpegError)):
            pixels = _video_pixels(path, fps, max_seconds)
    return _to_frames(pixels)


def read_clip(path: str | os.PathLike) -> tuple[Tensor, float]:
    """Every frame of a video file, `[F, H, W, 3]`, and how many there are per second. Errors as in `read_video`."""
    path = _existing(path)
    with _reading(path, (*PICTURE_ERRORS, av.error.FFmpegError)):
        index = _index(path)
        frames = list(_decode(path, index, index.positions))
        if not frames:
            raise LanceError(f"{path} has no frames; copy or download the file again.")
        height, width = frames[0].height, frames[0].width
        pixels = [_frame_pixels(frame, width, height) for frame in frames]
    return _to_frames(pixels), index.fps


def read_media(
    path: str | os.PathLike, *, max_seconds: float = MAX_SECONDS
) -> tuple[Tensor, Literal["image", "video"]]:
    """The frames of a picture or a clip, as `read_image` or `read_video` gives them, and which of the two it is."""
    path = _existing(path)
    with _reading(path, PICTURE_ERRORS), _open_picture(path) or nullcontext() as image:
        is_image = image is not None and not _is_animation(image)
    if is_image:
        return read_image(path), "image"
    return read_video(path, max_seconds=max_seconds), "video"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` on success and is removed on any error."""
    # A name may have 255 bytes, and a character four of them.
    partial = path.with_name(f".{path.name[:60]}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LanceError(f"{path} cannot be written ({reason}); choose another name or folder.") from None
    finally:
        with suppress(OSError):  # nothing was written where even the folder could not be made
            partial.unlink()


def remove_partials(folder: Path, names: str) -> None:
    """Removes what killed writers of files of such names (a pattern) have left; none may be at work on one."""
    for partial in folder.glob(f".{names}.{'[0-9a-f]' * 8}{PART}"):
        with suppress(OSError):
            partial.unlink()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_png(image: Tensor, path: str | os.PathLike, *, text: Mapping[str, Any] | None = None) -> Path:
    """Writes a picture `[H, W, 3]` or `[1, H, W, 3]` in 0..1 as PNG and returns its path.

    text: PNG text chunks, such as "prompt" and "workflow" as ComfyUI writes them; what is not a string is written as
    JSON. Missing folders are made. Raises LanceError where the shape is another or the file cannot be written.
    """
    path = Path(path)
    pixels = image[0] if image.ndim == 4 and len(image) == 1 else image
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise LanceError(f"{path} needs one picture [height, width, 3], not {list(image.shape)}; write each by itself.")
    chunks = PngInfo()
    for key, value in (text or {}).items():
        if not 1 <= len(key) <= 79 or not key.isascii():
            raise LanceError(f"{path} cannot hold metadata named {key!r}; use a name of 1 to 79 ASCII characters.")
        chunks.add_text(key, _as_text(value))
    with replacing(path) as partial:
        Image.fromarray(to_bytes(pixels).cpu().numpy()).save(partial, format="PNG", pnginfo=chunks, compress_level=4)
    return path


def _video_encoder(available: Collection[str]) -> tuple[str, dict[str, str]]:
    """The encoder to use and its options for a quality without visible loss; builds of FFmpeg may lack x264."""
    if "libx264" in available:
        return "libx264", {"crf": "18"}
    return "mpeg4", {"qmin": "2", "qmax": "3"}


def _encode(frames: Tensor, path: Path, fps: float, metadata: Mapping[str, Any], encoder: str, options: dict) -> None:
    """Encodes frames `[F, H, W, 3]` of even height and width into an MP4 file."""
    flags = {"movflags": "use_metadata_tags+faststart"}  # without the first FFmpeg drops keys it does not know
    with av.open(str(path), mode="w", format="mp4", options=flags) as container:
        for key, value in metadata.items():
            container.metadata[key] = _as_text(value)
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = BT709, MPEG_RANGE
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(to_bytes(frame).cpu().numpy(), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=BT709)))
        container.mux(stream.encode())


def _even(frames: Tensor) -> Tensor:
    """Frames `[F, H, W, 3]` with the last row or column repeated where their number is odd."""
    height, width = frames.shape[1:3]
    if height % 2:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    if width % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return frames


def write_mp4(
    frames: Tensor,
    path: str | os.PathLike,
    *,
    fps: float = VIDEO_FPS,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes frames `[F, H, W, 3]` in 0..1 as an MP4 of H.264 and returns its path.

    Colours are BT.709, subsampled (yuv420p), which needs even sides: an odd one grows by a repeated row or column.
    metadata: tags of the container, such as "prompt" and "workflow" as ComfyUI writes them; what is not a string is
    written as JSON. Missing folders are made. Where PyAV lacks x264 the codec is MPEG-4. Raises LanceError where there
    are no frames, the rate is not positive or the file cannot be written.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise LanceError(f"{path} needs frames [frames, height, width, 3], not {list(frames.shape)}; give one or more.")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise LanceError(f"{path} cannot have {fps} frames per second; give a number above 0, up to 1000.")
    encoder, options = _video_encoder(av.codecs_available)
    with replacing(path) as partial:
        _encode(_even(frames), partial, fps, metadata or {}, encoder, options)
    return path
