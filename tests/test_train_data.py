"""Data sets for training: what is read, what is refused, and that the model sees what it will see when it is used."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from lance_core import stages
from lance_core.__main__ import main
from lance_core.errors import LanceError, LanceWarning
from lance_core.media import read_image, read_media, write_mp4, write_png
from lance_core.prompts import describe_prompt, system_prompt
from lance_core.tiny import random_lance
from lance_core.train.convert import convert_data
from lance_core.train.data import SLOTS, DataConfig, Mixture, open_data
from lance_core.train.jsonl import line_of, parse
from lance_core.train.latents import LatentCache, fingerprint
from lance_core.train.parquet import SCHEMAS, ParquetRows, record_of, row_of
from lance_core.train.records import Embedded, Record, frames_of, media_of, open_records
from lance_core.vae import normalize
from lance_core.world.files import make_world, png
from lance_core.world.render import draw, draw_clip
from lance_core.world.scene import random_clip, random_scene

SIDE = 112  # pixels: whole tokens of the VAE and of the vision tower


@pytest.fixture(scope="module")
def lance():
    return random_lance()


def picture(seed: int, side: int = SIDE) -> torch.Tensor:
    return draw(random_scene(Random(seed)), side)


def moving(seed: int, frames: int = 5, side: int = SIDE) -> torch.Tensor:
    return draw_clip(random_clip(Random(seed)), frames, side)


def write_lines(folder: Path, *lines: dict | str, name: str = "data.jsonl") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8", errors="surrogatepass")
    return folder / name


def painting(name: str, **more) -> dict:
    return {"task": "generate", "caption": f"the picture {name}", "target": f"{name}.png", **more}


def native(path: Path, **more) -> DataConfig:
    return DataConfig(path, resolution="native", **more)


def told(examples, count: int) -> tuple[list, list[str]]:
    """The first examples, and what was told meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = [examples[index] for index in range(count)]
    return seen, [str(warning.message) for warning in caught if warning.category is LanceWarning]


def same(a, b) -> bool:
    """Whether two examples are equal, tensors bit for bit."""
    return (
        (a.text, a.answer, a.system, a.kind, a.first_frame) == (b.text, b.answer, b.system, b.kind, b.first_frame)
        and all(
            len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right))
            for left, right in ((a.pixels, b.pixels), (a.latents, b.latents))
        )
        and (a.target is None) == (b.target is None)
        and (a.target is None or torch.equal(a.target, b.target))
    )


# Reading


def test_a_line_of_every_task(tmp_path):
    records = open_records(
        write_lines(
            tmp_path,
            {"task": "generate", "caption": "a fox", "target": "fox.png"},
            {"task": "generate", "caption": "a fox runs", "target": "fox.mp4", "first_frame": True},
            {"task": "edit", "instruction": "make it red", "references": ["a.png"], "target": "b.png"},
            {"task": "idip", "instruction": "on the moon", "references": ["a.png", "c.png"], "target": "b.png"},
            "",
            {"task": "understand", "question": "what is it?", "answer": "狐狸", "references": ["a.png"]},
            {"task": "understand", "question": "1 + 1?", "answer": "2", "system": "Count."},
            {"task": "describe", "caption": "a fox", "references": ["fox.mp4"]},
        )
    )
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    fox, clip = tmp_path / "fox.png", tmp_path / "fox.mp4"
    assert [records[index] for index in range(len(records))] == [
        Record("generate", "a fox", target=fox),
        Record("generate", "a fox runs", target=clip, first_frame=True),
        Record("edit", "make it red", references=(a,), target=b),
        Record("idip", "on the moon", references=(a, c), target=b),
        Record("understand", "what is it?", "狐狸", references=(a,)),
        Record("understand", "1 + 1?", "2", system="Count."),
        Record("describe", "", "a fox", references=(clip,)),
    ]
    assert records.place(4) == f"{tmp_path / 'data.jsonl'}, line 6"  # as an editor counts


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
systems = st.none() | texts


def records_with(media) -> st.SearchStrategy[Record]:
    many = st.lists(media, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(Record, st.just("generate"), texts, target=media, first_frame=st.booleans()),
        st.builds(Record, st.sampled_from(["edit", "idip"]), texts, references=many, target=media),
        st.builds(Record, st.just("understand"), texts, texts, systems, st.just(()) | many),
        st.builds(Record, st.just("describe"), st.just(""), texts, references=many),
    )


@settings(deadline=None)
@given(records_with(st.sampled_from(["a.png", "sub/b.mp4", "狐狸.webp"]).map(lambda name: Path("folder", name))))
def test_lines_say_all_of_a_record(record):
    names = {media: media.relative_to("folder").as_posix() for media in media_of(record)}
    assert parse(json.dumps(line_of(record, names)).encode(), Path("folder")) == record


@settings(deadline=None)
@given(st.data())
def test_rows_say_all_of_a_record(data):
    schema = data.draw(st.sampled_from(sorted(SCHEMAS)))
    _, columns = SCHEMAS[schema]
    media = [Embedded(name, data.draw(st.binary())) for name in columns]
    if len(media) == 2:
        record = Record("edit", data.draw(texts), references=(media[0],), target=media[1])
    elif schema.startswith("t"):
        first = schema == "t2v" and data.draw(st.booleans())
        record = Record("generate", data.draw(texts), target=media[0], first_frame=first)
    else:
        asked = st.builds(Record, st.just("understand"), texts, texts, systems, st.just(tuple(media)))
        described = st.builds(Record, st.just("describe"), st.just(""), texts, references=st.just(tuple(media)))
        record = data.draw(asked | described)
    assert record_of(row_of(record, schema), schema) == record


def test_the_six_official_schemas(tmp_path, lance):
    still, other = picture(1), picture(2)
    clip, changed = moving(3), moving(4)
    image, image2, video, video2 = (png("", frames).content for frames in (still, other, clip, changed))
    asked = {"caption_i": "Look.", "caption_q": "What?", "caption_a": "A star."}
    rows = {
        "t2i": {"caption": "t2i", "image_bytes": image},
        "t2v": {"caption": "t2v", "video_bytes": video},
        "i2i": {"caption": "i2i", "input_image_bytes": image, "output_image_bytes": image2},
        "v2v": {"caption": "v2v", "input_video_bytes": video, "output_video_bytes": video2},
        "i2t": {"image_bytes": image, **asked},
        "v2t": {"video_bytes": video, **asked},
    }
    expected = {
        "t2i": [still],
        "t2v": [clip],
        "i2i": [still, other],
        "v2v": [clip, changed],
        "i2t": [still],
        "v2t": [clip],
    }
    for schema, row in rows.items():
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{schema}.parquet")
        (record,) = open_records(tmp_path / f"{schema}.parquet")
        frames = [frames_of(media)[0] for media in media_of(record)]
        assert len(frames) == len(expected[schema])
        assert all(torch.equal(a, b) for a, b in zip(frames, expected[schema]))
        if schema.endswith("t"):
            assert (record.system, record.text, record.answer) == ("Look.", "What?", "A star.")
        else:
            assert (record.text, record.task) == (schema, "generate" if schema.startswith("t") else "edit")

    examples = open_data([native(tmp_path)], lance, seed=0)
    seen, complaints = told(examples, 6)
    assert not complaints and {example.text for example in seen} == {"t2i", "t2v", "i2i", "v2v", "What?"}
    shapes = {example.text: example.target.shape for example in seen if example.target is not None}
    assert shapes == {"t2i": (48, 1, 7, 7), "t2v": (48, 2, 7, 7), "i2i": (48, 1, 7, 7), "v2v": (48, 2, 7, 7)}
    assert Counter(example.kind for example in seen if example.task == "understand") == {"image": 1, "video": 1}


def test_official_prompts_are_recognised():
    row = {"image_bytes": b"x", "caption_q": "What?", "caption_a": "A star."}
    for instruction in ("", system_prompt("understand", "image")):
        assert record_of({**row, "caption_i": instruction}, "i2t").system is None
    described = record_of({**row, "caption_i": describe_prompt("video"), "caption_q": ""}, "i2t")
    assert described.system == describe_prompt("video")  # of a picture it is no usual prompt, and stays
    assert record_of({**row, "caption_i": describe_prompt("image"), "caption_q": ""}, "i2t").task == "describe"


def test_rows_are_read_group_by_group(tmp_path):
    rows = [{"caption": f"number {index}", "image_bytes": bytes([index])} for index in range(25)]
    for name, part in (("a", rows[:15]), ("b", rows[15:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet", row_group_size=4)
    records = open_records(tmp_path)
    assert isinstance(records, ParquetRows) and len(records) == 25
    assert [len(block) for block in records.blocks] == [4, 4, 4, 3, 4, 4, 2]
    for index in Random(0).sample(range(25), 25):
        assert records[index].text == f"number {index}" and records[index].target.content == bytes([index])
        assert records.held[1].num_rows <= 4
    assert records.place(14) == f"{tmp_path / 'a.parquet'}, row 15"
    assert records.place(24) == f"{tmp_path / 'b.parquet'}, row 10"


def test_captions_beside_the_media(tmp_path, lance):
    for name in ("fox", "bear", "owl"):
        write_png(picture(1), tmp_path / f"{name}.png")
    (tmp_path / "fox.txt").write_text("a fox\n", encoding="utf-8")
    (tmp_path / "bear.txt").write_text("一只熊", encoding="utf-8")
    (tmp_path / "wolf.txt").write_text("a wolf", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a caption", encoding="utf-8")
    seen, complaints = told(open_data([native(tmp_path)], lance, seed=0), 8)
    assert {example.text for example in seen if example} == {"a fox", "一只熊"}
    assert len(complaints) == 2 and str(tmp_path / "owl") in "".join(complaints) and "wolf" in "".join(complaints)


# What is refused

BAD_LINES = {
    "{not json": "not JSON",
    "[1, 2]": "not an object",
    '{"caption": "x", "target": "good.png"}': '"task" is missing',
    '{"task": "paint", "caption": "x", "target": "good.png"}': "\"task\" is 'paint'",
    '{"task": "generate", "target": "good.png"}': '"caption" is missing',
    '{"task": "generate", "caption": "x", "target": "good.png", "size": 3}': '"size" is unknown',
    '{"task": "generate", "caption": 3, "target": "good.png"}': '"caption" is 3',
    '{"task": "generate", "caption": " ", "target": "good.png"}': "text is empty",
    '{"task": "generate", "caption": "\\ud800", "target": "good.png"}': "UTF-8",
    '{"task": "generate", "caption": "x", "target": "none.png"}': "none.png does not exist",
    '{"task": "generate", "caption": "x", "target": "broken.png"}': "broken.png is damaged",
    '{"task": "generate", "caption": "x", "target": "header.dds"}': "header.dds is damaged",
    '{"task": "generate", "caption": "x", "target": "empty.png"}': "empty.png is empty",
    '{"task": "generate", "caption": "x", "target": "odd.png"}': "multiples of 16",
    '{"task": "generate", "caption": "x", "target": "tall.png"}': "too large",
    '{"task": "generate", "caption": "x", "target": "good.png", "first_frame": true}': "first_frame is for clips",
    '{"task": "edit", "instruction": "x", "references": [], "target": "good.png"}': '"references" is empty',
    '{"task": "edit", "instruction": "x", "references": "good.png", "target": "good.png"}': '"references" is',
    '{"task": "understand", "question": "x", "answer": "", "references": ["good.png"]}': "answer is empty",
    json.dumps({"task": "generate", "caption": "fox " * 5000, "target": "good.png"}): "shorten it",
    json.dumps({"task": "understand", "question": "x", "answer": "fox " * 5000}): "shorten it",
    '{"task": "generate", "caption": "\x00\xff", "target": "good.png"}': "not JSON",
}


@pytest.fixture
def media(tmp_path):
    good = write_png(picture(1), tmp_path / "good.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "header.dds").write_bytes(b"DDS " + struct.pack("<I", 124) + bytes(120))
    (tmp_path / "empty.png").touch()
    write_png(picture(1, 100), tmp_path / "odd.png")
    write_png(torch.zeros(1040, 16, 3), tmp_path / "tall.png")
    return tmp_path


def test_bad_lines_are_named_once_and_left_out(media, lance):
    data = write_lines(media, painting("good"), *BAD_LINES, painting("good"))
    count = len(BAD_LINES) + 2
    seen, complaints = told(open_data([native(data)], lance, seed=0), 2 * count)
    assert sum(example is not None for example in seen) == 4  # two good records, twice
    assert len(complaints) == len(BAD_LINES)
    for line, reason in enumerate(BAD_LINES.values(), start=2):
        (complaint,) = (text for text in complaints if text.startswith(f"{data}, line {line} is left out: "))
        assert reason in complaint and complaint.endswith(".") and "\n" not in complaint


@pytest.mark.parametrize("line, reason", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_nothing_but_bad_lines(media, lance, line, reason):
    data = write_lines(media, line)
    with pytest.raises(LanceError) as error:
        open_data([native(data)], lance, seed=0)
    assert str(error.value).startswith(f"no record of the data {data} can be used; the first is {data}, line 1: ")
    assert reason in str(error.value)


def test_bad_rows_are_named_and_left_out(tmp_path, lance):
    good = png("", picture(1)).content
    rows = [
        {"caption": "good", "image_bytes": good},
        {"caption": None, "image_bytes": good},
        {"caption": "x", "image_bytes": None},
        {"caption": "x", "image_bytes": good[:200]},
        {"caption": "", "image_bytes": good},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    parquet.write_table(pyarrow.Table.from_pylist([{"words": "x"}]), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"caption": "x", "image_bytes": 3}]), tmp_path / "d.parquet")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = open_data([native(tmp_path)], lance, seed=0)
    assert [str(warning.message).split(str(tmp_path))[1][:10] for warning in caught] == ["/b.parquet", "/c.parquet"]
    seen, complaints = told(examples, 12)
    assert sum(example is not None for example in seen) == 2
    found = {text.split(" is left out: ")[0].split("/")[-1]: text for text in complaints}
    assert sorted(found) == [*(f"a.parquet, row {row}" for row in range(2, 6)), "d.parquet, row 1"]
    for row, reason in ((2, "caption is empty"), (3, "image_bytes is empty"), (4, "image_bytes is damaged")):
        assert reason in found[f"a.parquet, row {row}"]
    assert "image_bytes is int: give bytes" in found["d.parquet, row 1"]


def test_a_row_that_is_not_text_is_left_out(tmp_path, lance):
    raw = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary())
    captions = pyarrow.StringArray.from_buffers(2, *raw.buffers()[1:])
    table = pyarrow.table({"caption": captions, "image_bytes": [png("", picture(1)).content] * 2})
    parquet.write_table(table, tmp_path / "a.parquet")
    seen, complaints = told(open_data([native(tmp_path)], lance, seed=0), 2)
    assert sum(example is not None for example in seen) == 1
    assert complaints == [
        f"{tmp_path / 'a.parquet'}, row 2 is left out: its text is not in UTF-8; write the file again."
    ]


def test_data_that_is_none(tmp_path, lance):
    both, empty = tmp_path / "both", tmp_path / "empty"
    for folder in (both, empty):
        folder.mkdir()
    write_lines(both, painting("x"))
    parquet.write_table(pyarrow.Table.from_pylist([{"caption": "x", "image_bytes": b""}]), both / "a.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    tie = {"caption": "x", "image_bytes": b"", "video_bytes": b""}
    parquet.write_table(pyarrow.Table.from_pylist([tie]), tmp_path / "tie.parquet")
    for path, reason in (
        (tmp_path / "none", "does not exist"),
        (both, "name one of them"),
        (empty, "holds no records"),
        (write_png(picture(1), tmp_path / "a.png"), "ends in .jsonl or .parquet"),
        (tmp_path / "broken.parquet", "no Parquet file"),
        (tmp_path / "tie.parquet", "both t2i and t2v"),
    ):
        with pytest.raises(LanceError, match=reason):
            open_data([DataConfig(path)], lance, seed=0)
    with pytest.raises(LanceError, match="no data"):
        open_data([], lance, seed=0)


@pytest.mark.parametrize("bad", [{"weight": 0.0}, {"resolution": "huge"}, {"first_frame": 2.0}, {"max_seconds": 20.0}])
def test_impossible_settings(bad):
    with pytest.raises(LanceError, match=f"data.{next(iter(bad))} is"):
        DataConfig(Path("x"), **bad)


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LanceError, match="pip install"):
        open_records(tmp_path)


# The order


def numbered(folder: Path, count: int, prefix: str = "") -> Path:
    lines = [{"task": "understand", "question": f"{prefix}{number}", "answer": "x"} for number in range(count)]
    return write_lines(folder, *lines, name=f"{prefix or 'data'}.jsonl")


def test_an_index_is_always_the_same_example(media, lance):
    clip = write_mp4(moving(2), media / "clip.mp4").name
    lines = [painting("good"), {"task": "edit", "instruction": "x", "references": [clip], "target": clip}]
    data = write_lines(media, *lines, {"task": "describe", "caption": "a star", "references": [clip]})
    one, two = (open_data([native(data, first_frame=0.5)], lance, seed=3) for _ in range(2))
    backwards = {index: two[index] for index in reversed(range(6))}
    assert all(same(one[index], backwards[index]) for index in range(6))
    with pytest.raises(IndexError):
        one[-1]


def test_every_epoch_has_all_records_in_another_order(tmp_path, lance):
    data = numbered(tmp_path, 20)
    orders = {}
    for seed in (0, 1):
        examples = open_data([DataConfig(data)], lance, seed=seed)
        orders[seed] = [[examples[epoch * 20 + place].text for place in range(20)] for epoch in range(3)]
        assert all(sorted(order, key=int) == [str(number) for number in range(20)] for order in orders[seed])
    assert len({tuple(order) for epochs in orders.values() for order in epochs}) == 6


def test_data_sets_come_by_their_weights(tmp_path, lance):
    weights = {"a": 1.0, "b": 2.0, "c": 0.004}
    configs = [DataConfig(numbered(tmp_path, 7, name), weight=weight) for name, weight in weights.items()]
    examples = open_data(configs, lance, seed=0)
    for start in (0, SLOTS):
        texts = [examples[start + index].text for index in range(SLOTS)]
        counts = Counter(text[0] for text in texts)
        assert counts["c"] >= 1 and abs(counts["b"] - 2 * counts["a"]) < 6 and counts.total() == SLOTS
    seen = [examples[index].text for index in range(3 * SLOTS)]
    of_b = [text for text in seen if text[0] == "b"]
    assert all(len(set(of_b[start : start + 7])) == 7 for start in range(0, 70, 7))  # none twice in an epoch


def test_a_data_set_beside_the_small_world_loses_no_record(tmp_path, lance):
    data = open_data([DataConfig(numbered(tmp_path, 20))], lance, seed=0)
    seen = [Mixture((data, [None] * 1000), (1.0, 3.0), 0)[index] for index in range(1000)]
    texts = [example.text for example in seen if example is not None]
    assert 240 < len(texts) < 260
    assert all(len(set(texts[start : start + 20])) == 20 for start in range(0, 240, 20))


# What the model sees


def test_an_example_is_what_the_model_sees_when_it_is_used(tmp_path, lance):
    before, after = write_png(picture(1)[:, :80], tmp_path / "a.png"), write_png(picture(2)[:, :80], tmp_path / "b.png")
    clip = write_mp4(moving(3, 12, 64), tmp_path / "clip.mp4", fps=24)
    lines = [
        {"task": "edit", "instruction": "x", "references": ["a.png"], "target": "b.png"},
        {"task": "understand", "question": "x", "answer": "y", "references": ["a.png", "clip.mp4"]},
        {"task": "generate", "caption": "x", "target": "clip.mp4", "first_frame": True},
        {"task": "understand", "question": "x", "answer": "y"},
    ]
    paths = [write_lines(tmp_path, line, name=f"{number}.jsonl") for number, line in enumerate(lines)]
    edit, asked, animated, talk = (
        open_data([DataConfig(path, resolution="image_256res")], lance, seed=0)[0] for path in paths
    )

    def semantic(path):
        frames, kind = read_media(path)
        return stages.encode_semantic(lance, frames, resolution="image_256res", kind=kind)

    def latent(path):
        return normalize(stages.encode_latent(lance, read_media(path)[0], resolution="image_256res"))[0]

    with torch.no_grad():
        assert torch.equal(lance.vision(edit.pixels[0]), semantic(before).embeddings)
        assert all(
            torch.equal(lance.vision(p), semantic(path).embeddings) for p, path in zip(asked.pixels, (before, clip))
        )
    assert torch.equal(edit.latents[0], latent(before)) and torch.equal(edit.target, latent(after))
    assert torch.equal(animated.target, latent(clip)) and animated.first_frame and animated.target.shape[1] == 2
    assert (asked.kind, asked.target, asked.latents) == ("video", None, ())
    assert talk.pixels == () and talk.system == system_prompt("understand", None)


def test_captions_are_learnt_under_their_prompt(media, lance):
    write_mp4(moving(2), media / "clip.mp4")
    for name, kind in (("good.png", "image"), ("clip.mp4", "video")):
        data = write_lines(media, {"task": "describe", "caption": "a star", "references": [name]})
        example = open_data([native(data)], lance, seed=0)[0]
        assert (example.task, example.text, example.answer) == ("understand", "", "a star")
        assert (example.system, example.kind) == (describe_prompt(kind), kind)


def test_clips_are_cut_and_begin_with_a_frame_as_told(tmp_path, lance):
    write_mp4(moving(1, 25), tmp_path / "clip.mp4")
    data = write_lines(tmp_path, {"task": "generate", "caption": "x", "target": "clip.mp4"})
    examples = open_data([native(data, max_seconds=0.75, first_frame=0.4)], lance, seed=0, cache=tmp_path / "cache")
    seen = [examples[index] for index in range(200)]
    assert all(example.target.shape[1] == 3 for example in seen)  # nine frames
    assert 60 < sum(example.first_frame for example in seen) < 100


# The cache


def test_latents_are_made_once(media, lance):
    data = write_lines(media, {"task": "edit", "instruction": "x", "references": ["good.png"], "target": "good.png"})
    folder = media / "cache"
    plain = open_data([native(data)], lance, seed=0)[0]
    fresh = open_data([native(data)], lance, seed=0, cache=folder)[0]
    (kept,) = folder.rglob("*.safetensors")
    again = open_data([native(data)], lance, seed=0, cache=folder)[0]
    assert same(plain, fresh) and same(plain, again)

    marker = torch.ones(plain.target.shape)
    save_file({"latent": marker}, kept)
    assert torch.equal(open_data([native(data)], lance, seed=0, cache=folder)[0].target, marker)
    kept.write_bytes(kept.read_bytes()[:100])
    assert same(plain, open_data([native(data)], lance, seed=0, cache=folder)[0])
    assert torch.equal(load_file(kept)["latent"], plain.target)

    other = random_lance(seed=1)
    assert fingerprint(other.vae) != fingerprint(lance.vae) == fingerprint(random_lance().vae)
    open_data([native(data)], other, seed=0, cache=folder)
    open_data([DataConfig(data, resolution="image_256res")], lance, seed=0, cache=folder)
    write_png(picture(9), media / "good.png")
    open_data([native(data)], lance, seed=0, cache=folder)
    assert len(list(folder.rglob("*.safetensors"))) == 4


def test_a_cache_that_cannot_be_written(media, lance):
    (media / "cache").write_text("a file")
    data = write_lines(media, painting("good"))
    with pytest.warns(LanceWarning, match="not kept"):
        example = open_data([native(data)], lance, seed=0, cache=media / "cache")[0]
    assert same(example, open_data([native(data)], lance, seed=0)[0])


def test_a_killed_writer_leaves_whole_latents(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from lance_core.train.latents import LatentCache\n"
        "for i in range(10**6): LatentCache(Path(sys.argv[1])).get(f'{i:064}', lambda: torch.full((48, 4, 64, 64), i))"
    )
    root = Path(__file__).parents[1]
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.safetensors"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    kept = list(tmp_path.rglob("*.safetensors"))
    assert len(kept) >= 5
    for path in kept:
        assert (load_file(path)["latent"] == int(path.stem)).all()
    assert LatentCache(tmp_path).get("a" * 64, lambda: torch.zeros(1)) == 0


# The converter and the small world as files


def contents(records) -> list[tuple]:
    """What records say, without the names of their media."""
    return sorted(
        (r.task, r.text, r.answer or "", r.system or "", r.first_frame, [_content(m) for m in media_of(r)])
        for r in records
    )


def _content(media) -> bytes:
    return media.content if isinstance(media, Embedded) else media.read_bytes()


def all_of(path: Path) -> list[Record]:
    records = open_records(path)
    return [records[index] for index in range(len(records))]


def test_from_files_to_parquet_and_back(media):
    write_mp4(moving(2), media / "clip.mp4")
    edited = {"task": "edit", "instruction": "x", "references": ["good.png"], "target": "odd.png"}
    lines = [
        painting("good"),
        {"task": "generate", "caption": "a clip", "target": "clip.mp4", "first_frame": True},
        edited,
        {**edited, "references": ["clip.mp4"], "target": "clip.mp4"},
        {"task": "understand", "question": "what?", "answer": "星", "references": ["good.png"]},
        {"task": "understand", "question": "what?", "answer": "x", "references": ["clip.mp4"], "system": "Look."},
        {"task": "describe", "caption": "a star", "references": ["clip.mp4"]},
    ]
    left_out = [
        painting("none"),
        {**edited, "references": ["good.png", "good.png"]},
        {**edited, "task": "idip"},
        {**edited, "target": "clip.mp4"},
        {"task": "understand", "question": "1 + 1?", "answer": "2"},
    ]
    data = write_lines(media, *lines, *left_out)
    with pytest.warns(LanceWarning, match="left out"):
        done = convert_data(data, media / "parquet")
    assert done.counts == {f"{schema}.parquet": 1 + (schema == "v2t") for schema in SCHEMAS}
    assert [int(text.split(", line ")[1].split()[0]) for text in done.skipped] == [8, 9, 10, 11, 12]
    back = convert_data(media / "parquet", media / "back")
    assert back.counts == {"data.jsonl": 7} and not back.skipped
    assert contents(all_of(media / "back")) == contents(all_of(data)[:7])


def test_what_parquet_cannot_hold_is_left_out(media, monkeypatch):
    small, large = sorted(("good", "odd"), key=lambda name: (media / f"{name}.png").stat().st_size)
    monkeypatch.setattr("lance_core.train.parquet.MOST_BYTES", (media / f"{small}.png").stat().st_size)
    data = write_lines(media, painting(large), painting(small))
    with pytest.warns(LanceWarning, match="line 1 is left out: image_bytes has .* bytes, and Parquet takes"):
        assert convert_data(data, media / "parquet").counts == {"t2i.parquet": 1}


def test_a_folder_that_cannot_be_filled_is_not_there(media):
    with pytest.warns(LanceWarning), pytest.raises(LanceError, match="no record of .* can be converted: .* line 1"):
        convert_data(write_lines(media, painting("none")), media / "new")
    assert not (media / "new").exists()
    data = write_lines(media, painting("good"))
    with pytest.raises(LanceError, match="is not empty"):
        convert_data(data, media)
    assert data.exists()


def test_the_small_world_as_files(tmp_path):
    seeds = {"one": 5, "same": 5, "other": 6}
    for name, seed in seeds.items():
        assert make_world(tmp_path / name, count=15, split="test", seed=seed) == {"data.jsonl": 15}
    counts = make_world(tmp_path / "parquet", count=15, split="test", format="parquet", seed=5)
    assert sum(counts.values()) == 15
    one, same, other, rows = (contents(all_of(tmp_path / name)) for name in (*seeds, "parquet"))
    assert one == same == rows != other


def test_clips_keep_every_frame(tmp_path):
    for frames in (moving(0, 9, 64), moving(1, 17, 64)):
        assert torch.equal(frames_of(png("x", frames))[0], frames)
    (tmp_path / "clip").write_bytes(png("x", moving(0)).content)
    assert torch.equal(read_image(tmp_path / "clip"), moving(0)[:1])


def test_the_commands(tmp_path, capsys):
    assert main(["make-world", str(tmp_path / "world"), "--count", "20", "--seed", "1"]) == 0
    assert main(["convert-data", str(tmp_path / "world"), str(tmp_path / "parquet")]) == 0
    assert main(["convert-data", str(tmp_path / "parquet" / "i2i.parquet"), str(tmp_path / "back")]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'world'}: data.jsonl with 20 records"
    assert "i2i.parquet with" in second and "data.jsonl with" in third
    assert main(["make-world", str(tmp_path / "world")]) == 2
