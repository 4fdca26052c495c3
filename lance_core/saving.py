"""Writing a model in the release's layout."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters import LoraLinear
from .checkpoint import POSITION_TABLE, VISION_PREFIX, Lance
from .config import MAX_LATENT_FRAMES, MAX_LATENT_SIDE, LanceConfig
from .errors import LanceError
from .layout import LANGUAGE_FOLDERS, VAE_NAMES, VAE_WEIGHTS, VISION_FOLDER, WEIGHTS
from .quantized import QuantizedLinear
from .storage import brief, save_tensors
from .tokenizer import IM_END, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from .transformer import latent_position_rows

LAYOUT = frozenset((*LANGUAGE_FOLDERS.values(), VISION_FOLDER, *VAE_NAMES))


def save_checkpoint(
    folder: str | Path,
    lance: Lance,
    tokenizer_specification: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Writes a model in the release's layout and returns the folder.

    tokenizer_specification: the contents of `tokenizer.json`. dtype: that of the stored weights; the VAE's are float32,
    as in the release. The folder appears complete or not at all. Raises LanceError where it holds something already;
    with `overwrite`, only where that is more than a checkpoint; for quantised weights, and for LoRAs beside them.
    """
    check_dense(lance)
    folder = Path(folder).expanduser()
    with replacing_folder(folder, overwrite) as fresh:
        _write(fresh, lance, tokenizer_specification, dtype)
    return folder


@contextmanager
def replacing_folder(folder: Path, overwrite: bool, names: Set[str] = LAYOUT) -> Iterator[Path]:
    """A path for a new folder that takes the other's place once it is complete; raises LanceError as below."""
    check_replaceable(folder, overwrite, names)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            fresh, old = Path(temporary, "new"), Path(temporary, "old")
            yield fresh
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(fresh, folder)
            except OSError:
                if old.exists():
                    os.replace(old, folder)
                raise
    except OSError as error:
        raise LanceError(f"{folder} cannot be written ({error.strerror}); name another folder.") from None


def recover_folder(folder: Path) -> None:
    """Puts back what was there before a `replacing_folder` that was killed, and removes what it had written.

    None may be at work on it. Raises LanceError where the folder cannot be put back.
    """
    # Random parts of names have eight characters: those of `model-new` do not pass for those of `model`.
    for temporary in folder.parent.glob(f".{glob.escape(folder.name)}-{'?' * 8}"):
        old = temporary / "old"
        if old.exists() and not folder.exists():
            try:
                os.replace(old, folder)
            except OSError as error:
                raise LanceError(f"{folder} cannot be written ({error.strerror}): move it back, it is {old}.") from None
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path, overwrite: bool, names: Set[str] = LAYOUT) -> None:
    """Raises LanceError where a folder holds something already; with `overwrite`, where it is no checkpoint.

    names: of what a checkpoint's folder may hold.
    """
    held = _held(folder)
    if held and not overwrite:
        raise LanceError(f"{folder} is not empty; name a new folder, or allow it to be overwritten.")
    if not held <= names:
        raise LanceError(f"{folder} holds more than a Lance checkpoint ({min(held - names)}); name a new folder.")


def _held(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError:
        raise LanceError(f"{folder} is not a folder one can write to; name another.") from None


def check_dense(lance: Lance) -> None:
    """Raises LanceError where a model has weights that no checkpoint holds as they are."""
    if any(isinstance(module, QuantizedLinear) for module in lance.transformer.modules()):
        raise LanceError("quantised weights cannot be saved again: write them with `python -m lance_core quantize`.")
    if any(isinstance(module, LoraLinear) for module in lance.transformer.modules()):
        raise LanceError("LoRAs are not saved with a model: merge them with `python -m lance_core merge`.")


def _write(root: Path, lance: Lance, specification: str, dtype: torch.dtype) -> None:
    language_folder, vision_folder = root / LANGUAGE_FOLDERS[lance.variant], root / VISION_FOLDER
    language_folder.mkdir(parents=True)
    vision_folder.mkdir()
    vision = lance.config.vision

    vision_tensors = _tensors(lance.vision, dtype)
    tensors = _tensors(lance.transformer, dtype)
    frames = MAX_LATENT_FRAMES if lance.variant == "video" else 1
    ids = torch.arange(frames * MAX_LATENT_SIDE**2)
    tensors[POSITION_TABLE] = latent_position_rows(ids, lance.config.text.hidden_size, dtype)
    if lance.variant == "video":
        tensors.update({VISION_PREFIX + name: tensor for name, tensor in vision_tensors.items()})
    save_tensors(tensors, language_folder / WEIGHTS)
    save_tensors(vision_tensors, vision_folder / "vit.safetensors")
    try:
        torch.save(_tensors(lance.vae, torch.float32), root / VAE_WEIGHTS)
    except RuntimeError as error:  # what torch says of a full disk
        raise OSError(errno.EIO, brief(error)) from None

    vision_values = {**asdict(vision), "in_chans": vision.in_channels, "model_type": "qwen2_5_vl"}
    _write_json(vision_folder / "config.json", vision_values)
    _write_json(language_folder / "llm_config.json", _llm_values(lance.config, vision_values, lance.tokenizer))
    end = lance.tokenizer.special(IM_END)
    _write_json(language_folder / "generation_config.json", {"do_sample": False, "eos_token_id": end})
    _write_tokenizer(language_folder, specification)


def _tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", dtype).contiguous() for name, p in module.named_parameters()}


def _llm_values(config: LanceConfig, vision_values: dict, tokenizer: Tokenizer) -> dict:
    values = asdict(config.text)
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
        "vision_config": {**vision_values, "tokens_per_second": config.text.tokens_per_second},
        "resolutions": asdict(config.resolutions),
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
