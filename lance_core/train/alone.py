"""One run in a folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LanceError
from .needed import needed

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other run of this machine writes to the folder; the end of a process, however it comes, sets it free.

    Raises LanceError where another one does already, and where nothing can be written.
    """
    with needed():
        from filelock import FileLock, Timeout
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise LanceError(f"another run is writing to {folder}: wait for its end, or name another folder.") from None
    except OSError as error:
        raise LanceError(f"{folder} cannot be written ({error.strerror}); name another folder.") from None
    try:
        yield
    finally:
        lock.release()
