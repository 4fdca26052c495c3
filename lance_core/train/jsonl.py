"""Data sets as files one can look at: media with a JSONL that tells about them, or with captions beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LanceError
from .records import Media, Record

# The keys of a line by task: those it needs, and those it may have.
KEYS = {
    "generate": (("caption", "target"), ("first_frame",)),
    "edit": (("instruction", "references", "target"), ()),
    "idip": (("instruction", "references", "target"), ()),
    "understand": (("question", "answer"), ("references", "system")),
    "describe": (("references", "caption"), ()),
}
TYPES = {"references": list, "first_frame": bool}  # of the others: str
TYPE_NAMES = {list: 'a list of file names in ["..."]', bool: "true or false", str: "text in quotes"}
MEDIA_SUFFIXES = set(".png .apng .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .mp4 .webm .mov .mkv .avi .m4v".split())


class JsonLines:
    """Records in JSONL files, a line each; media are named relative to the file's folder."""

    def __init__(self, files: Sequence[Path]):
        self.lines = [line for file in files for line in _lines(file)]
        self.blocks = [range(len(self.lines))]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        line = self.lines[index]
        return parse(line.read(), line.file.parent)

    def place(self, index: int) -> str:
        return f"{self.lines[index].file}, line {self.lines[index].number}"


@dataclass(frozen=True)
class _Line:
    file: Path
    number: int
    start: int  # in bytes

    def read(self) -> bytes:
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.start)
                return stream.readline()
        except OSError as error:
            raise LanceError(f"the file cannot be read any more ({error.strerror}); leave it where it is.") from None


def _lines(file: Path) -> Iterator[_Line]:
    start = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _Line(file, number, start)
                start += len(line)
    except OSError as error:
        raise LanceError(f"the data {file} cannot be read ({error.strerror}); check the file.") from None


def parse(line: bytes, folder: Path) -> Record:
    """The record of a line; raises LanceError that says what is wrong with it."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise LanceError("the line is not text in UTF-8; save the file in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise LanceError(f"the line is not JSON ({error}); write one object a line.") from None
    if not isinstance(values, dict):
        raise LanceError(f"the line is {type(values).__name__}, not an object; write it as {{...}}.")
    _check_keys(values)

    def media(name: str) -> Media:
        return folder / name

    texts = {key: values[key] for key in ("caption", "instruction", "question") if key in values}
    text, answer = next(iter(texts.values())), values.get("answer")
    if values["task"] == "describe":
        text, answer = "", text
    return Record(
        values["task"],
        text,
        answer=answer,
        system=values.get("system"),
        references=tuple(media(name) for name in values.get("references", ())),
        target=media(values["target"]) if "target" in values else None,
        first_frame=values.get("first_frame", False),
    )


def _check_keys(values: Mapping[str, Any]) -> None:
    task = values.get("task")
    if not isinstance(task, str) or task not in KEYS:
        given = f"is {task!r}" if "task" in values else "is missing"
        raise LanceError(f'"task" {given}; give one of {", ".join(KEYS)}.')
    needed, optional = KEYS[task]
    for key in needed:
        if key not in values:
            raise LanceError(f'"{key}" is missing, which the task {task} needs; add it.')
    for key, value in values.items():
        if key not in ("task", *needed, *optional):
            raise LanceError(f'"{key}" is unknown to the task {task}; it has {", ".join((*needed, *optional))}.')
        kind = TYPES.get(key, str)
        if not isinstance(value, kind) or kind is list and not all(isinstance(item, str) for item in value):
            raise LanceError(f'"{key}" is {json.dumps(value)[:40]}; give {TYPE_NAMES[kind]}.')
    if "references" in needed and not values["references"]:
        raise LanceError('"references" is empty; name one picture or clip at least.')


def line_of(record: Record, names: Mapping[Media, str]) -> dict[str, Any]:
    """The object of a record's line; names: of its media, relative to the file's folder."""
    needed, _ = KEYS[record.task]
    values: dict[str, Any] = {"task": record.task}
    texts = {key: record.text for key in ("caption", "instruction", "question") if key in needed}
    if record.task == "describe":
        texts = {"caption": record.answer}
    values.update(texts)
    if record.task == "understand":
        values["answer"] = record.answer
    if record.system is not None:
        values["system"] = record.system
    if record.references:
        values["references"] = [names[media] for media in record.references]
    if record.target is not None:
        values["target"] = names[record.target]
    if record.first_frame:
        values["first_frame"] = True
    return values


class Captioned:
    """Pictures and clips with a text file of the same name each, `fox.png` and `fox.txt`: things to generate."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in {".txt", *MEDIA_SUFFIXES})
        except OSError as error:
            raise LanceError(f"the data {folder} cannot be read ({error.strerror}); check the folder.") from None
        self.files: dict[str, list[Path]] = {}
        for file in files:
            self.files.setdefault(file.stem, []).append(file)
        self.stems = list(self.files)
        self.blocks = [range(len(self.stems))]

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> Record:
        files = self.files[self.stems[index]]
        captions = [file for file in files if file.suffix.lower() == ".txt"]
        media = [file for file in files if file not in captions]
        if len(captions) != 1 or len(media) != 1:
            raise LanceError(
                f"there are {len(captions)} texts and {len(media)} pictures or clips of this name; give one of each."
            )
        try:
            return Record("generate", captions[0].read_text(encoding="utf-8-sig").strip(), target=media[0])
        except UnicodeDecodeError:
            raise LanceError(f"{captions[0].name} is not text in UTF-8; save the file in UTF-8.") from None
        except OSError as error:
            raise LanceError(f"{captions[0].name} cannot be read ({error.strerror}); check the file.") from None

    def place(self, index: int) -> str:
        return str(self.folder / self.stems[index])
