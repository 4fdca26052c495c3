"""Workflows in the API format, run over the stages without ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from goldens import TINY
from PIL import Image

from lance_core.errors import LanceError
from lance_core.media import write_mp4, write_png
from lance_core.stages import decode_video, encode_latent, generate, load_lance
from lance_core.workflow import override, read_workflow, run_workflow
from lance_core.workflow_nodes import NODES, Session

SIDE = 112  # pixels: a multiple of 16 and of 28, so that media can be used as they are


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder with models and input media."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "models" / "lance").mkdir(parents=True)
    (folder / "models" / "lance" / "tiny").symlink_to(TINY, target_is_directory=True)
    generator = torch.Generator().manual_seed(0)
    write_png(torch.rand(SIDE, SIDE, 3, generator=generator), folder / "input" / "picture.png")
    clip = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, SIDE, SIDE, 3)
    write_mp4(clip, folder / "input" / "clips" / "clip.mp4", fps=24)
    (folder / "secret.png").write_bytes((folder / "input" / "picture.png").read_bytes())
    return folder


@pytest.fixture
def run(shop, tmp_path):
    """Runs a workflow with that folder's models and media; files go to tmp_path/output."""

    def run(workflow, *overrides, **options):
        places = {"output": tmp_path / "output", "inputs": [shop / "input"], "models": [shop / "models"]}
        return run_workflow(workflow, overrides=overrides, device="cpu", **places, **options)

    return run


def node(class_type: str, title: str | None = None, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}


def text_to_image(**settings) -> dict:
    size = {"size": "custom", "size.width": 48, "size.height": 32}
    settings = {"prompt": "a fox", **size, "frames": 1, "steps": 2, "seed": 3, **settings}
    return {
        "1": node("LoadLance", checkpoint="tiny", weight_dtype="fp32"),
        "2": node("LanceGenerate", **{"model": ["1", 0], **settings}),
        "3": node("DecodeVideo", vae=["1", 1], latent=["2", 0], fps=12.0),
        "4": node("SaveImage", images=["3", 0], filename_prefix="lance/image"),
    }


def understand_then_edit() -> dict:
    return {
        "1": node("LoadLance", checkpoint="tiny", weight_dtype="fp32"),
        "2": node("LoadImage", image="picture.png"),
        "3": node("EncodeSemantic", model=["1", 0], media=["2", 0], resolution="native"),
        "4": node("EncodeLatent", vae=["1", 1], media=["2", 0], resolution="native"),
        "5": node("LanceUnderstand", model=["1", 0], semantic=["3", 0], question="What?", max_new_tokens=4),
        "6": node("StringConcatenate", string_a="Change:", string_b=["5", 0], delimiter=" "),
        "7": node("PreviewAny", source=["6", 0]),
        "8": node("LanceEdit", model=["1", 0], semantic=["3", 0], latent=["4", 0], instruction=["6", 0], steps=2),
        "9": node("DecodeVideo", vae=["1", 1], latent=["8", 0]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="edited"),
    }


def text_graph() -> dict:
    """A workflow that needs no model."""
    return {
        "1": node("PrimitiveString", "Greeting", value="hello"),
        "2": node("PrimitiveString", "Name", value="world"),
        "3": node("StringConcatenate", string_a=["1", 0], string_b=["2", 0], delimiter=", "),
        "4": node("PreviewAny", source=["3", 0]),
    }


def refused(run, workflow, *parts: str, overrides=()) -> None:
    """Asserts that a workflow is refused in one sentence that has all the parts."""
    with pytest.raises(LanceError) as caught:
        run(workflow, *overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def test_the_picture_is_what_the_stages_give(run, shop):
    workflow = text_to_image()
    (result,) = run(workflow)
    (path,) = result.files
    assert (result.node, path.name, path.parent.name) == ("4", "image_00001_.png", "lance")

    lance = load_lance(shop / "models" / "lance" / "tiny", device="cpu", dtype="fp32")
    expected = decode_video(lance, generate(lance, "a fox", width=48, height=32, steps=2, seed=3))
    with Image.open(path) as image:
        assert image.size == (48, 32)
        pixels = torch.tensor(list(image.tobytes())).view(1, 32, 48, 3)
        assert (pixels / 255 - expected).abs().max() <= 0.51 / 255
        assert json.loads(image.text["prompt"]) == workflow


def test_an_answer_becomes_the_instruction(run):
    text, picture = run(understand_then_edit())
    assert text.node == "7" and text.text.startswith("Change: ") and len(text.text) > len("Change: ")
    with Image.open(picture.files[0]) as image:
        assert image.size == (SIDE, SIDE)

    (second,) = [r for r in run(understand_then_edit(), "StringConcatenate.string_b=nothing") if r.files]
    assert second.files[0].read_bytes() != picture.files[0].read_bytes()


def test_a_clip_is_read_edited_and_written_with_its_workflow(run):
    workflow = {
        "1": node("LoadLance", checkpoint="tiny", weight_dtype="fp32"),
        "2": node("LoadVideo", file="clips/clip.mp4"),
        "3": node("EncodeSemantic", model=["1", 0], media=["2", 0], resolution="native"),
        "4": node("EncodeLatent", vae=["1", 1], media=["2", 0], resolution="native"),
        "5": node("LanceEdit", model=["1", 0], semantic=["3", 0], latent=["4", 0], instruction="snow", steps=1),
        "6": node("DecodeVideo", vae=["1", 1], latent=["5", 0], fps=10.0),
        "7": node("SaveVideo", video=["6", 1], filename_prefix="video/lance", format="auto", codec="auto"),
    }
    (result,) = run(workflow)
    assert result.files[0].name == "lance_00001_.mp4"
    with av.open(str(result.files[0])) as container:
        assert json.loads(container.metadata["prompt"]) == workflow
        assert container.streams.video[0].average_rate == 10
        # 9 frames at 24 per second are 0.375 s: one frame at 12 per second, 4k+1.
        assert sum(1 for _ in container.decode(video=0)) == 1


def test_the_frames_of_a_video_file_are_all_there(run):
    workflow = {
        "1": node("LoadVideo", file="clips/clip.mp4"),
        "2": node("GetVideoComponents", video=["1", 0]),
        "3": node("ImageFromBatch", image=["2", 0], batch_index=-2, length=5),
        "4": node("SaveImage", images=["3", 0], filename_prefix="frame"),
        "5": node("PreviewAny", source=["2", 2]),
        "6": node("CreateVideo", images=["2", 0], fps=["2", 2]),
        "7": node("SaveVideo", video=["6", 0], filename_prefix="copy", format="mp4"),
    }
    results = {result.node: result for result in run(workflow)}
    assert results["5"].text == "24.0"
    assert [path.name for path in results["4"].files] == ["frame_00001_.png", "frame_00002_.png"]
    with Image.open(results["4"].files[1]) as image:
        assert min(image.getpixel((50, 50))) > 240  # the clip ends in white
    with av.open(str(results["7"].files[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


def test_a_damaged_video_is_named(run, shop):
    whole = (shop / "input" / "clips" / "clip.mp4").read_bytes()
    for name, content in (("cut.mp4", whole[: len(whole) // 2]), ("noise.mp4", b"noise" * 100), ("empty.mp4", b"")):
        (shop / "input" / name).write_bytes(content)
        workflow = {
            "1": node("LoadVideo", file=name),
            "2": node("GetVideoComponents", video=["1", 0]),
            "3": node("PreviewImage", images=["2", 0]),
        }
        refused(run, workflow, "node 2 (GetVideoComponents)", name)


def test_core_vae_nodes_work_on_our_vae(run, shop):
    write_png(torch.rand(70, 50, 3), shop / "input" / "odd.png")
    workflow = {
        "1": node("LoadLance", checkpoint="tiny", weight_dtype="fp32"),
        "2": node("LoadImage", image="odd.png"),
        "3": node("VAEEncode", pixels=["2", 0], vae=["1", 1]),
        "4": node("VAEDecode", samples=["3", 0], vae=["1", 1]),
        "5": node("PreviewImage", images=["4", 0]),
    }
    (result,) = run(workflow)
    with Image.open(result.files[0]) as image:
        assert image.size == (48, 64)


def test_a_first_frame_stays_and_steps_are_reported_once(run, shop):
    workflow = text_to_image(frames=5, first_frame=["6", 0]) | {
        "4": node("SaveVideo", video=["3", 1], filename_prefix="clip", format="auto"),
        "5": node("LoadImage", image="picture.png"),
        "6": node("EncodeLatent", vae=["1", 1], media=["5", 0], resolution="native"),
        "7": node("PreviewImage", images=["3", 0]),
    }
    reports = []
    results = run(workflow, progress=lambda *report: reports.append(report))
    chunks = [("decode", 1, 2), ("decode", 2, 2)]
    assert reports == [("encode", 1, 1), ("generate", 1, 2), ("generate", 2, 2), *chunks]
    assert sum(len(result.files) for result in results) == 1 + 5


def test_each_node_runs_once(run, tmp_path):
    workflow = {
        "1": node("LoadImage", image="picture.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix="once"),
        "3": node("PreviewImage", images=["2", 0]),
        "4": node("PreviewImage", images=["2", 0]),
    }
    assert len(run(workflow)) == 3
    assert [path.name for path in tmp_path.glob("output/once*")] == ["once_00001_.png"]


def test_runs_do_not_overwrite_each_other(run, tmp_path):
    workflow = {
        "1": node("LoadImage", image="picture.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix="a/b"),
        "3": node("SaveImage", images=["1", 0], filename_prefix="%width%x%height%_%batch_num%"),
    }
    for _ in range(2):
        run(workflow)
    (tmp_path / "output" / "a" / "b_00041_.webm").touch()
    (tmp_path / "output" / "a" / "bb_00099_.png").touch()
    run(workflow)
    names = {path.name for path in tmp_path.glob("output/a/b_*.png")}
    assert names == {"b_00001_.png", "b_00002_.png", "b_00042_.png"}
    assert {path.name for path in tmp_path.glob("output/*.png")} == {f"112x112_0_0000{i}_.png" for i in (1, 2, 3)}


def test_only_what_an_output_needs_is_run(run):
    workflow = text_graph() | {"9": node("LoadImage", image="there is no such file.png")}
    assert [result.text for result in run(workflow)] == ["hello, world"]


def test_text_nodes(run):
    workflow = text_graph() | {
        "5": node("StringReplace", string=["3", 0], find="world", replace="fox"),
        "6": node("RegexReplace", string=["5", 0], regex_pattern=r"(F)ox", replace=r"\1ine", count=1),
        "7": node("PreviewAny", source=["6", 0]),
        "8": node("PrimitiveInt", value=3),
        "9": node("PreviewAny", source=["8", 0]),
        "10": node("PrimitiveBoolean", value=True),
        "11": node("PreviewAny", source=["10", 0]),
        "12": node("PrimitiveFloat", value=2),
        "13": node("PreviewAny", source=["12", 0]),
    }
    texts = {result.node: result.text for result in run(workflow)}
    assert texts == {"4": "hello, world", "7": "hello, fine", "9": "3", "11": "True", "13": "2.0"}
    refused(run, workflow, "node 6 (RegexReplace)", "'('", overrides=["6.regex_pattern=("])


def test_transparency_is_the_mask(run, shop):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((3, 1), (255, 0, 0, 51))
    image.save(shop / "input" / "alpha.png")
    workflow = {"1": node("LoadImage", image="alpha.png"), "2": node("PreviewAny", source=["1", 1])}
    (result,) = run(workflow)
    assert "0.8000" in result.text and "1, 1, 1" not in result.text


@pytest.mark.parametrize(
    "target", ["2.prompt", "LanceGenerate.prompt", "Paint.prompt"], ids=["by id", "by class", "by title"]
)
def test_set_finds_the_node(target):
    workflow = text_to_image()
    if target.startswith("Paint"):
        workflow["2"]["_meta"]["title"] = "Paint"
    changed = override(workflow, f"{target}=a = b, 2.5 wolves")
    assert changed["2"]["inputs"]["prompt"] == "a = b, 2.5 wolves"
    assert workflow["2"]["inputs"]["prompt"] == "a fox"


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("2.steps=7", "steps", 7),
        ("2.guidance=3", "guidance", 3.0),
        ("2.prompt=7", "prompt", "7"),
        ('2.prompt="quoted\\n"', "prompt", "quoted\n"),
        ("2.prompt=[1, 2", "prompt", "[1, 2"),
        ("2.size=video_360p", "size", "video_360p"),
        ("2.size.width=64", "size.width", 64),
        ("2.size.megapixels=1", "size.megapixels", 1.0),
        ('2.first_frame=["6", 0]', "first_frame", ["6", 0]),
        ('2.steps=["8", 0]', "steps", ["8", 0]),
    ],
)
def test_set_reads_the_value_by_the_inputs_type(assignment, name, value):
    result = override(text_to_image(), assignment)["2"]["inputs"][name]
    assert result == value and type(result) is type(value)


def test_set_reaches_dotted_inputs():
    changed = override(understand_then_edit(), "LanceUnderstand.sampling.top_k=5")
    assert changed["5"]["inputs"]["sampling.top_k"] == 5


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("2.steps", ["'2.steps'", "node.input=value"]),
        ("12.steps=3", ["'12.steps'", "2 (LanceGenerate)"]),
        ("2.stepz=3", ["node 2 (LanceGenerate)", "'stepz'", "steps"]),
        ("2.steps=many", ["'steps'", "'many'", "whole number"]),
        ("2.steps=1.5", ["'steps'", "1.5"]),
        ("2.steps=true", ["'steps'", "True"]),
        ("2.guidance=high", ["'guidance'", "a number"]),
        ("2.size=huge", ["'size'", "'huge'", "image_768res", "custom"]),
        ("2.size.depth=3", ["node 2 (LanceGenerate)", "'size.depth'", "size.aspect_ratio", "size.width"]),
        ("2.model=tiny", ["'model'", "MODEL", "link"]),
        ("2.steps=1" + "0" * 400, ["'steps'", "whole number"]),
    ],
)
def test_set_refuses(run, assignment, parts):
    refused(run, text_to_image(), *parts, overrides=[assignment])


def test_set_refuses_ambiguous_names(run):
    refused(run, text_graph(), "'PrimitiveString.value'", "1, 2", overrides=["PrimitiveString.value=x"])
    assert [r.text for r in run(text_graph(), "Name.value=fox", "Greeting.value=bye")] == ["bye, fox"]


def test_a_cycle_is_named(run):
    workflow = text_graph()
    workflow["1"] = node("StringReplace", string=["3", 0], find="a", replace="b")
    refused(run, workflow, "cycle", "node 1 (StringReplace)", "node 3 (StringConcatenate)")
    workflow["1"] = node("PrimitiveString", value=["1", 0])
    refused(run, workflow, "cycle", "node 1 (PrimitiveString) -> node 1")


def test_a_long_chain_is_no_cycle(run):
    workflow = {"0": node("PrimitiveString", value="x")}
    for i in range(1, 3000):
        workflow[str(i)] = node("PrimitiveString", value=[str(i - 1), 0])
    workflow["end"] = node("PreviewAny", source=["2999", 0])
    assert run(workflow)[0].text == "x"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"3": node("KSampler", model=["1", 0])}, ["node 3", "'KSampler'", "LanceGenerate"]),
        ({"3": node("StringConcatenate", string_a="a")}, ["node 3", "'string_b'", "missing"]),
        ({"4": node("PreviewAny", source=["77", 0])}, ["node 4 (PreviewAny)", "'source'", "node 77"]),
        ({"4": node("PreviewAny", source=["3", 1])}, ["node 4", "output 1", "node 3", "has 1"]),
        ({"4": node("PreviewAny", source=["3", -1])}, ["node 4", "output -1"]),
        ({"4": node("PreviewAny", source=["3"])}, ["node 4", "[node id, output index]"]),
        ({"4": node("PreviewAny", source=[["3"], 0])}, ["node 4", "[node id, output index]"]),
        ({"4": node("SaveImage", images=["3", 0])}, ["node 4", "'images'", "IMAGE", "STRING"]),
        ({"4": node("SaveImage", images="picture.png")}, ["node 4", "'images'", "link"]),
        ({"1": node("PrimitiveString", value=5)}, ["node 1", "'value'", "5", "text"]),
        ({"1": node("PrimitiveString", value=None)}, ["node 1", "'value'", "None"]),
        ({"4": node("PrimitiveString", value="a")}, ["no output", "PreviewAny"]),
        ({"4": {"inputs": {}}}, ["API format"]),
        ({"4": {"class_type": "PreviewAny", "inputs": []}}, ["API format"]),
        ({"nodes": [], "links": []}, ["editor's format", "Export (API)"]),
    ],
)
def test_a_wrong_graph_is_refused(run, tmp_path, changes, parts):
    refused(run, text_graph() | changes, *parts)
    assert not (tmp_path / "output").exists()


def test_what_the_editor_adds_is_passed_over(run):
    workflow = text_graph()
    workflow["4"]["inputs"]["preview_markdown"] = ["no", "link"]
    del workflow["4"]["_meta"]
    assert [result.text for result in run(workflow)] == ["hello, world"]


@pytest.mark.parametrize("name", ["../secret.png", "clips/../../secret.png", "/etc/hostname", "a\0b"])
def test_input_names_stay_inside_the_input_folder(run, name):
    workflow = {"1": node("LoadImage", image=name), "2": node("PreviewImage", images=["1", 0])}
    refused(run, workflow, "node 1 (LoadImage)", "leaves the input folder")


def test_a_missing_input_file_is_named(run, shop):
    workflow = {"1": node("LoadImage", image="no.png"), "2": node("PreviewImage", images=["1", 0])}
    refused(run, workflow, "node 1 (LoadImage)", "'no.png'", str(shop / "input"), "--input")


@pytest.mark.parametrize("prefix", ["../out", "a/../../out", "/tmp/out", "..", ".", "a/..", "a\0b", "link/out"])
def test_output_names_stay_inside_the_output_folder(run, tmp_path, prefix):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "link").symlink_to(tmp_path, target_is_directory=True)
    before = {path for path in tmp_path.rglob("*")}
    workflow = {
        "1": node("LoadImage", image="picture.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }
    refused(run, workflow, "node 2 (SaveImage)", "leaves the output folder")
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_missing_checkpoint_is_named(run, shop):
    refused(run, text_to_image(), "'other'", str(shop / "models" / "lance"), overrides=["1.checkpoint=other"])


def test_a_checkpoint_may_be_a_path(run):
    assert run(text_to_image(), f"LoadLance.checkpoint={TINY}")[0].files


def test_the_stages_errors_name_the_node(run, tmp_path):
    refused(run, text_to_image(**{"size.width": 50}), "node 2 (LanceGenerate)", "width is 50")
    refused(run, text_to_image(**{"size.width": -16}, batch_size=2), "node 2 (LanceGenerate)", "width is -16")
    refused(run, text_to_image(batch_size=0), "node 2 (LanceGenerate)", "batch_size is 0")
    refused(run, text_to_image(guidance=float("nan")), "node 2 (LanceGenerate)", "guidance")
    assert not (tmp_path / "output").exists()


def test_sampled_answers_follow_the_seed(run):
    def answer(*overrides):
        workflow = {
            "1": node("LoadLance", checkpoint="tiny", weight_dtype="fp32"),
            "2": node("LanceUnderstand", model=["1", 0], question="What?", max_new_tokens=8, sampling="on"),
            "3": node("PreviewAny", source=["2", 0]),
        }
        return run(workflow, *overrides)[0].text

    hot = "2.sampling.temperature=2.0"
    assert answer(hot, "2.sampling.seed=1") == answer(hot, "2.sampling.seed=1")
    assert answer(hot, "2.sampling.seed=1") != answer(hot, "2.sampling.seed=2")
    assert answer("2.sampling=off", hot) == answer("2.sampling=off")


def size_of_the_picture(run, workflow, *overrides):
    with Image.open(run(workflow, "2.steps=1", *overrides)[0].files[0]) as image:
        return image.size


def test_sizes_are_set_by_hand_by_megapixels_and_by_official_bucket(run):
    """What a chosen size does not have is passed over, what it lacks takes that choice's default."""
    by_hand = ("2.size=custom", "2.size.width=64", "2.size.height=80")
    assert size_of_the_picture(run, text_to_image(), *by_hand) == (64, 80)
    small = ("2.size=megapixels", "2.size.megapixels=0.06")
    assert size_of_the_picture(run, text_to_image(), *small) == (240, 240)
    assert size_of_the_picture(run, text_to_image(), *small, "2.size.aspect_ratio=2:3") == (192, 304)
    stray = text_to_image(**{"size": "image_512res", "size.width": "wide", "size.megapixels": ["77", 0]})
    assert size_of_the_picture(run, stray) == (512, 512)
    assert size_of_the_picture(run, stray, "2.size.aspect_ratio=9:16") == (384, 688)
    assert size_of_the_picture(run, text_to_image(size="video_360p")) == (624, 352)
    refused(run, text_to_image(**{"size": "image_512res", "size.aspect_ratio": "3:2"}), "'size.aspect_ratio'", "'3:2'")
    linked = text_to_image(size=["6", 4]) | {
        "5": node("LoadVideo", file="clips/clip.mp4"),
        "6": node("GetVideoComponents", video=["5", 0]),
    }
    refused(run, linked, "node 2 (LanceGenerate)", "'size'", "give text")


def test_a_size_may_be_left_out(run):
    workflow = text_to_image()
    workflow["2"]["inputs"] = {k: v for k, v in workflow["2"]["inputs"].items() if not k.startswith("size")}
    assert size_of_the_picture(run, workflow, "2.size=megapixels", "2.size.megapixels=0.01") == (96, 96)


def test_a_batch_is_painted_from_one_generator(run, shop):
    """As ComfyUI's samplers do."""
    lance = load_lance(shop / "models" / "lance" / "tiny", device="cpu", dtype="fp32")
    noise = torch.randn(3, 48, 1, 2, 3, generator=torch.Generator().manual_seed(3))
    expected = decode_video(lance, generate(lance, "a fox", width=48, height=32, steps=2, noise=noise))
    files = run(text_to_image(batch_size=3))[0].files
    assert len(files) == 3
    for path, picture in zip(files, expected):
        with Image.open(path) as image:
            pixels = torch.tensor(list(image.tobytes())).view(32, 48, 3)
        assert (pixels / 255 - picture).abs().max() <= 0.51 / 255


def test_edits_come_in_batches_too(run):
    pictures = [result for result in run(understand_then_edit(), "LanceEdit.batch_size=2") if result.files]
    assert len(pictures[0].files) == 2


def test_guidance_is_attached_to_the_model(run, shop):
    settings = {"guidance_start": 0.0, "guidance_end": 0.9, "renorm": "none"}
    workflow = text_to_image(model=["5", 0]) | {"5": node("LanceGuidance", model=["1", 0], **settings)}
    lance = load_lance(shop / "models" / "lance" / "tiny", device="cpu", dtype="fp32")
    options = {"guidance_interval": (0.0, 0.9), "renorm": "none"}
    expected = decode_video(lance, generate(lance, "a fox", width=48, height=32, steps=2, seed=3, **options))
    with Image.open(run(workflow)[0].files[0]) as image:
        pixels = torch.tensor(list(image.tobytes())).view(1, 32, 48, 3)
    assert (pixels / 255 - expected).abs().max() <= 0.51 / 255
    plain = decode_video(lance, generate(lance, "a fox", width=48, height=32, steps=2, seed=3))
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("prefix", ["../../evil", "a" * 400 + "/b", "\ud800"])
def test_a_bad_prefix_is_told_before_any_work(run, shop, prefix):
    workflow = text_to_image()
    (save,) = [one for one in workflow.values() if one["class_type"] == "SaveImage"]
    save["inputs"]["filename_prefix"] = prefix
    reports = []
    with pytest.raises(LanceError, match="SaveImage.*(leaves the output folder|is no file name)"):
        run(workflow, progress=lambda *report: reports.append(report))
    assert reports == []


def test_a_batch_of_pictures_is_a_clip(shop, tmp_path):
    lance = load_lance(TINY, device="cpu", dtype="fp32")
    session = Session({}, tmp_path, (), ())
    frames = torch.rand(5, 32, 32, 3)
    assert encode_latent(lance, frames, resolution=None).shape == (1, 48, 2, 2, 2)
    (latent,) = NODES["EncodeLatent"].run(session, vae=lance, media=frames, resolution="native")
    assert torch.equal(latent["samples"], encode_latent(lance, frames, resolution=None))


def test_files_that_are_no_workflow(tmp_path):
    path = tmp_path / "workflow.json"
    with pytest.raises(LanceError, match="cannot be read"):
        read_workflow(path)
    for content in ("{", "[1, 2]", "{}", "3", '{"1": 2}', '{"nodes": []}', "\xff"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(LanceError):
            read_workflow(path)
