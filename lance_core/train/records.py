"""One record of a data set, wherever it is stored, and what a data set of them is."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from ..checks import check_text
from ..errors import LanceError
from ..media import MAX_SECONDS, read_media
from ..prompts import TEXT_ONLY, Kind, Task, describe_prompt


@dataclass(frozen=True)
class Embedded:
    """A picture's or clip's file inside another one. name: what it is called there, such as its column."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


Media = Path | Embedded


@dataclass(frozen=True)
class Record:
    """One thing to learn from, not decoded yet.

    task "describe" is "understand" under the system prompt for captions, with the caption as its answer; it is told
    apart because that prompt names what is described, a picture or a clip, which only its content tells (`settled`).
    text: caption, instruction or question. target: what is to be painted; None where an answer is to be written.
    first_frame: the clip to be painted begins with a frame that is given. Raises LanceError where these do not fit.
    """

    task: Task | Literal["describe"]
    text: str
    answer: str | None = None
    system: str | None = None
    references: tuple[Media, ...] = ()
    target: Media | None = None
    first_frame: bool = False

    def __post_init__(self):
        for name, text in (("text", self.text), ("answer", self.answer), ("system prompt", self.system)):
            if text is not None:
                check_text(name, text)
        if not (self.text.strip() or self.task == "describe" or self.task == "understand" and self.system):
            raise LanceError("the text is empty: write a caption, an instruction or a question.")
        if self.answer is not None and not self.answer.strip():
            raise LanceError("the answer is empty: write what the model is to say.")

    def settled(self, kind: Kind) -> Record:
        """Without what the kind of its references had left open."""
        if self.task == "describe":
            return replace(self, task="understand", system=describe_prompt(kind))
        if self.task == "understand" and not self.references and self.system is None:
            return replace(self, system=TEXT_ONLY)
        return self


class Records(Protocol):
    """A data set: records by number, each read when it is asked for.

    blocks: the numbers of all records in runs that are best read together, in the order of storage.
    """

    blocks: Sequence[range]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises LanceError for a bad one."""

    def place(self, index: int) -> str:
        """Where it stands: a file and a line or row."""


def open_records(path: str | Path) -> Records:
    """The data set in a JSONL or Parquet file, or in a folder of either or of media with captions in `.txt` files.

    Raises LanceError where there is none, or more than one kind.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".jsonl", ".parquet"))
    else:
        files = [path]
    suffixes = {file.suffix.lower() for file in files}
    if not path.exists():
        raise LanceError(f"the data {path} does not exist; check the name and the folder.")
    if suffixes == {".jsonl"}:
        from .jsonl import JsonLines

        return JsonLines(files)
    if suffixes == {".parquet"}:
        from .parquet import ParquetRows

        return ParquetRows(files)
    if suffixes:
        what = "both .jsonl and .parquet files; name one of them" if len(suffixes) > 1 else "no data set"
        raise LanceError(f"the data {path} holds {what}: give a folder, or a file that ends in .jsonl or .parquet.")
    from .jsonl import Captioned

    return Captioned(path)


def frames_of(media: Media, max_seconds: float = MAX_SECONDS) -> tuple[Tensor, Kind]:
    """Frames `[F, H, W, 3]` as `read_media` gives them, and their kind; LanceError for what cannot be read."""
    if isinstance(media, Path):
        return read_media(media, max_seconds=max_seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "content")
        file.write_bytes(media.content)
        try:
            return read_media(file, max_seconds=max_seconds)
        except LanceError as error:
            raise LanceError(str(error).replace(str(file), media.name)) from None


def media_of(record: Record) -> list[Media]:
    """Its references, then its target."""
    return [*record.references, *([] if record.target is None else [record.target])]


def content_of(media: Media) -> bytes:
    """The bytes of its file; LanceError for a file that cannot be read."""
    if isinstance(media, Embedded):
        return media.content
    try:
        return media.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LanceError(f"{media} cannot be read ({reason}); check the name and the folder.") from None
