"""The nodes a workflow may use without ComfyUI: ours over the stages, and the few of ComfyUI's around them.

Names, inputs and meaning are those of the nodes in ComfyUI (nodes.py and comfy_extras of v0.33), so that one graph
gives the same results in both. IMAGE is float `[F, H, W, 3]` in 0..1, LATENT is {"samples": `[B, 48, T, h, w]`}, MODEL
is a `Model`, VAE the loaded Lance.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import stages
from .adapters import apply_loras
from .checkpoint import Lance
from .checks import check_seed, check_whole
from .config import LATENT_CHANNELS, SPATIAL_COMPRESSION, VIDEO_FPS
from .errors import LanceError
from .flow import RENORMS, Sampling
from .layout import BUILT_IN, BUILT_IN_CHOICE, BUILT_IN_FOLDER
from .media import read_clip, read_image, read_media, read_video, sample_indices, write_mp4, write_png
from .resize import OFFICIAL_RATIOS, RATIOS, RESOLUTION_CHOICES, official_size, resolution_of, size_of

REQUIRED = object()
MAX_NAME = 240  # bytes, with room for a number and a suffix: what file systems hold is 255

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


@dataclass(frozen=True)
class Input:
    """One input: its type ("IMAGE,VIDEO": either, "*": any), its default (None: may be left open), its choices.

    choices: option -> the further inputs that the node has while that option is chosen (ComfyUI's DynamicCombo).
    """

    type: str
    default: Any = REQUIRED
    options: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[str, Input]] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A node class: what goes in, the types that come out, and the function between them."""

    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    run: Callable[..., tuple | Shown]
    is_output: bool = False

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Input]:
        """The inputs that the node has while those are its values; a choice's own are called `<input>.<name>`."""
        found = {}
        for name, schema in self.inputs.items():
            found[name] = schema
            option = values.get(name, schema.default) if schema.choices else None
            if isinstance(option, str) and option in schema.choices:
                found |= {f"{name}.{part}": below for part, below in schema.choices[option].items()}
        return found

    def possible(self, values: Mapping[str, Any]) -> dict[str, Input]:
        """The inputs that the node has with those values, and all that it would have with another choice."""
        found = {}
        for name, schema in self.inputs.items():
            for option in schema.choices:
                found |= self.chosen({name: option})
        return {**found, **self.chosen(values)}


@dataclass(frozen=True)
class Shown:
    """What an output node gives: its outputs, the files it wrote, the text it shows."""

    outputs: tuple
    files: tuple[Path, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Session:
    """What all nodes of one run share. `workflow` goes into the files that are written."""

    workflow: Mapping[str, Any]
    output: Path
    inputs: tuple[Path, ...]
    models: tuple[Path, ...]
    model: str | None = None  # a checkpoint instead of those that the workflow names
    device: str = "auto"
    dtype: str = "auto"
    progress: Progress | None = None

    def on_step(self, label: str) -> Callable[[int, int, Tensor], None] | None:
        """A callback for `generate` and `edit` that reports to `progress`."""
        report = self.progress
        return None if report is None else lambda step, steps, estimate: report(label, step, steps)

    def on_chunk(self, label: str) -> Callable[[int, int], None] | None:
        """A callback for encoding and decoding that reports to `progress`."""
        return None if self.progress is None else partial(self.progress, label)

    def on_token(self, label: str, limit: int) -> Callable[[str], None] | None:
        """A callback for `understand` that reports to `progress`: it is called once per token."""
        if self.progress is None:
            return None
        report, written = self.progress, 0

        def count(text: str) -> None:
            nonlocal written
            written += 1
            report(label, written, limit)

        return count


@dataclass(frozen=True)
class Model:
    """MODEL: a checkpoint, and the options of `generate` and `edit` that were attached to it."""

    lance: Lance
    guidance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Video:
    """A clip in memory: frames `[F, H, W, 3]` at so many per second."""

    frames: Tensor
    fps: float


@dataclass(frozen=True)
class VideoFile:
    """A clip that is still in its file; each node reads what it needs of it."""

    path: Path


def model_frames(media: Tensor | Video | VideoFile) -> Tensor:
    """Frames `[F, H, W, 3]` as the model looks at them: a VIDEO at 12 per second, pictures as they are."""
    if isinstance(media, VideoFile):
        return read_video(media.path)
    if isinstance(media, Video):
        return media.frames[sample_indices(media.frames.shape[0], media.fps)]
    return media


def whole_clip(video: Video | VideoFile) -> Video:
    """Every frame of a VIDEO."""
    return Video(*read_clip(video.path)) if isinstance(video, VideoFile) else video


def find_file(name: str, folders: Sequence[Path]) -> Path:
    """The file of that name in the first folder that has it; LanceError where the name leads out of the folders."""
    relative = os.path.normpath(name.removesuffix(" [input]"))
    anchor = Path("/lance").resolve()  # stands for any input folder
    if "\0" in name or not Path(os.path.normpath(anchor / relative)).is_relative_to(anchor):
        raise LanceError(f"'{name}' leaves the input folder; give a name inside it, or its folder with --input.")
    for folder in folders:
        if (folder / relative).is_file():
            return folder / relative
    places = ", ".join(str(folder) for folder in folders) or "no folder at all"
    raise LanceError(f"'{name}' is not in the input folders ({places}); put it there or name its folder with --input.")


def find_checkpoint(name: str, folders: Sequence[Path]) -> Path:
    """The checkpoint of that name: in a models folder, in its subfolder `lance`, the path itself, or built in."""
    if name == BUILT_IN_CHOICE:
        return BUILT_IN_FOLDER
    candidates = [folder / part / name for folder in folders for part in ("lance", "")]
    for path in (*candidates, Path(name)):
        if path.exists():
            return path
    if name == BUILT_IN:
        return BUILT_IN_FOLDER
    places = ", ".join(str(folder / "lance") for folder in folders) or "no folder at all"
    raise LanceError(
        f"there is no checkpoint '{name}' in the models folders ({places}); download it there, name the folder with"
        " --models, or choose another one with --model NAME."
    )


def find_lora(name: str, folders: Sequence[Path]) -> Path:
    """The LoRA of that name, in the subfolder `loras` of a models folder or in the folder, or else the path itself."""
    for path in (*(folder / part / name for folder in folders for part in ("loras", "")), Path(name)):
        if path.is_file():
            return path
    places = ", ".join(str(folder / "loras") for folder in folders) or "no folder at all"
    raise LanceError(f"there is no LoRA '{name}' in {places}; put it there, or name the models folder with --models.")


def output_file(output: Path, prefix: str) -> Path:
    """The path that begins the names of a node's files; LanceError where no file in the output folder can have it."""
    root = output.resolve()
    target = Path(os.path.normpath(root / (prefix or "ComfyUI")))
    try:
        inside = "\0" not in prefix and target != root and target.parent.resolve().is_relative_to(root)
        longest = max(len(os.fsencode(part)) for part in target.parts)
    except (OSError, ValueError):
        longest = MAX_NAME
    if longest >= MAX_NAME:
        raise LanceError(f"the path {prefix[:40]!a} is no file name; give a shorter one of ordinary letters.")
    if not inside:
        raise LanceError(f"the path '{prefix}' leaves the output folder {output}; give a prefix inside it.")
    if output.exists() and not output.is_dir():
        raise LanceError(f"the output {output} is a file; name a folder.")
    return output / target.relative_to(root)


def numbered(output: Path, prefix: str, height: int, width: int) -> Callable[[int, str], Path]:
    """Names for new files `<output>/<prefix>_00001_<suffix>`: (index, suffix) -> path.

    Numbers go on behind the highest that the folder has, so nothing is overwritten; %width%, %height%, %year%, %month%,
    %day%, %hour%, %minute%, %second% and %batch_num% are filled in, as ComfyUI does (folder_paths.py).
    """
    now = time.localtime()
    fields = {"width": width, "height": height, "year": now.tm_year}
    for name, value in zip(("month", "day", "hour", "minute", "second"), now[1:6]):
        fields[name] = f"{value:02}"
    for name, value in fields.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    path = output_file(output, prefix)
    pattern = re.compile(re.escape(path.name).replace("%batch_num%", r"\d+") + r"_(\d+)_?\..+")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    last = max((int(match[1]) for match in map(pattern.fullmatch, names) if match), default=0)

    def name(index: int, suffix: str) -> Path:
        stem = path.name.replace("%batch_num%", str(index))
        return path.with_name(f"{stem}_{last + 1 + index:05}_{suffix}")

    return name


def load_lance(session: Session, checkpoint: str, weight_dtype: str) -> tuple:
    dtype = session.dtype if weight_dtype == "default" else weight_dtype
    path = find_checkpoint(session.model or checkpoint, session.models)
    lance = stages.load_lance(path, device=session.device, dtype=dtype)
    if any("vae" in node.get("inputs", {}) for node in session.workflow.values()):
        stages.vae_of(lance)  # now, and not after the sampling
    return Model(lance), lance


def load_lora(session: Session, model: Model, lora_name: str, strength: float) -> tuple:
    lora = find_lora(lora_name, session.models)
    return (replace(model, lance=apply_loras(model.lance, [(lora, strength)])),)


def set_guidance(
    session: Session, model: Model, guidance_start, guidance_end, renorm, renorm_min, guidance_every
) -> tuple:
    guidance = {
        "guidance_interval": (guidance_start, guidance_end),
        "renorm": renorm,
        "renorm_min": renorm_min,
        "guidance_every": guidance_every,
    }
    return (replace(model, guidance=guidance),)


def encode_semantic(session: Session, model: Model, media, resolution: str) -> tuple:
    return (stages.encode_semantic(model.lance, model_frames(media), resolution=resolution_of(resolution)),)


def encode_latent(session: Session, vae: Lance, media, resolution: str) -> tuple:
    latent = stages.encode_latent(
        vae, model_frames(media), resolution=resolution_of(resolution), on_chunk=session.on_chunk("encode")
    )
    return ({"samples": latent},)


def below(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a chosen option's own inputs, under their short names."""
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


def understand(
    session: Session, model: Model, question, max_new_tokens, sampling, semantic, semantic_2, system, **chosen
) -> tuple:
    answer = stages.understand(
        model.lance,
        [one for one in (semantic, semantic_2) if one is not None] or None,
        question,
        system=system or None,
        max_new_tokens=max_new_tokens,
        on_token=session.on_token("answer", max_new_tokens),
        **below("sampling", chosen),
    )
    return (answer,)


def pixels_of(size: str, values: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Width and height for a choice of the `size` input and the values of its own inputs; None for the checkpoint's."""
    if size == "auto":
        return None, None
    if size == "custom":
        return values["width"], values["height"]
    return size_of(**values) if size == "megapixels" else official_size(size, **values)


def noise_options(seed: int, batch_size: int, grid: Callable[[], Sequence[int]]) -> dict[str, Any]:
    """What tells `generate` and `edit` to draw their noise as ComfyUI's samplers do: a batch from one generator."""
    check_whole("batch_size", batch_size, 1)
    if batch_size == 1:
        return {"seed": seed}
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return {"noise": torch.randn((batch_size, LATENT_CHANNELS, *grid()), generator=generator)}


def generate(
    session: Session,
    model: Model,
    prompt,
    size,
    frames,
    seed,
    batch_size,
    first_frame,
    steps,
    guidance,
    shift,
    **chosen,
) -> tuple:
    first = None if first_frame is None else first_frame["samples"]
    width, height = (None, None) if first is not None else pixels_of(size, below("size", chosen))
    grid = partial(stages.generation_grid, model.lance.config.resolutions, width, height, frames, first)
    latent = stages.generate(
        model.lance,
        prompt,
        width=width,
        height=height,
        frames=frames,
        first_frame=first,
        steps=steps,
        guidance=guidance,
        shift=shift,
        on_step=session.on_step("generate"),
        **noise_options(seed, batch_size, grid),
        **model.guidance,
    )
    return ({"samples": latent},)


def edit(
    session: Session,
    model: Model,
    semantic,
    latent,
    instruction,
    task,
    seed,
    batch_size,
    semantic_2,
    latent_2,
    steps,
    guidance,
    shift,
) -> tuple:
    latents = [one["samples"] for one in (latent, latent_2) if one is not None]
    edited = stages.edit(
        model.lance,
        [one for one in (semantic, semantic_2) if one is not None],
        latents,
        instruction,
        task=task,
        steps=steps,
        guidance=guidance,
        shift=shift,
        on_step=session.on_step("edit"),
        **noise_options(seed, batch_size, lambda: latents[-1].shape[2:]),
        **model.guidance,
    )
    return ({"samples": edited},)


def decode_video(session: Session, vae: Lance, latent, fps: float, source) -> tuple:
    """As in ComfyUI, but the clip is silent: the sound of a source is not carried over."""
    frames = stages.decode_video(vae, latent["samples"], on_chunk=session.on_chunk("decode"))
    return frames, Video(frames, fps)


def vae_encode(session: Session, vae, pixels: Tensor) -> tuple:
    height, width = (side - side % SPATIAL_COMPRESSION for side in pixels.shape[1:3])
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    pixels = pixels[:, top : top + height, left : left + width]
    return ({"samples": stages.encode_latent(vae, pixels, resolution=None)},)


def lance_example(session: Session, seed: int, frames: int, file: str) -> tuple:
    if file:
        path = find_file(file, session.inputs)
        pixels, kind = read_media(path)
        return pixels, VideoFile(path) if kind == "video" else Video(pixels, VIDEO_FPS), ""
    from .world.example import example  # the world is only loaded where it is used

    pixels, caption = example(seed, frames)
    return pixels, Video(pixels, VIDEO_FPS), caption


def load_image(session: Session, image: str) -> tuple:
    path = find_file(image, session.inputs)
    return read_image(path), transparency(path)


def transparency(path: Path) -> Tensor:
    """MASK `[1, H, W]` of a readable picture, 1 where it is transparent; `[1, 64, 64]` of zeros without alpha."""
    with Image.open(path) as picture:
        if not picture.has_transparency_data:
            return torch.zeros(1, 64, 64)
        alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
    return 1 - torch.from_numpy(np.array(alpha, dtype=np.float32) / 255)[None]


def image_from_batch(session: Session, image: Tensor, batch_index: int, length: int) -> tuple:
    count = image.shape[0]
    start = min(max(batch_index + count if batch_index < 0 else batch_index, 0), count - 1)
    return (image[start : start + max(length, 1)],)


def regex_replace(
    session: Session, string, regex_pattern, replace, case_insensitive, multiline, dotall, count
) -> tuple:
    chosen = ((re.IGNORECASE, case_insensitive), (re.MULTILINE, multiline), (re.DOTALL, dotall))
    flags = sum(flag for flag, on in chosen if on)
    try:
        return (re.sub(regex_pattern, replace, string, count=count, flags=flags),)
    except (re.error, IndexError) as error:
        raise LanceError(f"the pattern '{regex_pattern}' is not a regular expression ({error}); correct it.") from None


def save_image(session: Session, images: Tensor, filename_prefix: str = "preview") -> Shown:
    name = numbered(session.output, filename_prefix, *images.shape[1:3])
    text = {"prompt": json.dumps(session.workflow)}
    files = tuple(write_png(image, name(index, ".png"), text=text) for index, image in enumerate(images))
    return Shown((images,), files)


def save_video(session: Session, video: Video | VideoFile, filename_prefix: str, **formats) -> Shown:
    clip = whole_clip(video)
    path = numbered(session.output, filename_prefix, *clip.frames.shape[1:3])(0, ".mp4")
    write_mp4(clip.frames, path, fps=clip.fps, metadata={"prompt": json.dumps(session.workflow)})
    return Shown((video,), (path,))


def preview_any(session: Session, source) -> Shown:
    text = source if isinstance(source, str) else as_text(source)
    return Shown((text,), text=text)


def as_text(value) -> str:
    try:
        return str(value) if isinstance(value, (int, float)) else json.dumps(value, indent=4, ensure_ascii=False)
    except TypeError:
        return str(value)


def get_video_components(session: Session, video: Video | VideoFile) -> tuple:
    clip = whole_clip(video)
    return clip.frames, None, clip.fps, 8, "sRGB"


def primitive(type_name: str) -> Node:
    return Node({"value": Input(type_name)}, (type_name,), lambda session, value: (value,))


TEXT = Input("STRING")
RESOLUTION = Input("COMBO", "auto", RESOLUTION_CHOICES)
SAMPLING = {
    "seed": Input("INT", stages.SEED),
    "steps": Input("INT", Sampling.steps),
    "guidance": Input("FLOAT", Sampling.guidance),
    "batch_size": Input("INT", 1),
    "shift": Input("FLOAT", Sampling.shift),
}


def choice(**choices: Mapping[str, Input]) -> Input:
    """A combo whose options bring inputs of their own; the first is the default."""
    return Input("COMBO", next(iter(choices)), tuple(choices), choices)


def bucket(aspect_ratio: str) -> dict[str, Input]:
    return {"aspect_ratio": Input("COMBO", aspect_ratio, OFFICIAL_RATIOS)}


SIZE = choice(
    auto={},
    image_768res=bucket("1:1"),
    image_512res=bucket("1:1"),
    video_480p=bucket("16:9"),
    video_360p=bucket("16:9"),
    megapixels={"aspect_ratio": Input("COMBO", "1:1", RATIOS), "megapixels": Input("FLOAT", 0.6)},
    custom={"width": Input("INT", 768), "height": Input("INT", 768)},
)
CODEC = {"codec": Input("COMBO", "auto", ("auto", "h264"))}

NODES: dict[str, Node] = {
    "LoadLance": Node(
        {"checkpoint": TEXT, "weight_dtype": Input("COMBO", "default", ("default", "bf16", "fp32"))},
        ("MODEL", "VAE"),
        load_lance,
    ),
    "EncodeSemantic": Node(
        {"model": Input("MODEL"), "media": Input("IMAGE,VIDEO"), "resolution": RESOLUTION},
        ("LANCE_SEMANTIC",),
        encode_semantic,
    ),
    "EncodeLatent": Node(
        {"vae": Input("VAE"), "media": Input("IMAGE,VIDEO"), "resolution": RESOLUTION}, ("LATENT",), encode_latent
    ),
    "LanceUnderstand": Node(
        {
            "model": Input("MODEL"),
            "question": TEXT,
            "max_new_tokens": Input("INT", 256),
            "sampling": choice(
                off={},
                on={
                    "temperature": Input("FLOAT", 0.7),
                    "top_p": Input("FLOAT", 0.9),
                    "top_k": Input("INT", 0),
                    "seed": Input("INT", 0),
                },
            ),
            "semantic": Input("LANCE_SEMANTIC", None),
            "semantic_2": Input("LANCE_SEMANTIC", None),
            "system": Input("STRING", ""),
        },
        ("STRING",),
        understand,
    ),
    "LanceGenerate": Node(
        {
            "model": Input("MODEL"),
            "prompt": TEXT,
            "size": SIZE,
            "frames": Input("INT", 1),
            **SAMPLING,
            "first_frame": Input("LATENT", None),
        },
        ("LATENT",),
        generate,
    ),
    "LanceEdit": Node(
        {
            "model": Input("MODEL"),
            "semantic": Input("LANCE_SEMANTIC"),
            "latent": Input("LATENT"),
            "instruction": TEXT,
            "task": Input("COMBO", "edit", ("edit", "idip")),
            **SAMPLING,
            "semantic_2": Input("LANCE_SEMANTIC", None),
            "latent_2": Input("LATENT", None),
        },
        ("LATENT",),
        edit,
    ),
    "LanceGuidance": Node(
        {
            "model": Input("MODEL"),
            "guidance_start": Input("FLOAT", Sampling.interval[0]),
            "guidance_end": Input("FLOAT", Sampling.interval[1]),
            "renorm": Input("COMBO", Sampling.renorm, RENORMS),
            "renorm_min": Input("FLOAT", Sampling.renorm_min),
            "guidance_every": Input("INT", Sampling.guidance_every),
        },
        ("MODEL",),
        set_guidance,
    ),
    "LanceLora": Node(
        {"model": Input("MODEL"), "lora_name": TEXT, "strength": Input("FLOAT", 1.0)}, ("MODEL",), load_lora
    ),
    "LoraLoaderModelOnly": Node(
        {"model": Input("MODEL"), "lora_name": TEXT, "strength_model": Input("FLOAT", 1.0)},
        ("MODEL",),
        lambda session, model, lora_name, strength_model: load_lora(session, model, lora_name, strength_model),
    ),
    "DecodeVideo": Node(
        {
            "vae": Input("VAE"),
            "latent": Input("LATENT"),
            "fps": Input("FLOAT", float(VIDEO_FPS)),
            "source": Input("VIDEO", None),
        },
        ("IMAGE", "VIDEO"),
        decode_video,
    ),
    "VAEEncode": Node({"pixels": Input("IMAGE"), "vae": Input("VAE")}, ("LATENT",), vae_encode),
    "VAEDecode": Node(
        {"samples": Input("LATENT"), "vae": Input("VAE")},
        ("IMAGE",),
        lambda session, samples, vae: (stages.decode_video(vae, samples["samples"]),),
    ),
    "LanceExample": Node(
        # Here, where nodes cannot be exchanged, a file of one's own may take the drawing's place.
        {"seed": Input("INT", 0), "frames": Input("INT", 1), "file": Input("STRING", "")},
        ("IMAGE", "VIDEO", "STRING"),
        lance_example,
    ),
    "LoadImage": Node({"image": TEXT}, ("IMAGE", "MASK"), load_image),
    "LoadVideo": Node({"file": TEXT}, ("VIDEO",), lambda session, file: (VideoFile(find_file(file, session.inputs)),)),
    "GetVideoComponents": Node(
        {"video": Input("VIDEO")}, ("IMAGE", "AUDIO", "FLOAT", "INT", "COMBO"), get_video_components
    ),
    "CreateVideo": Node(
        {"images": Input("IMAGE"), "fps": Input("FLOAT", 30.0)},
        ("VIDEO",),
        lambda session, images, fps: (Video(images, fps),),
    ),
    "ImageFromBatch": Node(
        {"image": Input("IMAGE"), "batch_index": Input("INT", 0), "length": Input("INT", 1)},
        ("IMAGE",),
        image_from_batch,
    ),
    "SaveImage": Node(
        {"images": Input("IMAGE"), "filename_prefix": Input("STRING", "ComfyUI")}, ("IMAGE",), save_image, True
    ),
    "PreviewImage": Node({"images": Input("IMAGE")}, ("IMAGE",), save_image, True),
    "SaveVideo": Node(
        {
            "video": Input("VIDEO"),
            "filename_prefix": Input("STRING", "video/ComfyUI"),
            "format": choice(auto=CODEC, mp4=CODEC),
            **CODEC,
        },
        ("VIDEO",),
        save_video,
        True,
    ),
    "PreviewAny": Node({"source": Input("*")}, ("STRING",), preview_any, True),
    "PrimitiveString": primitive("STRING"),
    "PrimitiveStringMultiline": primitive("STRING"),
    "PrimitiveInt": primitive("INT"),
    "PrimitiveFloat": primitive("FLOAT"),
    "PrimitiveBoolean": primitive("BOOLEAN"),
    "StringConcatenate": Node(
        {"string_a": TEXT, "string_b": TEXT, "delimiter": Input("STRING", "")},
        ("STRING",),
        lambda session, string_a, string_b, delimiter: (delimiter.join((string_a, string_b)),),
    ),
    "StringReplace": Node(
        {"string": TEXT, "find": TEXT, "replace": TEXT},
        ("STRING",),
        lambda session, string, find, replace: (string.replace(find, replace),),
    ),
    "RegexReplace": Node(
        {
            "string": TEXT,
            "regex_pattern": TEXT,
            "replace": TEXT,
            "case_insensitive": Input("BOOLEAN", True),
            "multiline": Input("BOOLEAN", False),
            "dotall": Input("BOOLEAN", False),
            "count": Input("INT", 0),
        },
        ("STRING",),
        regex_replace,
    ),
}
