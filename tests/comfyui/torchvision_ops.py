"""Lets a torchvision wheel built for CUDA be imported beside a CPU build of torch.

Such a wheel cannot load its compiled library there, and then fails at import because it describes two
operators that nobody has defined. `setup_server.sh` installs this file into a virtual environment with a `.pth`
line that imports it. It defines the operators, without a kernel, at the moment torchvision is first imported:
not earlier, so that Python programs that do not use torch start as fast as before.
"""

from __future__ import annotations

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DefineOperators(importlib.abc.MetaPathFinder):
    """Finds nothing: the request for `torchvision` is the moment to define what it expects."""

    library = None  # torch.library removes the operators when this object is collected

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision" or self.library is not None:
            return None
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            self.library.define(schema)
        return None


sys.meta_path.insert(0, DefineOperators())
