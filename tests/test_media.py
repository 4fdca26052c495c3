from __future__ import annotations

import json
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from goldens import DATA, golden, values
from hypothesis import given, settings, strategies as st
from PIL import Image, features
from safetensors.torch import load_file

from lance_core import media
from lance_core.errors import LanceError
from lance_core.media import read_image, read_media, read_video, sample_indices, to_bytes, write_mp4, write_png

VALUES = values()
INPUTS = golden(0)
READERS = [read_image, read_video, read_media]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(total: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Flat frames `[F, H, W, 3]`, 0, 3, 6…, far enough apart to be told from each other after compression."""
    return np.repeat(np.arange(total, dtype=np.uint8) * 3, height * width * 3).reshape(total, height, width, 3)


def numbers(frames: torch.Tensor) -> list[int]:
    """Which of the `numbered` frames each frame is."""
    return (frames.mean(dim=(1, 2, 3)) * 255 / 3).round().int().tolist()


def encode(path: Path, frames: np.ndarray, *, fps: int = 12, pts=None, codec="libx264", container=None) -> Path:
    """Encodes bytes `[F, H, W, 3]`; pts: when each frame is shown, in units of 1/fps."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options={"g": "12", "qmin": "1", "qmax": "4", "crf": "4"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for time, frame in zip(range(len(frames)) if pts is None else pts, frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, fps)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return path


def encode_sound(path: Path, codec: str, *, cover: bool = False) -> Path:
    with av.open(str(path), "w", format="mp4" if cover else None) as output:
        sound = output.add_stream(codec, rate=8000)
        if cover:
            picture = output.add_stream("png", rate=1)
            picture.width = picture.height = 16
            picture.pix_fmt = "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic.value
            output.mux(picture.encode(av.VideoFrame.from_ndarray(noise(16, 16, 3), format="rgb24")))
            output.mux(picture.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16p", layout="mono")
        samples.sample_rate = 8000
        resampler = av.AudioResampler(format=sound.codec_context.format, layout="mono", rate=8000)
        for frame in resampler.resample(samples):
            output.mux(sound.encode(frame))
        output.mux(sound.encode())
    return path


def assert_refused(path: Path, reason: str, readers=READERS) -> None:
    """Every reader raises one sentence that names the file and the reason."""
    for reader in readers:
        with pytest.raises(LanceError, match=reason) as caught:
            reader(path)
        sentence = str(caught.value)
        assert sentence.startswith(str(path)) and sentence.endswith(".") and "\n" not in sentence
        assert "Errno" not in sentence


# Sampling


@pytest.mark.parametrize("case", VALUES["frame_sampler"])
def test_sample_indices_are_the_official_ones(case):
    total, fps = (int(part.partition("=")[2]) for part in case.split(","))
    assert sample_indices(total, fps) == VALUES["frame_sampler"][case]


@given(
    total=st.integers(1, 5000),
    fps=st.floats(0.05, 240),
    sample_fps=st.floats(1, 60),
    max_seconds=st.floats(0.1, 60),
)
def test_sample_indices_are_4k_plus_1_increasing_and_span_the_clip(total, fps, sample_fps, max_seconds):
    indices = sample_indices(total, fps, sample_fps=sample_fps, max_seconds=max_seconds)
    assert len(indices) % 4 == 1
    assert len(indices) <= max(1, round(max_seconds * sample_fps))
    assert indices == sorted(indices) and indices[0] == 0
    assert indices[-1] == (total - 1 if len(indices) > 1 else 0)
    steps = np.diff(indices)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1, "evenly spaced"


@given(total=st.integers(1, 4))
def test_very_short_clips_give_their_first_frame(total):
    assert sample_indices(total, 12) == [0]


def test_rates_are_rounded_to_whole_numbers():
    assert sample_indices(90, 30000 / 1001) == sample_indices(90, 30)
    assert sample_indices(2, 0.25, max_seconds=60) == [0] * 92 + [1]


@pytest.mark.parametrize(
    "total, fps, options",
    [
        (0, 12, {}),
        (5, 0, {}),
        (5, float("nan"), {}),
        (5, -1, {}),
        (5, 12, {"sample_fps": 0}),
        (5, 12, {"max_seconds": float("inf")}),
    ],
)
def test_impossible_sampling_is_refused(total, fps, options):
    with pytest.raises(LanceError):
        sample_indices(total, fps, **options)


# Pictures


def test_transparent_pictures_go_on_white():
    expected = load_file(DATA / "resize_golden.safetensors")["rgba.on_white_hwc"]
    image = read_image(DATA / "media" / "rgba.png")
    assert image.shape == (1, 64, 64, 3) and image.dtype == torch.float32
    assert torch.equal(to_bytes(image[0]), expected)


@pytest.mark.parametrize("name", ["a_img1.png", "a_img2.png"])
def test_pictures_are_read_exactly(name):
    frames, kind = read_media(DATA / "media" / name)
    assert kind == "image"
    assert torch.equal(to_bytes(frames[0]), INPUTS[f"source.{name}"])


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_grey_and_palette_alpha_go_on_white(tmp_path, mode):
    image = Image.new("LA", (2, 1), (0, 255))
    image.putpixel((1, 0), (0, 0))
    image = image if mode == "LA" else image.convert("RGBA").quantize()
    image.save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png")[0, 0].tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("mode, transparent", [("P", 0), ("L", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_colour_goes_on_white(tmp_path, mode, transparent):
    image = Image.new(mode, (2, 1), transparent)
    image.putpixel((1, 0), 1 if mode != "RGB" else (1, 1, 1))
    if mode == "P":
        image.putpalette([0, 0, 0, 1, 1, 1])
    image.save(tmp_path / "key.png", transparency=transparent)
    assert to_bytes(read_image(tmp_path / "key.png"))[0, 0].tolist() == [[255, 255, 255], [1, 1, 1]]


def test_palette_colours(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "palette.png")
    assert to_bytes(read_image(tmp_path / "palette.png"))[0, 1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    "name, dtype, scale",
    [
        ("grey.png", np.uint16, 1),
        ("grey.tiff", np.uint16, 1),
        ("grey.tiff", np.int32, 1),
        ("grey.tiff", np.float32, 1 / 65535),
        ("grey.png", np.uint8, 255 / 65535),
    ],
)
def test_greys_of_every_depth_span_the_range(tmp_path, name, dtype, scale):
    levels = np.linspace(0, 65535, 6).reshape(2, 3)
    Image.fromarray((levels * scale).astype(dtype)).save(tmp_path / name)
    image = read_image(tmp_path / name)
    expected = torch.from_numpy(levels / 65535).float()[None, ..., None].expand(1, 2, 3, 3)
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_black_and_white_and_cmyk(tmp_path):
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    assert torch.equal(read_image(tmp_path / "bits.png"), torch.ones(1, 2, 3, 3))
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "print.jpg", quality=95)
    cyan = read_image(tmp_path / "print.jpg")[0, 8, 8]
    torch.testing.assert_close(cyan, torch.tensor([0.0, 1.0, 1.0]), atol=0.02, rtol=0)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "pixel.png")
    assert to_bytes(read_image(tmp_path / "pixel.png")).tolist() == [[[[1, 2, 3]]]]


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: np.rot90(x, 2)),
        (4, lambda x: x[::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation, turn):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(to_bytes(read_image(tmp_path / "phone.png"))[0].numpy(), turn(pixels))


# Clips


def test_the_golden_clip_has_the_official_frames():
    frames, kind = read_media(DATA / "media" / "a_vid.mp4")
    expected = INPUTS["source.a_vid.mp4"][VALUES["input.video_edit.en.frame_indices"]].float() / 255
    assert kind == "video" and frames.shape == expected.shape
    assert (frames - expected).abs().max() <= 2.5 / 255


@pytest.mark.parametrize(
    "name, container, codec",
    [
        ("clip.mp4", None, "libx264"),
        ("clip.mkv", None, "libx264"),
        ("clip.webm", None, "libvpx"),
        ("clip.avi", None, "libx264"),
        ("clip.ts", None, "libx264"),
        ("clip.flv", None, "libx264"),
        ("clip.mp4", None, "mpeg4"),
        ("named.png", "mp4", "libx264"),
        ("stream.h264", "h264", "libx264"),
    ],
)
def test_frames_are_found_in_every_container(tmp_path, name, container, codec):
    path = encode(tmp_path / name, numbered(80), fps=24, codec=codec, container=container)
    frames, kind = read_media(path)
    assert kind == "video"
    rate = 25 if container == "h264" else 24  # a bare stream tells no rate; FFmpeg assumes 25
    assert numbers(frames) == sample_indices(80, rate)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6, 9])
def test_short_clips_give_4k_plus_1_frames(tmp_path, total):
    frames = read_video(encode(tmp_path / "short.mp4", numbered(total)))
    assert numbers(frames) == sample_indices(total, 12)
    assert len(frames) == max(1, (total - 1) // 4 * 4 + 1)


def test_long_clips_are_seen_to_their_end(tmp_path):
    path = encode(tmp_path / "long.mp4", numbered(80), fps=4)
    assert numbers(read_video(path)) == sample_indices(80, 4)
    assert numbers(read_video(path, fps=1, max_seconds=5)) == [0, 19, 39, 59, 79]


def test_only_the_frames_needed_are_decoded(tmp_path):
    path = encode(tmp_path / "keys.mp4", numbered(80), fps=24)
    with av.open(str(path)) as container:
        middle = [packet for packet in container.demux(video=0) if packet.size][20:60]
    content = bytearray(path.read_bytes())
    for packet in middle:
        content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    index = media._index(path)
    assert len(index.positions) == 80
    first, last = index.positions[0], index.positions[-1]
    frames = list(media._decode(path, index, [first, last, last]))
    assert [frame.pts for frame in frames] == [first, last, last]
    assert_refused(path, "damaged", [read_video])


def test_variable_rate_is_sampled_by_time(tmp_path):
    shown = [*range(12), 48, 49, 50, 51, 60]  # in 1/12 s: one second of motion, three of stillness, motion again
    frames = read_video(encode(tmp_path / "variable.mp4", numbered(len(shown)), pts=shown))
    assert len(frames) % 4 == 1 and 57 <= len(frames) <= 65
    times = np.linspace(0, 60, len(frames))
    assert numbers(frames) == [max(i for i, start in enumerate(shown) if start <= time) for time in times]


def test_jitter_of_timestamps_is_not_a_variable_rate(tmp_path):
    milliseconds = [round(i * 1000 / 24) for i in range(50)]
    path = encode(tmp_path / "jitter.mkv", numbered(50), fps=1000, pts=milliseconds)
    times = media._index(path).times
    assert len(set(np.diff(times).round(4))) > 1
    assert media._choose(times, 24, 12, 6.0) == sample_indices(50, 24)


@pytest.mark.parametrize(
    "degrees, matrix, turns",
    [
        (90, (0, 1, -1, 0), -1),
        (180, (-1, 0, 0, -1), 2),
        (270, (0, -1, 1, 0), 1),
    ],
)
def test_rotation_metadata_is_honoured(tmp_path, degrees, matrix, turns):
    corner = torch.zeros(1, 32, 64, 3)
    corner[:, :16, :32] = 1
    path = write_mp4(corner, tmp_path / "phone.mp4")
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 4 + 20 + 16  # past version and flags, times and ids, layer and volume
    a, b, c, d = (value << 16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))
    expected = torch.rot90(corner, turns, dims=(1, 2))
    assert read_video(path).shape == expected.shape
    assert (read_video(path) - expected).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["dance.gif", "dance.webp", "dance.png"])
def test_animations_are_clips_sampled_by_their_durations(tmp_path, name):
    pages = [Image.fromarray(frame) for frame in numbered(6)]
    durations = [100, 100, 100, 500, 100, 100]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], duration=durations, lossless=True)
    frames, kind = read_media(tmp_path / name)
    assert kind == "video" and len(frames) % 4 == 1
    shown = numbers(frames)
    assert shown == sorted(shown) and set(shown) == set(range(6))
    assert shown.count(3) > 3 * shown.count(1), "a frame shown longer is seen more often"
    assert numbers(read_image(tmp_path / name)) == [0]


def test_a_steady_animation_follows_the_official_sampler(tmp_path):
    pages = [Image.fromarray(frame) for frame in numbered(30)]
    pages[0].save(tmp_path / "steady.gif", save_all=True, append_images=pages[1:], duration=50)
    assert numbers(read_video(tmp_path / "steady.gif")) == sample_indices(30, 20)


def test_stills_and_pages_are_pictures(tmp_path):
    pages = [Image.fromarray(frame) for frame in numbered(3)]
    pages[2].save(tmp_path / "one.gif")
    pages[2].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[:2])
    for name in ("one.gif", "pages.tiff"):
        frames, kind = read_media(tmp_path / name)
        assert kind == "image" and numbers(frames) == [2]
        assert torch.equal(read_video(tmp_path / name), frames)


# Bad input


def test_missing_empty_and_folder(tmp_path):
    assert_refused(tmp_path / "none.png", "does not exist")
    assert_refused(tmp_path, "is a folder")
    (tmp_path / "empty.mp4").touch()
    assert_refused(tmp_path / "empty.mp4", "empty")


@pytest.mark.parametrize(
    "name, content",
    [
        ("words.mp4", b"hello world\n" * 50),
        ("words.txt", b"hello world\n" * 50),
        ("bytes.png", bytes(range(256)) * 9),
        ("page.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("title.srt", b"1\n00:00:00,000 --> 00:00:02,000\nhi\n"),
        ("header.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"),
    ],
)
def test_other_content_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, "not a picture|no picture|no video|codec")


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile 'secret.mp4'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8"])
def test_a_list_of_other_files_is_not_followed(tmp_path, name, content):
    encode(tmp_path / "secret.mp4", numbered(5))
    (tmp_path / name).write_text(content)
    assert_refused(tmp_path / name, "picture")


@pytest.mark.parametrize("name", ["noise.png", "noise.jpg", "noise.webp", "noise.gif", "noise.bmp", "noise.tiff"])
def test_truncated_pictures_are_refused(tmp_path, name):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert_refused(tmp_path / name, "damaged, cut off")


def test_a_damaged_picture_is_refused(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "damaged.png")
    content = bytearray((tmp_path / "damaged.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged.png").write_bytes(content)
    assert_refused(tmp_path / "damaged.png", "damaged")


@pytest.mark.parametrize("name, header", [("a.dds", b"@\0\0\0"), ("a.blp", b"\1\0\0\0"), ("a.avif", b"iloc")])
def test_headers_that_cannot_be_are_refused(tmp_path, name, header):
    """Pillow raises NotImplementedErrors of the first two, and a RuntimeError of AVIF."""
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    Image.fromarray(noise(24, 24, 3)).convert("P" if name == "a.blp" else "RGB").save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert header in content
    (tmp_path / name).write_bytes(content.replace(header, bytes(4), 1))
    assert_refused(tmp_path / name, "damaged")


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    def full(pixels):
        raise RuntimeError("can't allocate memory")

    path = write_png(torch.rand(4, 4, 3), tmp_path / "good.png")
    monkeypatch.setattr(media, "_to_frames", full)
    for reader in READERS:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            reader(path)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12000, 60000])
def test_decompression_bombs_are_refused(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
    assert_refused(tmp_path / "bomb.png", "more than .* pixels")


@pytest.mark.parametrize("faststart", [False, True])
def test_truncated_clips_are_refused(tmp_path, faststart):
    path = tmp_path / "cut.mp4"
    if faststart:
        write_mp4(torch.rand(12, 48, 48, 3), path)
    else:
        encode(path, noise(12, 48, 48, 3))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert_refused(path, "cut off", [read_video, read_media])


def test_a_damaged_clip_is_refused(tmp_path):
    path = write_mp4(torch.rand(12, 48, 48, 3), tmp_path / "damaged.mp4")
    content = path.read_bytes()
    middle = len(content) // 3
    path.write_bytes(content[:middle] + bytes(i * 7 % 256 for i in range(len(content) - middle)))
    assert_refused(path, "damaged", [read_video, read_media])


def test_a_clip_without_frames_is_refused(tmp_path):
    path = write_mp4(torch.rand(1, 16, 16, 3), tmp_path / "none.mp4")
    content = path.read_bytes()
    start = content.index(b"stsz") + 12
    path.write_bytes(content[:start] + bytes(4) + content[start + 4 :])
    assert_refused(path, "no frames|damaged|no video", [read_video, read_media])


@pytest.mark.parametrize(
    "name, codec, cover",
    [
        ("sound.wav", "pcm_s16le", False),
        ("sound.m4a", "aac", False),
        ("song.m4a", "aac", True),
    ],
)
def test_sound_only_is_refused(tmp_path, name, codec, cover):
    assert_refused(encode_sound(tmp_path / name, codec, cover=cover), "sound only", [read_video, read_media])
    assert_refused(tmp_path / name, "not a picture", [read_image])


# Writing


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 999))
def test_png_round_trip_is_exact(tmp_path_factory, height, width, seed):
    pixels = torch.from_numpy(noise(1, height, width, 3, seed=seed)).float() / 255
    path = write_png(pixels, tmp_path_factory.mktemp("png") / "picture.png")
    assert torch.equal(read_image(path), pixels)
    assert torch.equal(read_image(write_png(pixels[0], path)), pixels)


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0, 2.0])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 127, 255, 255]
    assert to_bytes(values).dtype == torch.uint8


def test_png_carries_prompt_and_workflow(tmp_path):
    workflow = {"nodes": [{"title": "変換 é"}]}
    path = write_png(torch.rand(2, 3, 3), tmp_path / "a" / "b" / "p.png", text={"prompt": "{}", "workflow": workflow})
    with Image.open(path) as image:
        assert image.text["prompt"] == "{}" and json.loads(image.text["workflow"]) == workflow


@settings(max_examples=8, deadline=None)
@given(total=st.sampled_from([1, 5, 9]), height=st.integers(1, 40), width=st.integers(1, 40))
def test_mp4_round_trip(tmp_path_factory, total, height, width):
    ramp = torch.linspace(0.1, 0.9, width).expand(total, height, width)
    frames = torch.stack([ramp, 1 - ramp, torch.full_like(ramp, 0.5)], dim=-1)
    path = write_mp4(frames, tmp_path_factory.mktemp("mp4") / "clip.mp4")
    result = read_video(path)
    assert result.shape == (total, height + height % 2, width + width % 2, 3)
    if min(height, width) >= 16:
        assert (result[:, :height, :width] - frames).abs().mean() < 0.03


def test_mp4_keeps_colours_and_rate(tmp_path):
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [1, 1, 1], [0, 0, 0]])
    path = write_mp4(colours[:, None, None].expand(5, 32, 32, 3), tmp_path / "colours.mp4", fps=12)
    assert (read_video(path).mean(dim=(1, 2)) - colours).abs().max() < 0.02
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.codec_context.pix_fmt) == (12, 5, "yuv420p")
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == 1  # BT.709


@pytest.mark.parametrize("fps", [1, 23.976, 24, 29.97, 120])
def test_mp4_has_the_rate_asked_for(tmp_path, fps):
    path = write_mp4(torch.rand(5, 16, 16, 3), tmp_path / "rate.mp4", fps=fps)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_mp4_carries_prompt_and_workflow(tmp_path):
    metadata = {"prompt": {"1": {"class_type": "変換"}}, "workflow": '{"nodes": []}'}
    path = write_mp4(torch.rand(1, 16, 16, 3), tmp_path / "new" / "clip.mp4", metadata=metadata)
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["prompt"]) == metadata["prompt"]
        assert container.metadata["workflow"] == metadata["workflow"]


def test_mp4_without_x264(tmp_path):
    encoder, options = media._video_encoder({"mpeg4"})
    assert media._video_encoder({"mpeg4", "libx264"})[0] == "libx264"
    frames = torch.linspace(0, 1, 64).expand(5, 48, 64)[..., None].expand(5, 48, 64, 3)
    media._encode(frames, tmp_path / "plain.mp4", 12, {}, encoder, options)
    assert (read_video(tmp_path / "plain.mp4") - frames).abs().mean() < 0.02


@pytest.mark.parametrize(
    "write, shape",
    [
        (write_png, (2, 4, 4, 3)),
        (write_png, (4, 4)),
        (write_png, (4, 4, 4)),
        (write_png, (0, 4, 3)),
        (write_mp4, (4, 4, 3)),
        (write_mp4, (0, 4, 4, 3)),
        (write_mp4, (1, 4, 4, 1)),
    ],
)
def test_other_shapes_are_refused_and_nothing_is_written(tmp_path, write, shape):
    with pytest.raises(LanceError, match="out"):
        write(torch.zeros(shape), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -12, float("nan"), float("inf")])
def test_impossible_rates_are_refused(tmp_path, fps):
    with pytest.raises(LanceError, match="frames per second"):
        write_mp4(torch.zeros(1, 4, 4, 3), tmp_path / "out.mp4", fps=fps)


@pytest.mark.parametrize("key", ["", "k" * 80, "鍵"])
def test_impossible_metadata_names_are_refused(tmp_path, key):
    with pytest.raises(LanceError, match="metadata"):
        write_png(torch.zeros(4, 4, 3), tmp_path / "out.png", text={key: "value"})
    assert list(tmp_path.iterdir()) == []


class Interrupted(Exception):
    pass


class FailingText:
    """Metadata whose reading fails half-way."""

    def items(self):
        yield "prompt", "{}"
        raise Interrupted


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = write_mp4(torch.rand(1, 16, 16, 3), tmp_path / "clip.mp4")
    before = path.read_bytes()
    with pytest.raises(Interrupted):
        write_mp4(torch.rand(9, 16, 16, 3), path, metadata=FailingText())
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"] and path.read_bytes() == before


def test_the_longest_names_can_be_written(tmp_path):
    path = write_png(torch.rand(4, 4, 3), tmp_path / ("🦊" * 62 + ".png"))  # of 255 bytes it has 252
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write, image", [(write_png, torch.rand(4, 4, 3)), (write_mp4, torch.rand(1, 16, 16, 3))])
def test_unwritable_places_are_refused_without_leftovers(tmp_path, write, image):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "out", tmp_path / "folder"):
        with pytest.raises(LanceError, match="cannot be written"):
            write(image, path)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]
