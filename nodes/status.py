"""What the editor shows under Load Lance: what a checkpoint lacks, what it needs, and what this machine has."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from math import prod
from pathlib import Path
from urllib.parse import quote

import comfy.model_management
import folder_paths
import torch
from aiohttp import web
from server import PromptServer

from ..lance_core.checkpoint import Contents
from ..lance_core.errors import LanceError
from ..lance_core.inspection import inspect
from ..lance_core.layout import (
    BUILT_IN_CHOICE,
    LANGUAGE_FOLDERS,
    REPOSITORY,
    VAE_WEIGHTS,
    VISION_WEIGHTS,
    WEIGHTS,
    CheckpointFiles,
    download_command,
    find_checkpoint,
)
from ..lance_core.storage import Stored
from .load import FOLDER, checkpoints
from .model import WEIGHT_DTYPES, precision_of, short_name
from .quantized import weight_bytes
from .vae import shared_vae, vae_contents
from .weights import dense_shapes, stored_layout

ROUTE = "/lance/checkpoint"
RELEASE = f"https://huggingface.co/{REPOSITORY}"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
VAE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # in the order of core's choice for Wan 2.2's


def register_routes() -> None:
    PromptServer.instance.routes.get(ROUTE)(answer)


async def answer(request: web.Request) -> web.Response:
    """The status of the checkpoint `name` at `weight_dtype`, as JSON. Reads headers, which a thread does."""
    name, weight_dtype = request.query.get("name", ""), request.query.get("weight_dtype", "default")
    if weight_dtype not in ("default", *WEIGHT_DTYPES):
        return web.json_response({"error": f"no weight_dtype '{weight_dtype}'"}, status=400)
    return web.json_response(await asyncio.to_thread(status, name, weight_dtype))


def status(name: str, weight_dtype: str) -> dict:
    """What the node shows for a checkpoint of its list, or of the release's names; other names are not looked for.

    `empty`: whether nothing was downloaded. `offered`: whether the list has it. `folder`, `command`, `release`: where
    the release belongs, and how to get it. `missing`: file, folder and link of each. `problems`: sentences. `needs`:
    bytes by part, None where headers do not tell. `machine`: bytes of the RAM and of the device's own memory.
    """
    offered, folder = checkpoints(), folder_paths.get_folder_paths(FOLDER)[0]
    general = {
        "empty": offered.keys() <= {BUILT_IN_CHOICE},
        "offered": name in offered,
        "folder": folder,
        "command": download_command("", Path(folder)),
        "release": RELEASE,
        "machine": machine(),
    }
    path = offered.get(name)
    if path is None:
        files = undownloaded(name)
        bundled = files is not None and files.variant == "video"
        missing = missing_files(files, vision=bundled, vae=shared_vae() is not None) if files else []
        return {**general, "missing": missing, "problems": [], "needs": None}
    try:
        files, problems, contents = find_checkpoint(path), inspect(path).problems, vae_contents(str(path))
        needed = needs(contents, weight_dtype) if files.language_model else None
    except LanceError as error:
        return {**general, "missing": [], "problems": [str(error)], "needs": None}
    missing = missing_files(files, vision=bool(contents.vision), vae=bool(contents.vae))
    return {
        **general,
        "missing": missing,
        "problems": [] if missing else list(problems),  # each missing file has a sentence there too
        "needs": needed,
    }


def undownloaded(name: str) -> CheckpointFiles | None:
    """What there is of the release's checkpoint of that name, whose weights are not there."""
    variant = next((variant for variant, folder in LANGUAGE_FOLDERS.items() if folder == name), None)
    if variant is None:
        return None
    roots = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    root = next((root for root in roots if (root / name).is_dir()), roots[0])

    def there(path: str) -> Path | None:
        return root / path if (root / path).is_file() else None

    return CheckpointFiles(
        folder=root / name,
        variant=variant,
        language_model=None,
        llm_config=there(f"{name}/llm_config.json"),
        tokenizer=root / name,
        vision=there(VISION_WEIGHTS),
        vision_config=None,
        vae=there(VAE_WEIGHTS),
    )


def missing_files(files: CheckpointFiles, *, vision: bool, vae: bool) -> list[dict[str, str]]:
    """File, folder and link of what a checkpoint lacks and the release has.

    vision, vae: whether there is one, wherever it is: bundled with the language model, or in models/vae.
    """
    variant = LANGUAGE_FOLDERS[files.variant]
    found = {
        f"{variant}/{WEIGHTS}": files.language_model,
        f"{variant}/llm_config.json": files.llm_config,
        f"{variant}/tokenizer.json": (files.tokenizer / "tokenizer.json").is_file(),
        VISION_WEIGHTS: files.vision or vision,
        VAE_WEIGHTS: files.vae or vae,
    }
    # Vision tower and VAE belong beside a language model's folder of the release, otherwise into the folder itself.
    shared = files.folder.parent if files.folder.name == variant else files.folder
    folders = {name: files.folder if name.startswith(variant) else (shared / name).parent for name in found}
    return [
        {"file": Path(name).name, "folder": str(folders[name]), "url": f"{RELEASE}/resolve/main/{quote(name)}"}
        for name, there in found.items()
        if not there
    ]


def needs(contents: Contents, weight_dtype: str) -> dict[str, str | int]:
    """The name of the weights' dtype or layout, and the bytes that the weights of each part take."""
    management = comfy.model_management
    shapes = dense_shapes(contents.language)
    precision = precision_of(weight_dtype, shapes, stored_layout(contents.language))
    vae_dtype = management.vae_dtype(management.vae_device(), VAE_DTYPES)
    name = precision.layout or short_name(precision.dtype)
    return {
        "dtype": SHORT.get(name, name),
        "model": weight_bytes(shapes, precision.dtype, precision.layout),
        "vision": elements(contents.vision) * precision.dtype.itemsize,
        "vae": elements(contents.vae) * vae_dtype.itemsize,
    }


def elements(tensors: Mapping[str, Stored]) -> int:
    return sum(prod(stored.shape) for stored in tensors.values())


def machine() -> dict[str, list[int] | None]:
    """Bytes in all and free, of the RAM and of the device's own memory; None where the device uses the RAM."""
    management = comfy.model_management
    device = management.get_torch_device()
    shared = management.is_device_cpu(device) or management.is_device_mps(device)
    return {"vram": None if shared else total_and_free(device), "ram": total_and_free(torch.device("cpu"))}


def total_and_free(device: torch.device) -> list[int]:
    return [comfy.model_management.get_total_memory(device), comfy.model_management.get_free_memory(device)]
