"""Packages that only training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LanceError


@contextmanager
def needed() -> Iterator[None]:
    """Around an import of such a package: LanceError saying how to install it where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LanceError(f"training needs {error.name}: install it with `pip install {error.name}`.") from None
