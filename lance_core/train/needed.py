"""Packages that only training uses."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..errors import LanceError


def needed(name: str) -> ModuleType:
    """That package, imported; LanceError saying how to install it where it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise LanceError(f'training needs {name}: install it with `pip install "lance-core[train]"`.') from None
