"""LoRA files of the usual trainers: their tensors under names that ComfyUI maps to Lance's weights.

What trainers write, for a module such as `language_model.model.layers.0.self_attn.q_proj_moe_gen`:

- PEFT: `base_model.model.<module>.lora_A.weight`, in checkpoints of a run `.lora_A.<adapter>.weight`;
- diffusers, SimpleTuner: `transformer.<module>.lora_A.weight`, formerly `unet.<module>.lora.up.weight`;
- ai-toolkit: `diffusion_model.<module>.lora_A.weight`;
- sd-scripts, musubi-tuner: `lora_unet_<module with underscores>.lora_up.weight`, and `.alpha`;
- OneTrainer: `lora_transformer_<module with underscores>.lora_up.weight`;
- LyCORIS: `lycoris_<module with underscores>.lokr_w1`, `.hada_w1_a` and their like.

The module may also be named from inside the language model (`model.layers.0…`, `layers.0…`), as it is where an
adapter was trained on that part alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import LanceError

TARGET = "diffusion_model."
ROOTS = ("", "language_model.", "language_model.model.")  # modules that adapters are trained on
PREFIX = re.compile(
    r"(base_model|model|transformer|unet|diffusion_model|module|_orig_mod)\.|(lora_[a-z0-9]+|lycoris)_+"
)
SUFFIXES = tuple(
    (re.compile(rf"(?P<path>.+?){pattern}"), name)
    for pattern, name in (
        (r"\.lora_([AB])((\.[^.]+)?\.weight)?", r"lora_\2.weight"),
        (r"\.lora_embedding_A(\.[^.]+)?", "lora_up.weight"),
        (r"\.lora_embedding_B(\.[^.]+)?", "lora_down.weight"),
        (r"\.lora_(up|down)(\.[^.]+)?\.weight", r"lora_\2.weight"),
        (r"(\.lora|_lora|\.lora_linear_layer)\.(up|down)\.weight", r"lora_\3.weight"),
        (r"\.lora_magnitude_vector((\.[^.]+)?\.weight|\.[^.]+)?", "dora_scale"),
        (r"\.((lokr|hada)_[wt][12](_[ab])?)(\.[^.]+)?", r"\2"),
        (r"\.([ab][12]\.weight)", r"\2"),
        (r"\.(alpha|dora_scale|diff|diff_b|w_norm|b_norm|set_weight|oft_blocks|rescale)", r"\2"),
    )
)
FACTORS = (  # of a change of the weight: [out, rank] and [rank, in]
    ("lora_B.weight", "lora_A.weight"),
    ("lora_up.weight", "lora_down.weight"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
)
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the header of a safetensors file


@dataclass(frozen=True)
class Matched:
    """Names of a file and what they are called for ComfyUI, and those that mean nothing to Lance."""

    names: dict[str, str]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Lora:
    """The tensors of a LoRA under ComfyUI's names, and the file's names that mean nothing to Lance."""

    tensors: dict[str, Tensor]
    unmatched: tuple[str, ...]


def convert_lora(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Sequence[int]], config: Mapping[str, Any], file: str
) -> Lora:
    """A LoRA in any of the styles above, in the form in which ComfyUI maps it to Lance.

    weights: shapes by module, of `module_weights`.
    config: of `read_config`; empty where scales are those of the file.
    file: what to call the LoRA in an error.
    Raises LanceError where nothing of it belongs to Lance, or where its sizes are another model's.
    """
    matched = match_names(tensors, weights, file)
    converted = {target: _converted(name, tensors[name]) for name, target in matched.names.items()}
    _check_sizes(converted, weights, file)
    return Lora({**peft_alphas(converted, weights, config, file), **converted}, matched.unmatched)


def module_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Shapes of weights by their module, of shapes by parameter."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}


def match_names(names: Iterable[str], modules: Iterable[str], file: str) -> Matched:
    """What the tensors of a LoRA are called for ComfyUI: `diffusion_model.<module>.<suffix>`.

    modules: the official names of those that have a weight.
    file: what to call the LoRA in an error.
    Raises LanceError where none is Lance's, where a name could mean two modules, or two names mean one tensor.
    """
    spellings = _all_spellings(modules)
    matched: dict[str, str] = {}
    sources: dict[str, str] = {}
    unmatched = []
    for name in names:
        target = _target(name, spellings, file)
        if target is None:
            unmatched.append(name)
            continue
        if (other := sources.setdefault(target, name)) != name:
            raise LanceError(
                f"LoRA {file} holds '{other}' and '{name}' for the same weight: save one of its adapters alone."
            )
        matched[name] = target
    if not matched:
        found = f"its first tensor is '{unmatched[0]}'" if unmatched else "it holds no tensors"
        raise LanceError(f"LoRA {file} changes no weight of Lance ({found}): choose one that was trained on Lance.")
    return Matched(matched, tuple(unmatched))


def read_config(path: str | Path, names: Iterable[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """PEFT's settings of an adapter (lora_alpha, r, ...), which it keeps apart from the tensors; empty where none are.

    They lie in the file's header (diffusers) or, for PEFT's own names, in adapter_config.json beside the file.
    Raises LanceError where they are damaged.
    """
    beside = Path(path).parent / PEFT_CONFIG
    try:
        if metadata and DIFFUSERS_CONFIG in metadata:
            place = "the header"
            settings = dict(json.loads(metadata[DIFFUSERS_CONFIG]))
            return {key.removeprefix("transformer.").removeprefix("unet."): value for key, value in settings.items()}
        if beside.is_file() and any(name.startswith("base_model.") for name in names):
            place = str(beside)
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LanceError(
            f"The LoRA settings in {place} of {Path(path).name} cannot be read ({error}): save the adapter again."
        ) from error
    return {}


def peft_alphas(
    lora: Mapping[str, Tensor], weights: Iterable[str], config: Mapping[str, Any], file: str
) -> dict[str, Tensor]:
    """The alphas that PEFT's settings mean, by ComfyUI's names; ComfyUI scales each change by alpha / rank.

    PEFT scales by lora_alpha / r, with use_rslora by lora_alpha / sqrt(r) (peft/tuners/lora/layer.py). alpha_pattern
    gives some modules their own. Raises LanceError where the settings are those of another adapter.
    """
    alpha = config.get("lora_alpha", config.get("alpha"))  # the latter in LoHa's settings
    patterns = config.get("alpha_pattern") or {}
    if alpha is None:
        return {}
    ranks = _ranks(lora, weights)
    try:
        alphas = {module: float(_own_alpha(module, patterns, alpha)) for module in ranks}
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise LanceError(
            f"The LoRA settings of {file} have no usable lora_alpha ({error}): save the adapter again."
        ) from error
    if "r" in config and not config.get("rank_pattern") and (others := set(ranks.values()) - {config["r"]}):
        raise LanceError(
            f"The LoRA settings of {file} say r={config['r']}, but its tensors have rank {min(others)}: put the"
            f" {PEFT_CONFIG} of this adapter beside it, or remove the one that is there."
        )
    power = 0.5 if config.get("use_rslora") else 0
    return {f"{TARGET}{module}.alpha": torch.tensor(alphas[module] * rank**power) for module, rank in ranks.items()}


def _spellings(module: str) -> list[str]:
    """A module's names, official and from inside the language model."""
    return [module.removeprefix(root) for root in ROOTS if module.startswith(root)]


def _all_spellings(modules: Iterable[str]) -> dict[str, set[str]]:
    """The modules that each name stands for, with dots or with underscores."""
    found: dict[str, set[str]] = {}
    for module in modules:
        for name in _spellings(module):
            found.setdefault(name, set()).add(module)
            found.setdefault(name.replace(".", "_"), set()).add(module)
    return found


def _target(name: str, spellings: Mapping[str, set[str]], file: str) -> str | None:
    for pattern, suffix in SUFFIXES:
        if match := pattern.fullmatch(name):
            modules = _modules(match["path"], spellings)
            if len(modules) > 1:
                raise LanceError(
                    f"'{name}' of LoRA {file} can mean {' or '.join(sorted(modules))}: save it with dots in its names."
                )
            return next((f"{TARGET}{module}.{match.expand(suffix)}" for module in modules), None)
    return None


def _modules(path: str, spellings: Mapping[str, set[str]]) -> set[str]:
    """What a trainer's name of a module can mean, without as many of the trainers' prefixes as it takes."""
    while path not in spellings:
        if (prefix := PREFIX.match(path)) is None:
            return set()
        path = path[prefix.end() :]
    return spellings[path]


def _converted(name: str, tensor: Tensor) -> Tensor:
    if ".lora_embedding_" in name:  # PEFT's A [rank, vocabulary] and B [D, rank] change the transposed weight
        return tensor.T.contiguous()
    if ".lora_magnitude_vector" in name:  # one norm per output, which has to broadcast over the inputs
        return tensor.reshape(-1, 1)
    return tensor


def _factors(lora: Mapping[str, Tensor], module: str) -> Iterable[tuple[str, str]]:
    for left, right in FACTORS:
        names = f"{TARGET}{module}.{left}", f"{TARGET}{module}.{right}"
        if any(name in lora for name in names):
            yield names


def _ranks(lora: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, int]:
    return {module: len(lora[right]) for module in modules for _, right in _factors(lora, module)}


def _own_alpha(module: str, patterns: Mapping[str, float], alpha: float) -> float:
    own = (
        value
        for pattern, value in patterns.items()
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in _spellings(module))
    )
    return next(own, alpha)


def _check_sizes(lora: Mapping[str, Tensor], weights: Mapping[str, Sequence[int]], file: str) -> None:
    for module, shape in weights.items():
        for left, right in _factors(lora, module):
            if missing := [name for name in (left, right) if name not in lora]:
                raise LanceError(f"LoRA {file} lacks '{missing[0].removeprefix(TARGET)}': download or save it again.")
            sizes = tuple(lora[left].shape), tuple(lora[right].shape)
            if sizes != ((shape[0], *sizes[1][:1]), (*sizes[0][1:], shape[-1])):
                raise LanceError(
                    f"LoRA {file} does not fit: for {module} of size {tuple(shape)} it has {sizes[0]} and {sizes[1]};"
                    " choose one that was trained on this model."
                )
            if 0 in sizes[1]:
                raise LanceError(f"LoRA {file} holds nothing for {module}, factors of rank 0: save it again.")
    for name, tensor in lora.items():
        if name.endswith(".alpha") and tensor.numel() != 1:
            raise LanceError(
                f"LoRA {file} has {tensor.numel()} numbers as '{name.removeprefix(TARGET)}', where one belongs: save it"
                " again."
            )
