"""What people see while a node works, and how they stop it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import comfy.model_management
import comfy.utils
from server import PromptServer

from ..lance_core.errors import warnings_shown

TEXT_INTERVAL = 0.1  # seconds between two updates of streamed text


def show(text: str, node_id: str | None) -> None:
    """Puts text on a node, in the place of what it shows."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def token_callback(node_id: str | None, limit: int) -> Callable[[str], None]:
    """`on_token` with a progress bar, the text so far on the node, and the stop button."""
    progress = comfy.utils.ProgressBar(limit)
    last_shown = 0.0

    def on_token(text: str) -> None:
        nonlocal last_shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        now = time.monotonic()
        if now - last_shown >= TEXT_INTERVAL:
            show(text, node_id)
            last_shown = now

    return on_token


def warnings_logged() -> AbstractContextManager[None]:
    """Lance's warnings as lines of ComfyUI's log."""
    return warnings_shown(lambda sentence: logging.warning("Lance: %s", sentence))
