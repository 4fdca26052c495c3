"""The nodes of Lance: schemas, and what adapts `lance_core` to ComfyUI's memory, progress and previews."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .conditioning import LanceConditioning
from .decode import DecodeVideo
from .encode import EncodeLatent, EncodeSemantic
from .example import LanceExample
from .guidance import LanceGuidance
from .load import LoadLance, register_folder
from .lora import LanceLora
from .paint import LanceEdit, LanceGenerate
from .sigmas import LanceSigmas
from .status import register_routes
from .understand import LanceUnderstand


class LanceExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        register_folder()
        register_routes()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadLance,
            LanceExample,
            EncodeSemantic,
            EncodeLatent,
            LanceUnderstand,
            LanceGenerate,
            LanceEdit,
            DecodeVideo,
            LanceConditioning,
            LanceGuidance,
            LanceSigmas,
            LanceLora,
        ]


async def comfy_entrypoint() -> LanceExtension:
    return LanceExtension()
