"""Sizes of a Lance model, read from its two configuration files.

Sources: `llm_config.json` and `Qwen2.5-VL-ViT/config.json` of the release (bytedance-research/Lance); `resolutions` in
the former is our own, for models that were trained at other sizes than the release.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from .errors import LanceError

LATENT_CHANNELS = 48
SPATIAL_COMPRESSION = 16  # pixels per latent row or column
TEMPORAL_COMPRESSION = 4  # frames per latent frame, after the first
MAX_LATENT_FRAMES = 31  # 121 pixel frames
MAX_LATENT_SIDE = 64  # rows and columns of the position table
VIDEO_FPS = 12  # frames per second of every clip the model reads or writes


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2.5-VL vision tower. The defaults are the release's."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 2048
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 2
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class TextConfig:
    """The two-expert Qwen2.5 decoder. The defaults are the release's."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tokens_per_second: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Resolution:
    """The side, in pixels, of the square bucket of each branch.

    ratio: width to height of what is painted in it unless a size is asked for; frames: likewise, of a clip.
    """

    vae: int
    vit: int
    ratio: tuple[int, int] = (1, 1)
    frames: int = 49


RESOLUTIONS = {
    "image_256res": Resolution(vae=256, vit=224),
    "image_512res": Resolution(vae=512, vit=448),
    "image_768res": Resolution(vae=768, vit=672),
    "video_192p": Resolution(vae=256, vit=224, ratio=(16, 9)),
    "video_360p": Resolution(vae=480, vit=476, ratio=(16, 9)),
    "video_480p": Resolution(vae=640, vit=616, ratio=(16, 9)),
}


@dataclass(frozen=True)
class Resolutions:
    """Those that a model knows best, of pictures and of clips. The defaults are the release's."""

    image: Resolution = RESOLUTIONS["image_768res"]
    video: Resolution = RESOLUTIONS["video_480p"]

    def of(self, frames: int) -> Resolution:
        """That of so many frames: one is a picture."""
        return self.image if frames == 1 else self.video


@dataclass(frozen=True)
class LanceConfig:
    """Both towers of one checkpoint, and the sizes that it was trained at."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    resolutions: Resolutions = Resolutions()


def _pick(cls, values: dict, source: str):
    """`cls` from the entries of `values` that it knows; its own defaults for those that are absent."""
    known = {}
    for field in fields(cls):
        if field.name not in values:
            if field.default is MISSING:
                raise LanceError(f"{source}: '{field.name}' is missing; download the file again.")
            continue
        value = values[field.name]
        if isinstance(field.default, tuple):
            ok = isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value)
            value = tuple(value) if ok else value
        elif isinstance(field.default, float):
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        else:
            ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not ok:
            raise LanceError(f"{source}: '{field.name}' is {value!r}, which is not a size; download the file again.")
        known[field.name] = value
    return cls(**known)


def text_config(values: dict, source: str = "llm_config.json") -> TextConfig:
    """The decoder's sizes from the contents of `llm_config.json`; raises LanceError where they contradict."""
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    flat = dict(values)
    if "mrope_section" in scaling:
        flat["mrope_section"] = scaling["mrope_section"]
    if "tokens_per_second" in (values.get("vision_config") or {}):
        flat["tokens_per_second"] = values["vision_config"]["tokens_per_second"]
    config = _pick(TextConfig, flat, source)
    if config.hidden_size % config.num_attention_heads or config.num_attention_heads % config.num_key_value_heads:
        raise LanceError(f"{source}: hidden size, heads and key/value heads do not divide; download the file again.")
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise LanceError(
            f"{source}: the rotary sections {list(config.mrope_section)} do not fill a head of {config.head_dim};"
            " download the file again."
        )
    return config


def vision_config(values: dict, source: str = "config.json") -> VisionConfig:
    """The vision tower's sizes from the contents of its `config.json`."""
    flat = dict(values)
    if "in_chans" in values:
        flat["in_channels"] = values["in_chans"]
    config = _pick(VisionConfig, flat, source)
    if config.hidden_size % config.num_heads:
        raise LanceError(f"{source}: hidden size and heads do not divide; download the file again.")
    return config


def resolutions_config(values: dict, source: str = "llm_config.json") -> Resolutions:
    """The sizes that the model was trained at, from the contents of `llm_config.json`.

    {"resolutions": {"image": {"vae": 64, "vit": 112, "ratio": [1, 1]}, "video": {..., "frames": 9}}}; what is absent is
    as in the release. Raises LanceError for values that are no sizes.
    """
    given = values.get("resolutions", {})
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise LanceError(f"{source}: 'resolutions' is {given!r}, where sizes by kind belong; download the file again.")
    kinds = [field.name for field in fields(Resolutions) if field.name in given]
    found = Resolutions(**{kind: _pick(Resolution, given[kind], source) for kind in kinds})
    for ratio in (found.image.ratio, found.video.ratio):
        if len(ratio) != 2 or min(ratio) < 1:
            raise LanceError(f"{source}: the ratio {list(ratio)} is not a width to a height; download the file again.")
    return found


def read_json(path: Path, cure: str = "download it again") -> dict:
    """The object in a JSON file; raises LanceError naming the file and the cure where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LanceError(f"{path} cannot be read ({error.strerror}); {cure}.") from None
    except ValueError:
        raise LanceError(f"{path} is not valid JSON; {cure}.") from None
    if not isinstance(values, dict):
        raise LanceError(f"{path} does not hold a JSON object; {cure}.")
    return values
