"""What people see while a node works, and how they stop it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import latent_preview
from server import PromptServer
from torch import Tensor

from ..lance_core.errors import warnings_shown

TEXT_INTERVAL = 0.1  # seconds between two updates of streamed text


def step_callback(model: comfy.model_patcher.ModelPatcher, steps: int) -> Callable[[int, int, Tensor], None]:
    """`on_step` with a progress bar, a latent preview and the stop button."""
    preview = latent_preview.prepare_callback(model, steps)

    def on_step(step: int, steps: int, estimate: Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview(step - 1, estimate, estimate, steps)

    return on_step


def token_callback(node_id: str | None, limit: int) -> Callable[[str], None]:
    """`on_token` with a progress bar, the text so far on the node, and the stop button."""
    progress = comfy.utils.ProgressBar(limit)
    last_shown = 0.0

    def on_token(text: str) -> None:
        nonlocal last_shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        now = time.monotonic()
        if node_id is not None and now - last_shown >= TEXT_INTERVAL:
            PromptServer.instance.send_progress_text(text, node_id)
            last_shown = now

    return on_token


def warnings_logged() -> AbstractContextManager[None]:
    """Lance's warnings as lines of ComfyUI's log."""
    return warnings_shown(lambda sentence: logging.warning("Lance: %s", sentence))
