"""Where the files of a checkpoint are, in the release's layout (bytedance-research/Lance).

`Lance_3B/` or `Lance_3B_Video/` holds the language model and the tokenizer; beside them are `Qwen2.5-VL-ViT/` and
`Wan2.2_VAE.pth`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import LanceError

REPOSITORY = "bytedance-research/Lance"
LANGUAGE_FOLDERS = {"image": "Lance_3B", "video": "Lance_3B_Video"}
VISION_FOLDER = "Qwen2.5-VL-ViT"
WEIGHTS, EMA_WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "ema.safetensors", "model.safetensors.index.json"
VISION_WEIGHTS = f"{VISION_FOLDER}/vit.safetensors"
VISION_CONFIG = f"{VISION_FOLDER}/config.json"
VAE_WEIGHTS = "Wan2.2_VAE.pth"
SINGLE_SUFFIXES = (".safetensors", ".gguf")  # of a language model that is one file
BUILT_IN = "nano"  # the name of the model that comes with this package
BUILT_IN_CHOICE = f"{BUILT_IN} (built in)"  # as nodes offer it
BUILT_IN_FOLDER = Path(__file__).with_name("nano")
VAE_NAMES = (VAE_WEIGHTS, "Wan2.2_VAE.safetensors", "wan2.2_vae.safetensors")


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


def find_checkpoint(path: str | Path) -> CheckpointFiles:
    """The files of the checkpoint at `path`, of which any may be missing; nothing is opened.

    `path` is a folder in the release's layout that holds one language model, a language model's folder, a single
    safetensors or GGUF file (its configuration and tokenizer beside it), or "nano", which is the built-in model unless
    something of that name is here. Vision tower and VAE are looked for in the language model's folder and in the one
    above. Raises LanceError where there is no checkpoint, or more than one.
    """
    if not isinstance(path, (str, Path)):
        raise LanceError(f"the checkpoint's path is {type(path).__name__}: give the path of a folder or a file.")
    path = Path(path).expanduser()
    if str(path) == BUILT_IN and not path.exists():
        path = BUILT_IN_FOLDER
    if path.is_file():
        if path.suffix not in SINGLE_SUFFIXES:
            raise LanceError(f"{path} is not a checkpoint; give a .safetensors or .gguf file or a release's folder.")
        return _files(path.parent, path, "video" if "video" in path.stem.lower() else _variant(path.parent))
    if not path.is_dir():
        raise LanceError(f"{path} does not exist; get Lance with `{download_command('', path)}`.")
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
    raise LanceError(f"{path} holds no Lance checkpoint; get one with `{download_command('', path)}`.")


def list_checkpoints(folder: str | Path) -> list[str]:
    """Names of the checkpoints in a folder of models: with the folder before it, each is a path for `find_checkpoint`.

    Listed are language models' folders, here or in a release's folder, and single files; nothing is opened.
    """
    folder = Path(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in entries if path.suffix in SINGLE_SUFFIXES and path.name not in VAE_NAMES]
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


def download_command(name: str, root: Path) -> str:
    return " ".join(["hf download", REPOSITORY, *([name] if name else []), "--local-dir", shlex.quote(str(root))])


def remedy_of(files: CheckpointFiles, path: Path) -> str:
    """How to get one of a checkpoint's own files again."""
    if path.suffix == ".gguf":
        return "make it, or download it, again"  # the release has none
    shared = {files.vision: VISION_WEIGHTS, files.vision_config: VISION_CONFIG, files.vae: VAE_WEIGHTS}
    return remedy(files, shared.get(path, path.name))


def remedy(files: CheckpointFiles, name: str) -> str:
    """How to get a file of the release, e.g. `tokenizer.json` of the language model or `Wan2.2_VAE.pth`."""
    if files.folder == BUILT_IN_FOLDER:
        return "install lance-core again"
    shared = name in (VISION_WEIGHTS, VISION_CONFIG, VAE_WEIGHTS)
    released = name if shared else f"{LANGUAGE_FOLDERS[files.variant]}/{name}"
    if files.folder.name == LANGUAGE_FOLDERS[files.variant]:
        return f"download it with `{download_command(released, files.folder.parent)}`"
    return f"download {released} of {REPOSITORY} into {files.folder}"
