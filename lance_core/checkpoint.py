"""Checkpoints: what the files hold, whether it fits, and the model made from it.

Every header is read and checked before a byte is allocated. Tensors then go from the file into the model piece by
piece, so that loading takes hardly more memory than the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from .attention import Attention, attention as default_attention
from .config import (
    MAX_LATENT_FRAMES,
    MAX_LATENT_SIDE,
    LanceConfig,
    Resolutions,
    TextConfig,
    VisionConfig,
    read_json,
    resolutions_config,
    text_config,
    vision_config,
)
from .errors import LanceError
from .layout import (
    BUILT_IN_FOLDER,
    LANGUAGE_FOLDERS,
    REPOSITORY,
    VAE_WEIGHTS,
    VISION_WEIGHTS,
    WEIGHTS,
    CheckpointFiles,
    find_checkpoint,
    remedy,
    remedy_of,
)
from .packing import PARTS, REQUANTIZE, chosen_formats, packed_entries, stored_formats, whole_scales
from .placement import Placement, model_parts, resolve_memory, weight_bytes
from .quantized import MARKER, empty_packed, layer_shape, pack, replace_layer
from .storage import STORED_TYPES, Stored, brief, fill, is_float, read_header
from .tokenizer import IM_END, IM_START, VIDEO_PAD, VISION_END, VISION_START, Tokenizer, load_tokenizer
from .transformer import LanceTransformer
from .vae import VAEConfig, WanVAE, vae_config
from .vit import VisionTower

POSITION_TABLE = "latent_pos_embed.pos_embed"  # fixed, and computed when needed: never read
MODEL_PREFIX = "model.diffusion_model."  # ComfyUI's Model Save puts it before the decoder's names
VISION_PREFIX = "vit_model."
VAE_PREFIXES = ("encoder.", "decoder.", "conv1.", "conv2.")
COMPUTE_TYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint, by network, under the names of that network's parameters."""

    language: Mapping[str, Stored]
    vision: Mapping[str, Stored]
    vae: Mapping[str, Stored]
    position_table: Stored | None


@dataclass(frozen=True)
class Lance:
    """A loaded model. `vision` and `vae` are None where the checkpoint has none.

    placement: keeps the networks' weights within a budget of device memory; by default they are all on `device`.
    variant: which of the release's two it is, "image" (Lance_3B) or "video" (Lance_3B_Video).
    """

    config: LanceConfig
    transformer: LanceTransformer
    vision: VisionTower | None
    vae: WanVAE | None
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    placement: Placement = field(default_factory=Placement)
    variant: str = "image"


def read_contents(files: CheckpointFiles) -> Contents:
    """All tensors of a checkpoint, from headers. Raises LanceError as `read_header` does."""
    paths = tensor_files(files, shards(files.language_model))
    return sorted_contents(files, {path: read_header(path, remedy_of(files, path)) for path in paths})


def tensor_files(files: CheckpointFiles, shards: Sequence[Path]) -> list[Path]:
    return [path for path in (*shards, files.vision, files.vae) if path]


def sorted_contents(files: CheckpointFiles, headers: Mapping[Path, Mapping[str, Stored]]) -> Contents:
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


def shards(path: Path | None) -> list[Path]:
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
    name = name.removeprefix(MODEL_PREFIX)
    if name == POSITION_TABLE:
        return "table", name
    if name.startswith(VISION_PREFIX):
        return "vision", name.removeprefix(VISION_PREFIX)
    bare = name.removeprefix("vae.")
    if bare.startswith(VAE_PREFIXES):
        return "vae", bare
    return "language", name


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
    text, vision, resolutions = TextConfig(), VisionConfig(), Resolutions()
    if files.llm_config:
        values = read_json(files.llm_config, remedy_of(files, files.llm_config))
        text = text_config(values, str(files.llm_config))
        resolutions = resolutions_config(values, str(files.llm_config))
        if isinstance(values.get("vision_config"), dict):
            vision = vision_config(values["vision_config"], str(files.llm_config))
    if files.vision_config:
        values = read_json(files.vision_config, remedy_of(files, files.vision_config))
        vision = vision_config(values, str(files.vision_config))
    return LanceConfig(text, vision, resolutions)


def _differences(
    found: Mapping[str, Stored],
    expected: Mapping[str, tuple],
    file: Path,
    remedy: str,
    types: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A sentence for each way in which tensors differ from what a model of the configured sizes has.

    types: of those tensors that are not stored as floating point numbers of any size.
    """
    types = types or {}
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
    odd = [n for n, stored in found.items() if (stored.dtype != types[n] if n in types else not is_float(stored))]
    if odd:
        stored = found[odd[0]]
        due = types.get(odd[0], f"one of {', '.join(STORED_TYPES)}")
        yield (
            f"{stored.file}: the tensor '{stored.name}' is stored as {stored.dtype} where {due} is expected"
            f"{_more(odd)}; {remedy}."
        )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def language_problems(files: CheckpointFiles, contents: Contents, config: LanceConfig) -> Iterator[str]:
    """What keeps the language model from being loaded, a sentence each."""
    if files.language_model is None:
        yield f"{files.folder / WEIGHTS} is missing; {remedy(files, WEIGHTS)}."
        return
    cure = remedy(files, WEIGHTS)
    if files.llm_config is None:
        cure = f"for sizes other than the release's put llm_config.json into {files.folder}, otherwise {cure}"
    expected = _expected(LanceTransformer, config.text, config.text.num_hidden_layers, contents.language, files)
    formats = {
        layer: format for layer, format in stored_formats(contents.language).items() if f"{layer}.weight" in expected
    }
    packed = packed_entries(expected, formats)
    markers = {layer + MARKER: contents.language[layer + MARKER] for layer in formats}
    types = {name: type for name, (type, _) in packed.items()} | {name: "U8" for name in markers}
    expected |= {name: shape for name, (_, shape) in packed.items()} | whole_scales(contents.language, formats)
    expected |= {name: marker.shape for name, marker in markers.items()}
    yield from _differences(contents.language, expected, files.language_model, REQUANTIZE if formats else cure, types)


def vision_problems(files: CheckpointFiles, contents: Contents, config: LanceConfig) -> Iterator[str]:
    """What keeps the vision tower, if there is one, from being loaded."""
    if not contents.vision:
        return
    expected = _expected(VisionTower, config.vision, config.vision.depth, contents.vision, files)
    source = next(iter(contents.vision.values())).file
    yield from _differences(contents.vision, expected, source, remedy(files, VISION_WEIGHTS))
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
        f" {remedy(files, 'llm_config.json')}."
    )
    if layers > max(1, len(found)):  # every layer has several tensors; do not build a billion of them to find out
        raise absurd
    try:
        return parameter_shapes(network(config, device="meta"))
    except (RuntimeError, OverflowError, TypeError):  # sizes beyond 64 bits
        raise absurd from None


def checked_vae_config(contents: Contents) -> VAEConfig | None:
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


def checked_tokenizer(files: CheckpointFiles, config: TextConfig) -> Tokenizer:
    path = files.tokenizer / "tokenizer.json"
    if not path.is_file():
        raise LanceError(f"{path} is missing; {remedy(files, path.name)}.")
    tokenizer = load_tokenizer(files.tokenizer, remedy(files, path.name))
    if len(tokenizer) > config.vocab_size:
        raise LanceError(
            f"{path} has {len(tokenizer)} tokens and the language model {config.vocab_size};"
            f" it is another model's, {remedy(files, path.name)}."
        )
    for name in (IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD):
        tokenizer.special(name)
    return tokenizer


def load_lance(
    path: str | Path = BUILT_IN_FOLDER,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str | Attention = "auto",
    weights: str = "auto",
    memory: str | float | None = "auto",
    compiled: bool = False,
) -> Lance:
    """The model at `path` (see `find_checkpoint`; by default the built-in one), ready for inference.

    device: "auto" (CUDA, else MPS, else the CPU), a name or a torch.device. dtype: "auto" (bfloat16, on the CPU
    float32), "bf16", "fp32" or a torch.dtype; it is that of the weights and of the computation. attention: "auto" or
    "sdpa" for torch's, or a callable like `attention.attention`. weights: "auto" leaves quantised ones as stored and
    has others in dtype; one of `quantized.FORMATS` quantises the decoder's projections, one by one. memory: GiB of
    device memory to make do with, weights included; what does not fit waits in the host's memory. "auto": what is free
    on a CUDA device now, but for half a GiB, elsewhere no limit; None: no limit. compiled: the decoder's layers at
    their first use, which takes a minute or so, and on CUDA the writing of text as a graph; results stay equal but for
    rounding. A missing vision tower or VAE is None in the result.
    Beyond the model itself loading takes about 250 MB of host memory. Raises LanceError for whatever is missing,
    damaged or of the wrong shape, before any memory is taken.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    attend = resolve_attention(attention)
    budget = resolve_memory(memory, device)
    files = find_checkpoint(path)
    lance = load_parts(files, device=device, dtype=dtype, attention=attend, weights=weights, budget=budget)
    if compiled:
        lance.transformer.compile_layers(device)
    return lance


def examine(files: CheckpointFiles) -> tuple[LanceConfig, Contents, Tokenizer]:
    """Sizes, tensors and tokenizer of a checkpoint that can be loaded; raises LanceError for the first thing amiss."""
    config = read_config(files)
    contents = read_contents(files)
    for problem in chain(language_problems(files, contents, config), vision_problems(files, contents, config)):
        raise LanceError(problem)
    return config, contents, checked_tokenizer(files, config.text)


@torch.inference_mode(False)  # under it weights could not be moved later
def load_parts(
    files: CheckpointFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: Attention = default_attention,
    operations=nn,
    vae: bool = True,
    weights: str = "auto",
    budget: int | None = None,
) -> Lance:
    """The model from these files, with a host's layers (`operations`) if it has some, and without the VAE on request.

    budget: bytes of device memory; None: no limit. Otherwise as `load_lance`.
    """
    empty, contents, formats = empty_parts(
        files, dtype=dtype, attention=attention, operations=operations, vae=vae, weights=weights
    )
    fits = budget is None or weight_bytes(empty.transformer, empty.vision, empty.vae) <= budget
    home = device if fits else torch.device("cpu")
    transformer = _place(empty.transformer, contents.language, home, dtype, formats)
    vision = _place(empty.vision, contents.vision, home, dtype) if empty.vision else None
    first_stage = _place(empty.vae, contents.vae, home, dtype) if empty.vae else None
    parts = model_parts(transformer, vision, first_stage, present=fits)
    return Lance(
        config=empty.config,
        transformer=transformer,
        vision=vision,
        vae=first_stage,
        tokenizer=empty.tokenizer,
        device=device,
        dtype=dtype,
        placement=Placement(parts, device, budget),
        variant=files.variant,
    )


def empty_parts(
    files: CheckpointFiles,
    *,
    dtype: torch.dtype,
    attention: Attention = default_attention,
    operations=nn,
    vae: bool = True,
    weights: str = "auto",
) -> tuple[Lance, Contents, dict[str, str]]:
    """The model of these files on the meta device, what fills it, and the formats of its quantised layers."""
    config, contents, tokenizer = examine(files)
    vae_sizes = checked_vae_config(contents) if vae else None
    factory = {"operations": operations, "dtype": dtype, "device": "meta"}
    stored = stored_formats(contents.language)
    formats = chosen_formats(weights, contents.language, stored, files.language_model)
    transformer = LanceTransformer(config.text, attention=attention, **factory)
    for layer, format in formats.items():
        replace_layer(transformer, layer, format, empty_packed(format, layer_shape(transformer, layer)))
    vision = VisionTower(config.vision, attention=attention, **factory) if contents.vision else None
    first_stage = WanVAE(vae_sizes, **factory) if vae_sizes else None
    empty = Lance(config, transformer, vision, first_stage, tokenizer, torch.device("meta"), dtype)
    return empty, contents, formats


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto": CUDA, else MPS, else the CPU. Raises LanceError where this machine has none."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable["xpu"] = hasattr(torch, "xpu") and torch.xpu.is_available()
    if device == "auto":
        return torch.device(next(name for name, available in usable.items() if available))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise LanceError(f"{device!r} is not a device; use auto, cuda, mps or cpu.") from None
    if not usable.get(chosen.type, False):
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
    chosen = dtype if isinstance(dtype, torch.dtype) else COMPUTE_TYPES.get(str(dtype))
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


def _place(
    module: nn.Module,
    stored: Mapping[str, Stored],
    device: torch.device,
    dtype: torch.dtype,
    formats: Mapping[str, str] | None = None,
) -> nn.Module:
    """The module, built on the meta device, with the stored values as its parameters on `device`.

    formats: of the layers that are quantised, of which some are stored so and the others are read one by one.
    """
    formats = formats or {}
    own = {layer + end for layer in formats for end in (*(f".{part}" for part in PARTS), MARKER)}
    dense = {name: entry for name, entry in stored.items() if name not in own}
    try:
        tensors = {name: torch.empty(entry.shape, dtype=dtype, device=device) for name, entry in dense.items()}
        packed = {layer: empty_packed(format, layer_shape(module, layer), device) for layer, format in formats.items()}
    except RuntimeError as error:
        raise LanceError(
            f"{type(module).__name__} needs {weight_bytes(module) / 1e9:.1f} GB on {device}, which has not enough free"
            f" memory ({brief(error)}); free some, or use bf16, quantised weights or another device."
        ) from None
    as_stored = [(tensors[name], entry) for name, entry in dense.items()]
    for layer, weight in packed.items():
        if layer + MARKER in stored:
            as_stored += zip(weight, (stored[f"{layer}.{part}"] for part in PARTS))
    fill(as_stored)
    for layer, weight in packed.items():
        if layer + MARKER not in stored:
            entry = stored[f"{layer}.weight"]
            values = torch.empty(entry.shape, dtype=torch.float32, device=device)
            fill([(values, entry)])
            pack(values, formats[layer], weight, f"{entry.file}: the tensor '{entry.name}'")
        replace_layer(module, layer, formats[layer], weight)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in zip(PARTS, weight)}
    # Through load_state_dict, because a host's layers may have no parameters until they are given some.
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()
