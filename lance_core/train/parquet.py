"""Data sets in Parquet files, in the six schemas of the official training code (train_dataset.md of bytedance/Lance).

Media are whole files in binary columns. `first_frame`, a column of booleans that a file of clips to be painted may have
besides, is our own; the official code reads no columns but its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checks import warn
from ..errors import LanceError
from ..prompts import Kind, describe_prompt, system_prompt
from ..storage import brief
from .needed import needed
from .records import Embedded, Record, content_of, media_of

# Columns of text and of media, by schema: from t(ext), i(mage) or v(ideo) to one of these.
SCHEMAS = {
    "t2i": (("caption",), ("image_bytes",)),
    "t2v": (("caption",), ("video_bytes",)),
    "i2i": (("caption",), ("input_image_bytes", "output_image_bytes")),
    "v2v": (("caption",), ("input_video_bytes", "output_video_bytes")),
    "i2t": (("caption_i", "caption_q", "caption_a"), ("image_bytes",)),
    "v2t": (("caption_i", "caption_q", "caption_a"), ("video_bytes",)),
}
FIRST_FRAME = "first_frame"
GROUP_BYTES, GROUP_ROWS = 2**25, 256  # a row group is written once it has so many
MOST_BYTES = 2**31 - 2 * GROUP_BYTES  # of a file in it: a column of a group has to stay below two GiB
KINDS: dict[str, Kind] = {"i": "image", "v": "video"}


def load_pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet; LanceError where they are not installed."""
    with needed():
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet


class ParquetRows:
    """Records in the rows of Parquet files, of which one row group at a time is in memory."""

    def __init__(self, files: Sequence[Path]):
        self.groups: list[tuple[Path, str, int]] = []  # file, schema, number in the file
        self.blocks: list[range] = []
        self.firsts: list[int] = []  # a group's first row in its file
        failures = []
        for file in files:
            try:
                self._add(file)
            except LanceError as error:
                failures.append(str(error))
        if not self.groups and failures:
            raise LanceError(failures[0])
        for failure in failures:
            warn(f"left out: {failure}")
        self.held: tuple[int, Any] | None = None  # a group and its table

    def _add(self, file: Path) -> None:
        pyarrow, parquet = load_pyarrow()
        try:
            with parquet.ParquetFile(file) as opened:
                schema = schema_of_columns(opened.schema_arrow.names, file)
                sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        except (OSError, pyarrow.ArrowException) as error:
            raise LanceError(f"the data {file} is no Parquet file that can be read ({brief(error)}).") from None
        first = 0
        for group, size in enumerate(sizes):
            if size:
                self.groups.append((file, schema, group))
                self.firsts.append(first)
                self.blocks.append(range(len(self), len(self) + size))
            first += size

    def __len__(self) -> int:
        return self.blocks[-1].stop if self.blocks else 0

    def __getitem__(self, index: int) -> Record:
        group = self._group(index)
        table = self._table(group).slice(index - self.blocks[group].start, 1)
        try:
            row = table.to_pylist()[0]
        except UnicodeDecodeError:
            raise LanceError("its text is not in UTF-8; write the file again.") from None
        return record_of(row, self.groups[group][1])

    def place(self, index: int) -> str:
        group = self._group(index)
        return f"{self.groups[group][0]}, row {self.firsts[group] + index - self.blocks[group].start + 1}"

    def _group(self, index: int) -> int:
        return bisect_right(self.blocks, index, key=lambda block: block.start) - 1

    def _table(self, group: int) -> Any:
        held = self.held
        if held is None or held[0] != group:
            self.held = held = group, self._read(group)
        return held[1]

    def _read(self, group: int) -> Any:
        pyarrow, parquet = load_pyarrow()
        file, schema, number = self.groups[group]
        texts, media = SCHEMAS[schema]
        try:
            with parquet.ParquetFile(file) as opened:
                columns = [*texts, *media, *({FIRST_FRAME} & set(opened.schema_arrow.names))]
                return opened.read_row_group(number, columns=columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise LanceError(f"its row group cannot be read ({brief(error)}); copy or write the file again.") from None


def schema_of_columns(names: Sequence[str], file: Path) -> str:
    """The schema whose columns are all there, that of the most columns first; LanceError where it is none or two."""
    fitting = {
        name: sum(map(len, columns)) for name, columns in SCHEMAS.items() if {*columns[0], *columns[1]} <= {*names}
    }
    best = [name for name, count in fitting.items() if count == max(fitting.values())]
    if len(best) == 1:
        return best[0]
    if best:
        raise LanceError(f"the data {file} has the columns of both {best[0]} and {best[1]}; remove those of one.")
    known = "; ".join(f"{name}: {', '.join((*texts, *media))}" for name, (texts, media) in SCHEMAS.items())
    raise LanceError(f"the data {file} has the columns {', '.join(names)}, which fit no schema ({known}).")


def record_of(row: Mapping[str, Any], schema: str) -> Record:
    """The record in a row; raises LanceError where a value is missing or of another type."""
    texts, media = SCHEMAS[schema]
    for names, kind, what in ((texts, str, "text"), (media, bytes, "bytes")):
        for name in names:
            if not isinstance(row[name], kind):
                given = "empty" if row[name] is None else type(row[name]).__name__
                raise LanceError(f"{name} is {given}: give {what}.")
    files = tuple(Embedded(name, row[name]) for name in media)
    if len(files) == 2:
        return Record("edit", row["caption"], references=files[:1], target=files[1])
    if schema.startswith("t"):
        return Record("generate", row["caption"], target=files[0], first_frame=bool(row.get(FIRST_FRAME)))
    return _understanding(KINDS[schema[0]], row, files)


def _understanding(kind: Kind, row: Mapping[str, Any], files: tuple[Embedded, ...]) -> Record:
    system, question, answer = (row[name] for name in ("caption_i", "caption_q", "caption_a"))
    if system == describe_prompt(kind) and not question:
        return Record("describe", "", answer=answer, references=files)
    known = ("", system_prompt("understand", kind))
    return Record("understand", question, answer, None if system in known else system, files)


def schema_of(record: Record, kinds: Sequence[Kind]) -> str:
    """The schema for a record with references, then a target, of these kinds; LanceError where there is none."""
    letters = "".join(kind[0] for kind in kinds)
    if record.task == "generate":
        return f"t2{letters}"
    if record.task == "edit" and letters in ("ii", "vv"):
        return f"{letters[0]}2{letters[1]}"
    if record.task in ("understand", "describe") and len(letters) == 1:
        return f"{letters}2t"
    given = " and ".join(kinds) or "no media"
    raise LanceError(f"no Parquet schema holds the task {record.task} with {given}; keep the record in a JSONL.")


def row_of(record: Record, schema: str) -> dict[str, Any]:
    """The inverse of `record_of`."""
    texts, media = SCHEMAS[schema]
    row: dict[str, Any] = dict(zip(media, map(content_of, media_of(record))))
    if texts == ("caption",):
        row["caption"] = record.text
    else:
        kind = KINDS[schema[0]]
        describing = record.task == "describe"
        system = describe_prompt(kind) if describing else record.system or system_prompt("understand", kind)
        row |= {"caption_i": system, "caption_q": record.text, "caption_a": record.answer}
    if schema == "t2v":
        row[FIRST_FRAME] = record.first_frame
    return row


class ParquetWriter:
    """Writes records into `t2i.parquet`, `i2t.parquet` and so on in a folder, row group by row group."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waiting: dict[str, list[dict[str, Any]]] = {}
        self.writers: dict[str, Any] = {}

    def write(self, record: Record, kinds: Sequence[Kind]) -> str:
        """Returns the schema; raises LanceError where there is none for the record, or it is too large."""
        schema = schema_of(record, kinds)
        row, media = row_of(record, schema), SCHEMAS[schema][1]
        for name in media:
            if (size := len(row[name])) > MOST_BYTES:
                raise LanceError(f"{name} has {size:,} bytes, and Parquet takes {MOST_BYTES:,}; cut the clip.")
        rows = self.waiting.setdefault(schema, [])
        rows.append(row)
        if len(rows) >= GROUP_ROWS or sum(len(row[name]) for row in rows for name in media) >= GROUP_BYTES:
            self._flush(schema)
        return schema

    def close(self) -> None:
        """Writes what is waiting; without it no file is complete."""
        for schema in list(self.waiting):
            self._flush(schema)
        for writer in self.writers.values():
            writer.close()

    def _flush(self, schema: str) -> None:
        pyarrow, parquet = load_pyarrow()
        texts, media = SCHEMAS[schema]
        fields = [*((name, pyarrow.string()) for name in texts), *((name, pyarrow.binary()) for name in media)]
        if schema == "t2v":
            fields.append((FIRST_FRAME, pyarrow.bool_()))
        table = pyarrow.Table.from_pylist(self.waiting.pop(schema), schema=pyarrow.schema(fields))
        if schema not in self.writers:
            self.writers[schema] = parquet.ParquetWriter(self.folder / f"{schema}.parquet", table.schema)
        self.writers[schema].write_table(table)
