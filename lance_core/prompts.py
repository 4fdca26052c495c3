"""The chat template and the system prompts of every task.

The strings are the model's own (data/common.py and data/system_prompt_render.py of bytedance/Lance): it was trained
with exactly these.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["image", "video"]
Task = Literal["generate", "edit", "idip", "understand"]

_GENERATE = {
    "image": "Describe the image by detailing the color, quantity, text, shape, size, texture,"
    " spatial relationships of the objects and background:",
    "video": "Describe the video by detailing the color, quantity, visible text, shape, size, texture,"
    " spatial relationships and motion/camera movements of the objects and background:",
}
_EDIT = (
    "Describe the key features of the input {kind} (color, shape, size, texture, objects, background), then explain"
    " how the user’s text instruction should alter or modify the {kind}. Generate a new {kind} that meets the user’s"
    " requirements while maintaining consistency with the original input where appropriate."
)
_IDIP = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background, style), then"
    " incorporate the user’s text description to generate a new {kind} that satisfies the user’s requirements while"
    " preserving the essential identity and object or style information from the reference input."
)
_UNDERSTAND = {
    "image": "Look at the image carefully and answer the question.",
    "video": "Watch the video carefully and answer the question.",
}
TEXT_ONLY = "You are a helpful assistant."


def system_prompt(task: Task, kind: Kind | None) -> str:
    """The system prompt of a task whose target (when understanding: whose input) is of that kind.

    kind None: a conversation without pictures.
    """
    if task == "understand":
        return TEXT_ONLY if kind is None else _UNDERSTAND[kind]
    if task == "generate":
        return _GENERATE[kind]
    return {"edit": _EDIT, "idip": _IDIP}[task].format(kind=kind)


def describe_prompt(kind: Kind) -> str:
    """The system prompt under which the model was trained to write captions; pass it as `system` to `understand`."""
    return _GENERATE[kind]
