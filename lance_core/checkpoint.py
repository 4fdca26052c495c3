"""Checkpoints: find one, say what is missing or wrong, read it, place it on a device, write one.

The layout is the release's (bytedance-research/Lance): `Lance_3B/` or `Lance_3B_Video/` with the language model and the
tokenizer, and beside them `Qwen2.5-VL-ViT/` and `Wan2.2_VAE.pth`. Every header is read and checked before a byte is
allocated. Tensors then go from the file into the model piece by piece, through a small buffer and not through a memory
map: the mapped pages of a 28 GB file would count as this process's memory.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import struct
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import Attention, attention as default_attention
from .config import (
    MAX_LATENT_FRAMES,
    MAX_LATENT_SIDE,
    LanceConfig,
    TextConfig,
    VisionConfig,
    read_json,
    text_config,
    vision_config,
)
from .errors import LanceError
from .tokenizer import IM_END, IM_START, VIDEO_PAD, VISION_END, VISION_START, Tokenizer, load_tokenizer
from .transformer import LanceTransformer, latent_position_rows
from .vae import VAEConfig, WanVAE, vae_config
from .vit import VisionTower

REPOSITORY = "bytedance-research/Lance"
LANGUAGE_FOLDERS = {"image": "Lance_3B", "video": "Lance_3B_Video"}
VISION_FOLDER = "Qwen2.5-VL-ViT"
WEIGHTS, EMA_WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "ema.safetensors", "model.safetensors.index.json"
VISION_WEIGHTS = f"{VISION_FOLDER}/vit.safetensors"
VISION_CONFIG = f"{VISION_FOLDER}/config.json"
VAE_WEIGHTS = "Wan2.2_VAE.pth"
VAE_NAMES = (VAE_WEIGHTS, "Wan2.2_VAE.safetensors", "wan2.2_vae.safetensors")

POSITION_TABLE = "latent_pos_embed.pos_embed"  # fixed, and computed when needed: never read
VISION_PREFIX = "vit_model."
VAE_PREFIXES = ("encoder.", "decoder.", "conv1.", "conv2.")

STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMPUTE_TYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
}
CHUNK = 2**23  # elements that are read at once: 32 MB of float32
MAPPED = 2**28  # bytes of a `.pth` that are mapped before its pages are given back


@dataclass(frozen=True)
class CheckpointFiles:
    """Where the files of one checkpoint are. None: there is none (a vision tower may still be bundled)."""

    folder: Path  # of the language model
    variant: str  # "image" or "video"
    language_model: Path | None  # a safetensors file, or the index of several
    llm_config: Path | None
    tokenizer: Path  # the folder in which `tokenizer.json` belongs
    vision: Path | None
    vision_config: Path | None
    vae: Path | None


class Stored(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    file: Path
    name: str
    dtype: str  # "F32", "BF16", "F16": the names of safetensors
    shape: tuple[int, ...]
    offset: int | None  # of its first byte in the file; None in a `.pth`


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint, by network, under the names of that network's parameters."""

    language: Mapping[str, Stored]
    vision: Mapping[str, Stored]
    vae: Mapping[str, Stored]
    position_table: Stored | None


@dataclass(frozen=True)
class Lance:
    """A loaded model. `vision` and `vae` are None where the checkpoint has none."""

    config: LanceConfig
    transformer: LanceTransformer
    vision: VisionTower | None
    vae: WanVAE | None
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Inspection:
    """What a folder holds, from headers alone; `str()` makes a table of it."""

    folder: Path
    variant: str
    files: tuple[tuple[Path, int, str], ...]  # path, bytes, stored types
    parameters: Mapping[str, int]  # by part of the model
    position_rows: int | None
    tokens: int | None
    problems: tuple[str, ...]  # what is missing or wrong, a sentence each

    def __str__(self) -> str:
        root = self.folder.parent
        rows = [(os.path.relpath(path, root), f"{size / 1e6:,.1f} MB", types) for path, size, types in self.files]
        rows += [("", "", "")]
        rows += [(part, f"{count / 1e6:,.3f} M", "parameters") for part, count in self.parameters.items()]
        rows += [("total", f"{sum(self.parameters.values()) / 1e6:,.3f} M", "parameters"), ("", "", "")]
        if self.position_rows is not None:
            rows.append(("position table", f"{self.position_rows:,}", "rows"))
        if self.tokens is not None:
            rows.append(("tokenizer", f"{self.tokens:,}", "tokens"))
        left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"Lance, {self.variant} variant: {self.folder}", ""]
        lines += [f"{a:<{left}}  {b:>{middle}}  {c}".rstrip() for a, b, c in rows]
        lines += ["", *(self.problems or ("complete",))]
        return "\n".join(lines)


# ---- find


def find_checkpoint(path: str | Path) -> CheckpointFiles:
    """The files of the checkpoint at `path`, of which any may be missing; nothing is opened.

    `path` is a folder in the release's layout that holds one language model, a language model's folder, or a single
    safetensors file (its configuration and tokenizer beside it). Vision tower and VAE are looked for in the language
    model's folder and in the one above. Raises LanceError where there is no checkpoint, or more than one.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LanceError(f"{path} is not a checkpoint; give a .safetensors file or a release's folder.")
        return _files(path.parent, path, "video" if "video" in path.stem.lower() else _variant(path.parent))
    if not path.is_dir():
        raise LanceError(f"{path} does not exist; get Lance with `{_download('', path)}`.")
    weights = _weights(path)
    if weights or (path / "llm_config.json").is_file():
        return _files(path, weights, _variant(path))
    folders = [path / name for name in LANGUAGE_FOLDERS.values() if (path / name).is_dir()]
    if len(folders) > 1:
        raise LanceError(f"{path} holds two models: name one of them, {folders[0]} or {folders[1]}.")
    if folders:
        return find_checkpoint(folders[0])
    if path.name in LANGUAGE_FOLDERS.values():
        return _files(path, None, _variant(path))
    if any((path / name).exists() for name in (VISION_FOLDER, *VAE_NAMES)):
        return _files(path / LANGUAGE_FOLDERS["image"], None, "image")
    raise LanceError(f"{path} holds no Lance checkpoint; get one with `{_download('', path)}`.")


def list_checkpoints(folder: str | Path) -> list[str]:
    """Names of the checkpoints in a folder of models: with the folder before it, each is a path for `find_checkpoint`.

    Listed are language models' folders, here or in a release's folder, and single files; nothing is opened.
    """
    folder = Path(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in entries if path.suffix == ".safetensors" and path.name not in VAE_NAMES]
    inside = [path / name for path in entries for name in ("", *LANGUAGE_FOLDERS.values())]
    return [path.relative_to(folder).as_posix() for path in (*(p for p in inside if _weights(p)), *files)]


def _files(folder: Path, weights: Path | None, variant: str) -> CheckpointFiles:
    around = (folder, folder.parent)
    return CheckpointFiles(
        folder=folder,
        variant=variant,
        language_model=weights,
        llm_config=_first([folder / "llm_config.json"]),
        tokenizer=folder,
        vision=_first(place / VISION_WEIGHTS for place in around),
        vision_config=_first(place / VISION_CONFIG for place in around),
        vae=_first(place / name for place in around for name in VAE_NAMES),
    )


def _weights(folder: Path) -> Path | None:
    return _first(folder / name for name in (WEIGHTS, EMA_WEIGHTS, WEIGHTS_INDEX))


def _first(candidates: Iterable[Path]) -> Path | None:
    return next((path for path in candidates if path.is_file()), None)


def _variant(folder: Path) -> str:
    return "video" if "video" in folder.name.lower() else "image"


def _download(name: str, root: Path) -> str:
    return " ".join(["hf download", REPOSITORY, *([name] if name else []), "--local-dir", shlex.quote(str(root))])


def _remedy(files: CheckpointFiles, name: str) -> str:
    """How to get a file of the release, e.g. `tokenizer.json` of the language model or `Wan2.2_VAE.pth`."""
    shared = name in (VISION_WEIGHTS, VISION_CONFIG, VAE_WEIGHTS)
    released = name if shared else f"{LANGUAGE_FOLDERS[files.variant]}/{name}"
    if files.folder.name == LANGUAGE_FOLDERS[files.variant]:
        return f"download it with `{_download(released, files.folder.parent)}`"
    return f"download {released} of {REPOSITORY} into {files.folder}"


# ---- read headers


def read_header(path: str | Path) -> dict[str, Stored]:
    """Every tensor of a `.safetensors` or `.pth` file, by name, without reading its data.

    A `.pth` is unpickled with `weights_only`: nothing in it runs. Raises LanceError for a file that is missing, cut
    off, damaged, or whose header contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise LanceError(f"{path} does not exist; download it into {path.parent}.")
    return _pickle_header(path) if path.suffix == ".pth" else _safetensors_header(path)


def _safetensors_header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt"):  # checks types, shapes and offsets against each other and the file
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise LanceError(
            f"{path} cannot be read, it is cut off or damaged ({_brief(error)}); download it again."
        ) from None
    return {
        name: Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _pickle_header(path: Path) -> dict[str, Stored]:
    types = {dtype: name for name, dtype in STORED_TYPES.items()}
    return {
        name: Stored(path, name, types.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), None)
        for name, tensor in _open_pickle(path).items()
    }


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, memory-mapped."""
    remedy = f"use {VAE_WEIGHTS} of {REPOSITORY}"
    try:
        archive = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if archive else None
    except pickle.UnpicklingError:
        raise LanceError(f"{path} was refused: it holds more than tensors and could run code; {remedy}.") from None
    except Exception as error:  # a damaged archive makes torch raise whatever its parsers meet first
        raise LanceError(f"{path} cannot be read, it is damaged ({_brief(error)}); {remedy}.") from None
    if not archive:
        raise LanceError(f"{path} was not opened: it is cut off, or no archive of tensors; {remedy}.")
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise LanceError(f"{path} is not a table of named tensors; {remedy}.")
    return tensors


def _brief(error: Exception) -> str:
    """The first sentence of an error, to stand inside one of ours."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def read_contents(files: CheckpointFiles) -> Contents:
    """All tensors of a checkpoint, from headers. Raises LanceError as `read_header` does."""
    return _contents(files, {path: read_header(path) for path in _tensor_files(files, _shards(files.language_model))})


def _tensor_files(files: CheckpointFiles, shards: Sequence[Path]) -> list[Path]:
    return [path for path in (*shards, files.vision, files.vae) if path]


def _contents(files: CheckpointFiles, headers: Mapping[Path, Mapping[str, Stored]]) -> Contents:
    """Sorts the tensors of all files by network.

    What the language model's file bundles stands in for the file of its own, as in the official loader.
    """
    networks: dict[str, dict[str, Stored]] = {"language": {}, "table": {}}
    networks["vision"] = dict(headers.get(files.vision, {}))
    networks["vae"] = dict(headers.get(files.vae, {}))
    for path, header in headers.items():
        if path not in (files.vision, files.vae):
            for name, stored in header.items():
                network, parameter = _network(name)
                networks[network][parameter] = stored
    table = networks.pop("table").get(POSITION_TABLE)
    return Contents(**networks, position_table=table)


def _shards(path: Path | None) -> list[Path]:
    """The safetensors files behind a language model's path: itself, or those its index names."""
    if path is None or path.suffix != ".json":
        return [path] if path else []
    names = read_json(path).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else {None}
    if not all(isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name for name in names):
        raise LanceError(f"{path} does not name the safetensors files beside it; download it again.")
    return [path.parent / name for name in sorted(names)]


def _network(name: str) -> tuple[str, str]:
    """The network a tensor of the language model's file belongs to, and the name of its parameter there."""
    if name == POSITION_TABLE:
        return "table", name
    if name.startswith(VISION_PREFIX):
        return "vision", name.removeprefix(VISION_PREFIX)
    bare = name.removeprefix("vae.")
    if bare.startswith(VAE_PREFIXES):
        return "vae", bare
    return "language", name


# ---- check


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def official_shapes(config: LanceConfig, vae: VAEConfig, *, variant: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of every tensor in the release's files, `{file: {name: shape}}`, for models of these sizes.

    variant "image": a position table for one latent frame; "video": one for 31, and the vision tower bundled.
    """
    vision = parameter_shapes(VisionTower(config.vision, device="meta"))
    language = parameter_shapes(LanceTransformer(config.text, device="meta"))
    frames = MAX_LATENT_FRAMES if variant == "video" else 1
    language[POSITION_TABLE] = (frames * MAX_LATENT_SIDE**2, config.text.hidden_size)
    if variant == "video":
        language.update({VISION_PREFIX + name: shape for name, shape in vision.items()})
    return {
        f"{LANGUAGE_FOLDERS[variant]}/{WEIGHTS}": language,
        VISION_WEIGHTS: vision,
        VAE_WEIGHTS: parameter_shapes(WanVAE(vae, device="meta")),
    }


def read_config(files: CheckpointFiles) -> LanceConfig:
    """The sizes from the checkpoint's configuration files; the release's where a file is missing."""
    text, vision = TextConfig(), VisionConfig()
    if files.llm_config:
        values = read_json(files.llm_config)
        text = text_config(values, str(files.llm_config))
        if isinstance(values.get("vision_config"), dict):
            vision = vision_config(values["vision_config"], str(files.llm_config))
    if files.vision_config:
        vision = vision_config(read_json(files.vision_config), str(files.vision_config))
    return LanceConfig(text, vision)


def _differences(found: Mapping[str, Stored], expected: Mapping[str, tuple], file: Path, remedy: str) -> Iterator[str]:
    """A sentence for each way in which tensors differ from what a model of the configured sizes has."""
    missing = [name for name in expected if name not in found]
    if missing:
        yield f"{file}: the tensor '{missing[0]}' is missing{_more(missing)}; {remedy}."
    wrong = [name for name in expected if name in found and found[name].shape != expected[name]]
    if wrong:
        stored, shape = found[wrong[0]], list(expected[wrong[0]])
        yield (
            f"{stored.file}: the tensor '{stored.name}' is {list(stored.shape)} where {shape} is expected"
            f"{_more(wrong)}; {remedy}."
        )
    unknown = [name for name in found if name not in expected]
    if unknown:
        stored = found[unknown[0]]
        yield f"{stored.file}: the tensor '{stored.name}' is no part of Lance{_more(unknown)}; {remedy}."
    odd = [name for name in found if found[name].dtype not in STORED_TYPES]
    if odd:
        stored = found[odd[0]]
        yield (
            f"{stored.file}: the tensor '{stored.name}' is stored as {stored.dtype} where one of"
            f" {', '.join(STORED_TYPES)} is expected{_more(odd)}; {remedy}."
        )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _language_problems(files: CheckpointFiles, contents: Contents, config: LanceConfig) -> Iterator[str]:
    """What keeps the language model from being loaded, a sentence each."""
    if files.language_model is None:
        yield f"{files.folder / WEIGHTS} is missing; {_remedy(files, WEIGHTS)}."
        return
    remedy = _remedy(files, WEIGHTS)
    if files.llm_config is None:
        remedy = f"for sizes other than the release's put llm_config.json into {files.folder}, otherwise {remedy}"
    expected = _expected(LanceTransformer, config.text, config.text.num_hidden_layers, contents.language, files)
    yield from _differences(contents.language, expected, files.language_model, remedy)


def _vision_problems(files: CheckpointFiles, contents: Contents, config: LanceConfig) -> Iterator[str]:
    """What keeps the vision tower, if there is one, from being loaded."""
    if not contents.vision:
        return
    expected = _expected(VisionTower, config.vision, config.vision.depth, contents.vision, files)
    source = next(iter(contents.vision.values())).file
    yield from _differences(contents.vision, expected, source, _remedy(files, VISION_WEIGHTS))
    if config.vision.out_hidden_size != config.text.hidden_size:
        yield (
            f"{source}: the vision tower's tokens are {config.vision.out_hidden_size} wide where the language model"
            f" takes {config.text.hidden_size}; use both from one release."
        )


def _expected(
    network: Callable[..., nn.Module],
    config: TextConfig | VisionConfig,
    layers: int,
    found: Mapping[str, Stored],
    files: CheckpointFiles,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network of configured sizes; raises LanceError where these cannot be."""
    absurd = LanceError(
        f"{files.folder}: the configuration describes a model that the weights cannot be ({layers} layers);"
        f" {_remedy(files, 'llm_config.json')}."
    )
    if layers > max(1, len(found)):  # every layer has several tensors; do not build a billion of them to find out
        raise absurd
    try:
        return parameter_shapes(network(config, device="meta"))
    except (RuntimeError, OverflowError, TypeError):  # sizes beyond 64 bits
        raise absurd from None


def _vae_config(contents: Contents) -> VAEConfig | None:
    """The VAE's sizes from its tensors; None without a VAE. Raises LanceError where it is no Wan 2.2 VAE."""
    if not contents.vae:
        return None
    file = next(iter(contents.vae.values())).file
    try:
        config = vae_config({name: stored.shape for name, stored in contents.vae.items()})
    except LanceError as error:
        raise LanceError(f"{file}: {error}") from None
    except (RuntimeError, OverflowError, TypeError):
        raise LanceError(f"{file}: its tensors have impossible shapes; use {VAE_WEIGHTS} of {REPOSITORY}.") from None
    for stored in contents.vae.values():
        if stored.dtype not in STORED_TYPES:
            raise LanceError(
                f"{file}: the tensor '{stored.name}' is stored as {stored.dtype} where one of"
                f" {', '.join(STORED_TYPES)} is expected; use {VAE_WEIGHTS} of {REPOSITORY}."
            )
    return config


def _tokenizer(files: CheckpointFiles, config: TextConfig) -> Tokenizer:
    path = files.tokenizer / "tokenizer.json"
    if not path.is_file():
        raise LanceError(f"{path} is missing; {_remedy(files, path.name)}.")
    tokenizer = load_tokenizer(files.tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise LanceError(
            f"{path} has {len(tokenizer)} tokens and the language model {config.vocab_size};"
            f" it is another model's, {_remedy(files, path.name)}."
        )
    for name in (IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD):
        tokenizer.special(name)
    return tokenizer


# ---- read and place


def load_lance(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str | Attention = "auto",
) -> Lance:
    """The model at `path` (see `find_checkpoint`), ready for inference.

    device: "auto" (CUDA, else MPS, else the CPU), a name or a torch.device. dtype: "auto" (bfloat16, on the CPU
    float32), "bf16", "fp32" or a torch.dtype; it is that of the weights and of the computation. attention: "auto" or
    "sdpa" for torch's, or a callable like `attention.attention`. A missing vision tower or VAE is None in the result.
    Beyond the model itself loading takes about 250 MB of host memory. Raises LanceError for whatever is missing,
    damaged or of the wrong shape, before any memory is taken.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    attend = resolve_attention(attention)
    return load_parts(find_checkpoint(path), device=device, dtype=dtype, attention=attend)


def load_parts(
    files: CheckpointFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: Attention = default_attention,
    operations=nn,
    vae: bool = True,
) -> Lance:
    """The model from these files, with a host's layers (`operations`) if it has some, and without the VAE on request.

    Otherwise as `load_lance`.
    """
    config = read_config(files)
    contents = read_contents(files)
    for problem in chain(_language_problems(files, contents, config), _vision_problems(files, contents, config)):
        raise LanceError(problem)
    vae_sizes = _vae_config(contents) if vae else None
    tokenizer = _tokenizer(files, config.text)

    factory = {"operations": operations, "dtype": dtype, "device": "meta"}
    transformer = LanceTransformer(config.text, attention=attention, **factory)
    vision = VisionTower(config.vision, attention=attention, **factory) if contents.vision else None
    first_stage = WanVAE(vae_sizes, **factory) if vae_sizes else None
    return Lance(
        config=config,
        transformer=_place(transformer, contents.language, device),
        vision=_place(vision, contents.vision, device) if vision else None,
        vae=_place(first_stage, contents.vae, device) if first_stage else None,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )


def load_vae(
    files: CheckpointFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    operations=nn,
    network: type[WanVAE] = WanVAE,
) -> WanVAE | None:
    """The VAE alone, as an instance of `network`; None where the checkpoint has none. Otherwise as `load_lance`."""
    contents = read_contents(files)
    config = _vae_config(contents)
    if config is None:
        return None
    return _place(network(config, operations=operations, dtype=dtype, device="meta"), contents.vae, device)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto": CUDA, else MPS, else the CPU. Raises LanceError where this machine has none."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, available in usable.items() if available))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise LanceError(f"{device!r} is not a device; use auto, cuda, mps or cpu.") from None
    if not usable.get(chosen.type, True):
        raise LanceError(f"The device {device} is not available here; use auto or cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise LanceError(f"The device {device} is not available here; this machine has {torch.cuda.device_count()}.")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute dtype of that name; "auto": float32 on the CPU, otherwise bfloat16.

    Raises LanceError for others, float16 among them: its range is too small for the language model.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = dtype if isinstance(dtype, torch.dtype) else COMPUTE_TYPES.get(dtype)
    if chosen == torch.float16:
        raise LanceError("Lance cannot compute in float16, which overflows in the language model; use bf16.")
    if chosen not in (torch.bfloat16, torch.float32):
        raise LanceError(f"Lance cannot compute in {dtype!r}; use auto, bf16 or fp32.")
    return chosen


def resolve_attention(attention: str | Attention) -> Attention:
    """The attention callable of that name; a callable is returned as it is."""
    if callable(attention):
        return attention
    if attention in ("auto", "sdpa"):
        return default_attention
    raise LanceError(f"{attention!r} is not an attention; use auto, sdpa or a callable.")


def _place(module: nn.Module, stored: Mapping[str, Stored], device: torch.device) -> nn.Module:
    """The module, from the meta device, with memory on `device` and in it the stored values."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    try:
        module = module.to_empty(device=device).requires_grad_(False).eval()
    except RuntimeError as error:
        raise LanceError(
            f"{type(module).__name__} needs {size / 1e9:.1f} GB on {device}, which has not enough free memory"
            f" ({_brief(error)}); free some, or use bf16 or another device."
        ) from None
    fill([(parameter, stored[name]) for name, parameter in module.named_parameters()])
    return module


def fill(places: Iterable[tuple[Tensor, Stored]]) -> None:
    """Reads stored tensors into given ones of the same shape, converting to their dtype and device on the way."""
    by_file: dict[Path, list[tuple[Tensor, Stored]]] = defaultdict(list)
    for target, stored in places:
        by_file[stored.file].append((target, stored))
    for path, group in by_file.items():
        (_fill_from_pickle if path.suffix == ".pth" else _fill_from_safetensors)(path, group)


def _fill_from_safetensors(path: Path, places: Sequence[tuple[Tensor, Stored]]) -> None:
    buffers = {name: torch.empty(CHUNK, dtype=STORED_TYPES[name]) for name in {stored.dtype for _, stored in places}}
    try:
        with open(path, "rb") as file:
            for target, stored in sorted(places, key=lambda place: place[1].offset):
                file.seek(stored.offset)
                for part in target.view(-1).split(CHUNK):
                    piece = buffers[stored.dtype][: part.numel()]
                    raw = piece.view(torch.uint8).numpy()
                    if file.readinto(raw) < raw.nbytes:
                        raise LanceError(f"{path} ended while it was read; download it again.")
                    part.copy_(piece)
    except OSError as error:
        raise LanceError(f"{path} could not be read to its end ({error.strerror}); download it again.") from None


def _fill_from_pickle(path: Path, places: Sequence[tuple[Tensor, Stored]]) -> None:
    tensors, mapped = _open_pickle(path), 0
    for target, stored in places:
        source = tensors[stored.name]
        target.copy_(source)
        mapped += source.numel() * source.element_size()
        if mapped > MAPPED:
            del source
            tensors, mapped = _open_pickle(path), 0


# ---- inspect


def inspect(path: str | Path) -> Inspection:
    """What the checkpoint at `path` holds and what it lacks, without loading it.

    Raises LanceError only where `find_checkpoint` does: a missing or damaged file is one of the problems.
    """
    files = find_checkpoint(path)
    problems: list[str] = []

    def attempt(step: Callable, default):
        try:
            return step()
        except LanceError as error:
            problems.append(str(error))
            return default

    shards = attempt(lambda: _shards(files.language_model), [])
    headers = {path: attempt(lambda: read_header(path), None) for path in _tensor_files(files, shards)}
    readable = {path: header for path, header in headers.items() if header is not None}
    contents = _contents(files, readable)
    config = attempt(lambda: read_config(files), None)
    if config and (files.language_model is None or shards and readable.keys() >= set(shards)):
        problems += attempt(lambda: list(_language_problems(files, contents, config)), [])
    if config:
        problems += attempt(lambda: list(_vision_problems(files, contents, config)), [])
    attempt(lambda: _vae_config(contents), None)
    tokenizer = attempt(lambda: _tokenizer(files, config.text if config else TextConfig()), None)
    if not files.llm_config:
        problems.append(f"{files.folder / 'llm_config.json'} is missing; {_remedy(files, 'llm_config.json')}.")
    if not files.vision and not contents.vision:
        problems.append(f"The vision tower is missing: Lance cannot see; {_remedy(files, VISION_WEIGHTS)}.")
    if not files.vae and not contents.vae:
        problems.append(f"The VAE is missing: Lance cannot read or make pictures; {_remedy(files, VAE_WEIGHTS)}.")
    return Inspection(
        folder=files.folder,
        variant=files.variant,
        files=tuple((file, _size(file), _types(header)) for file, header in headers.items()),
        parameters=_count(contents),
        position_rows=contents.position_table.shape[0] if contents.position_table else None,
        tokens=len(tokenizer) if tokenizer else None,
        problems=tuple(problems),
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _types(header: Mapping[str, Stored] | None) -> str:
    return "unreadable" if header is None else ", ".join(sorted({stored.dtype for stored in header.values()}))


def _count(contents: Contents) -> dict[str, int]:
    """Parameters by part of the model."""
    parts = dict.fromkeys(("embeddings", "understanding expert", "generation expert", "lm_head", "connectors"), 0)
    for name, stored in contents.language.items():
        parts[_part(name)] += prod(stored.shape)
    parts["vision tower"] = sum(prod(stored.shape) for stored in contents.vision.values())
    parts["VAE"] = sum(prod(stored.shape) for stored in contents.vae.values())
    return parts


def _part(name: str) -> str:
    if not name.startswith("language_model."):
        return "connectors"
    if "embed_tokens" in name:
        return "embeddings"
    if "lm_head" in name:
        return "lm_head"
    return "generation expert" if "_moe_gen" in name else "understanding expert"


# ---- write


def save_checkpoint(
    folder: str | Path,
    lance: Lance,
    tokenizer_specification: str,
    *,
    variant: str = "image",
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Writes a model in the release's layout and returns the folder.

    tokenizer_specification: the contents of `tokenizer.json`. dtype: that of the stored weights; the VAE's are float32,
    as in the release. The folder appears complete or not at all. Raises LanceError where it holds something already;
    with `overwrite`, only where that is more than a checkpoint.
    """
    folder = Path(folder).expanduser()
    held = _held(folder)
    layout = {*LANGUAGE_FOLDERS.values(), VISION_FOLDER, VAE_WEIGHTS}
    if held and not overwrite:
        raise LanceError(f"{folder} is not empty; name a new folder, or allow it to be overwritten.")
    if not held <= layout:
        raise LanceError(f"{folder} holds more than a Lance checkpoint ({min(held - layout)}); name a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            fresh, old = Path(temporary, "new"), Path(temporary, "old")
            _write(fresh, lance, tokenizer_specification, variant, dtype)
            if folder.exists():
                os.replace(folder, old)
            os.replace(fresh, folder)
    except OSError as error:
        raise LanceError(f"{folder} cannot be written ({error.strerror}); name another folder.") from None
    return folder


def _held(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError:
        raise LanceError(f"{folder} is not a folder one can write to; name another.") from None


def _write(root: Path, lance: Lance, specification: str, variant: str, dtype: torch.dtype) -> None:
    language_folder, vision_folder = root / LANGUAGE_FOLDERS[variant], root / VISION_FOLDER
    language_folder.mkdir(parents=True)
    vision_folder.mkdir()
    text, vision = lance.config.text, lance.config.vision

    vision_tensors = _tensors(lance.vision, dtype)
    tensors = _tensors(lance.transformer, dtype)
    frames = MAX_LATENT_FRAMES if variant == "video" else 1
    table = latent_position_rows(torch.arange(frames * MAX_LATENT_SIDE**2), text.hidden_size)
    tensors[POSITION_TABLE] = table.to(dtype)
    if variant == "video":
        tensors.update({VISION_PREFIX + name: tensor for name, tensor in vision_tensors.items()})
    save_file(tensors, language_folder / WEIGHTS)
    save_file(vision_tensors, vision_folder / "vit.safetensors")
    torch.save(_tensors(lance.vae, torch.float32), root / VAE_WEIGHTS)

    vision_values = {**asdict(vision), "in_chans": vision.in_channels, "model_type": "qwen2_5_vl"}
    _write_json(vision_folder / "config.json", vision_values)
    _write_json(language_folder / "llm_config.json", _llm_values(text, vision_values, lance.tokenizer))
    end = lance.tokenizer.special(IM_END)
    _write_json(language_folder / "generation_config.json", {"do_sample": False, "eos_token_id": end})
    _write_tokenizer(language_folder, specification)


def _tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", dtype).contiguous() for name, p in module.named_parameters()}


def _llm_values(text: TextConfig, vision_values: dict, tokenizer: Tokenizer) -> dict:
    values = asdict(text)
    sections = values.pop("mrope_section")
    values.pop("tokens_per_second")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **values,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_start_token_id": tokenizer.special(VISION_START),
        "vision_end_token_id": tokenizer.special(VISION_END),
        "video_token_id": tokenizer.special(VIDEO_PAD),
        "eos_token_id": tokenizer.special(IM_END),
        "vision_config": {**vision_values, "tokens_per_second": text.tokens_per_second},
    }


def _write_tokenizer(folder: Path, specification: str) -> None:
    """`tokenizer.json`, and from it the older files that the release has beside it."""
    values = json.loads(specification)
    (folder / "tokenizer.json").write_text(specification, encoding="utf-8")
    _write_json(folder / "vocab.json", values["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in values["added_tokens"]}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "eos_token": IM_END,
        "errors": "replace",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
