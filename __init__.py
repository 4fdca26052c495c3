"""Lance for ComfyUI: the entry that ComfyUI looks for in a folder of `custom_nodes`."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
