"""Data sets from files one can look at to Parquet, and back."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..checks import warn
from ..errors import LanceError
from ..prompts import Kind
from ..saving import replacing_folder
from .jsonl import line_of
from .parquet import ParquetRows, ParquetWriter
from .records import Record, Records, content_of, frames_of, media_of, open_records

LINES = "data.jsonl"
MEDIA = "media"
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "MPEG": ".mpg"}  # of Pillow's formats that are not their own
MATROSKA = b"\x1a\x45\xdf\xa3"  # WebM and MKV begin so

Skip = Callable[[int, LanceError], None]  # tells why a record, by its number, is left out


@dataclass(frozen=True)
class Converted:
    """counts: records written, by file. skipped: what was left out, a sentence each."""

    folder: Path
    counts: dict[str, int]
    skipped: tuple[str, ...]


def convert_data(source: str | Path, folder: str | Path) -> Converted:
    """Writes Parquet as a folder of media with a JSONL, and anything else as Parquet files, one per schema.

    The folder appears complete or not at all. A record that is bad, or for which there is no schema, is left out and
    told as a LanceWarning. Raises LanceError where no record is left or the folder holds something already.
    """
    records, folder = open_records(source), Path(folder).expanduser()
    skipped: list[str] = []

    def skip(index: int, error: LanceError) -> None:
        skipped.append(f"{records.place(index)} is left out: {error}")
        warn(skipped[-1])

    with replacing_folder(folder, overwrite=False) as fresh:
        fresh.mkdir()
        write = write_folder if isinstance(records, ParquetRows) else write_parquet
        counts = write(good_records(records, skip), fresh, skip)
        if not counts:
            raise LanceError(f"no record of {source} can be converted{': ' + skipped[0] if skipped else '.'}")
    return Converted(folder, counts, tuple(skipped))


def good_records(records: Records, skip: Skip) -> Iterator[tuple[int, Record, list[Kind]]]:
    """Those whose media can be read, with their numbers and the kinds of their references and target."""
    for index in range(len(records)):
        try:
            record = records[index]
            kinds = [frames_of(media)[1] for media in media_of(record)]
        except LanceError as error:
            skip(index, error)
        else:
            yield index, record, kinds


def write_parquet(records: Iterable[tuple[int, Record, list[Kind]]], folder: Path, skip: Skip) -> dict[str, int]:
    """Writes records, such as `good_records` yields, by schema; returns how many each file has."""
    counts: Counter[str] = Counter()
    writer = ParquetWriter(folder)
    for index, record, kinds in records:
        try:
            counts[f"{writer.write(record, kinds)}.parquet"] += 1
        except LanceError as error:
            skip(index, error)
    writer.close()
    return dict(counts)


def write_folder(records: Iterable[tuple[int, Record, list[Kind]]], folder: Path, skip: Skip) -> dict[str, int]:
    """Writes records, such as `good_records` yields, as a JSONL and files that are named after their numbers."""
    count = 0
    (folder / MEDIA).mkdir()
    with (folder / LINES).open("w", encoding="utf-8") as lines:
        for index, record, kinds in records:
            names = {}
            for number, (media, kind) in enumerate(zip(media_of(record), kinds)):
                content = content_of(media)
                names[media] = f"{MEDIA}/{index:07d}_{number}{suffix_of(content, kind)}"
                (folder / names[media]).write_bytes(content)
            lines.write(json.dumps(line_of(record, names), ensure_ascii=False) + "\n")
            count += 1
    return {LINES: count} if count else {}


def suffix_of(content: bytes, kind: Kind) -> str:
    """An ending that suits what a file holds."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return SUFFIXES.get(image.format or "", f".{(image.format or kind).lower()}")
    except (UnidentifiedImageError, OSError, ValueError):
        return ".webm" if content.startswith(MATROSKA) else ".mp4"
