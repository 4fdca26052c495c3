"""The command line, in-process unless a process is the point."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from goldens import DATA, TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from lance_core.__main__ import Bars, Typewriter, main
from lance_core.media import read_image, write_png
from lance_core.stages import encode_latent, encode_semantic, load_lance, understand
from lance_core.world.example import example

SIDE = 112  # pixels: a multiple of 16 and of 28, so that media can be used as they are
MODEL = ("--model", str(TINY), "--device", "cpu", "--dtype", "fp32")
SMALL = ("--width", "48", "--height", "32", "--steps", "2")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty current folder with one picture to work on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LANCE_MODELS", raising=False)
    write_png(torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0)), "picture.png")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(capsys, home: Path, arguments: tuple, *parts: str) -> None:
    """Asserts exit code 2, one sentence with all the parts on stderr, nothing on stdout, and no new file."""
    before = files(home)
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    (sentence,) = [line for line in err.splitlines() if line]
    assert sentence.startswith("error: ") and out == "" and files(home) == before
    for part in parts:
        assert part in sentence


def test_understand_prints_what_the_stage_answers(capsys):
    arguments = ["understand", *MODEL, "--media", "picture.png", "What is this?"]
    assert main([*arguments, "--max-new-tokens", "6", "--resolution", "native"]) == 0
    lance = load_lance(TINY, device="cpu", dtype="fp32")
    semantic = encode_semantic(lance, read_image("picture.png"), resolution=None)
    expected = understand(lance, semantic, "What is this?", max_new_tokens=6)
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert "answer" in err and "6/6" in err


def test_understand_without_media_is_a_conversation(capsys):
    assert main(["understand", *MODEL, "Hello?", "--max-new-tokens", "3"]) == 0
    expected = understand(load_lance(TINY, device="cpu"), None, "Hello?", max_new_tokens=3)
    assert capsys.readouterr().out == expected + "\n"


def test_understand_draws_with_a_seed(capsys):
    def answer(seed: str) -> str:
        options = ("--temperature", "2", "--top-p", "0.95", "--top-k", "50", "--seed", seed)
        assert main(["understand", *MODEL, "Hello?", "--max-new-tokens", "8", *options]) == 0
        return capsys.readouterr().out

    assert answer("1") == answer("1") != answer("2")


def test_generate_names_its_file_and_overwrites_nothing(capsys, home):
    for expected in ("lance_7.png", "lance_7_2.png"):
        assert main(["generate", *MODEL, "a fox", *SMALL, "--seed", "7"]) == 0
        out, err = capsys.readouterr()
        assert out == f"{expected}\n"
        assert "generate" in err and "2/2" in err
    with Image.open("lance_7.png") as image:
        assert image.size == (48, 32)
    assert Path("lance_7.png").read_bytes() == Path("lance_7_2.png").read_bytes()


def test_generate_a_clip_and_say_that_frames_were_rounded(capsys):
    assert main(["generate", *MODEL, "a fox", *SMALL, "--frames", "7", "--output", "new/clip.mp4"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{Path('new/clip.mp4')}\n"
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "7 frames" in line and "5" in line
    with av.open("new/clip.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 12)
        assert sum(1 for _ in container.decode(stream)) == 5


def test_generate_from_a_first_frame(capsys):
    options = ("--first-frame", "picture.png", "--resolution", "native", "--frames", "5", "--steps", "1")
    assert main(["generate", *MODEL, "it moves", *options, "--output", "clip.safetensors"]) == 0
    latent = load_file("clip.safetensors")["latent_tensor"]
    first = encode_latent(load_lance(TINY, device="cpu"), read_image("picture.png"), resolution=None)
    assert latent.shape == (1, 48, 2, SIDE // 16, SIDE // 16)
    assert torch.equal(latent[:, :, :1], first)


@pytest.mark.parametrize("suffix", [".safetensors", ".latent"])
def test_a_saved_latent_decodes_to_the_same_picture(home, suffix):
    assert main(["generate", *MODEL, "a fox", *SMALL, "--output", "direct.png"]) == 0
    assert main(["generate", *MODEL, "a fox", *SMALL, "--output", f"saved{suffix}"]) == 0
    tensors = load_file(f"saved{suffix}")
    assert set(tensors) == {"latent_tensor", "latent_format_version_0"}  # what ComfyUI's LoadLatent reads
    assert main(["decode", *MODEL, f"saved{suffix}", "--output", "decoded.png"]) == 0
    assert main(["decode", *MODEL, f"saved{suffix}"]) == 0
    direct, decoded, default = (read_image(name) for name in ("direct.png", "decoded.png", "saved.png"))
    assert torch.equal(direct, decoded) and torch.equal(direct, default)


def test_decode_reads_a_bare_samples_tensor():
    save_file({"samples": torch.zeros(1, 48, 2, 2, 3)}, "bare.safetensors")
    assert main(["decode", *MODEL, "bare.safetensors", "--output", "bare.mp4", "--fps", "6"]) == 0
    with av.open("bare.mp4") as container:
        assert container.streams.video[0].average_rate == 6


def test_edit_takes_the_pictures_size_unless_told():
    common = ("--media", "picture.png", "--resolution", "native", "--steps", "1")
    assert main(["edit", *MODEL, "make it blue", *common, "--output", "same.png"]) == 0
    assert main(["edit", *MODEL, "the same toy", *common, "--task", "idip", *SMALL, "--output", "new.png"]) == 0
    assert read_image("same.png").shape == (1, SIDE, SIDE, 3)
    assert read_image("new.png").shape == (1, 32, 48, 3)


def test_edit_with_two_references_differs_from_one():
    write_png(torch.zeros(SIDE, SIDE, 3), "second.png")
    common = ("--media", "picture.png", "--resolution", "native", "--steps", "1")
    assert main(["edit", *MODEL, "mix them", "--media", "second.png", *common, "--output", "two.png"]) == 0
    assert main(["edit", *MODEL, "mix them", *common, "--output", "one.png"]) == 0
    assert not torch.equal(read_image("two.png"), read_image("one.png"))


def test_inspect_says_what_is_missing(capsys, home):
    assert main(["inspect", str(TINY)]) == 0
    whole = capsys.readouterr().out
    (home / "part").mkdir()
    (home / "part" / "Lance_3B").symlink_to(TINY / "Lance_3B", target_is_directory=True)
    assert main(["inspect", "part"]) == 0
    part = capsys.readouterr().out
    assert "VAE" in whole and "missing" not in whole and "missing" in part


def test_make_tiny_runs(capsys):
    assert main(["make-tiny", "models/lance/tiny"]) == 0
    assert main(["generate", "--model", "models/lance/tiny", "a fox", *SMALL, "--output", "tiny.png"]) == 0
    capsys.readouterr()
    assert main(["inspect", "models/lance/tiny"]) == 0
    assert "missing" not in capsys.readouterr().out
    assert sum(path.stat().st_size for path in Path("models").rglob("*") if path.is_file()) < 10e6


def test_make_tiny_overwrites_when_told_to(capsys):
    assert main(["make-tiny", "tiny"]) == 0
    assert main(["make-tiny", "tiny"]) == 2
    assert "allow it to be overwritten" in capsys.readouterr().err
    assert main(["make-tiny", "tiny", "--overwrite", "--seed", "1"]) == 0


def test_a_missing_vae_is_told_before_any_work(capsys):
    assert main(["make-tiny", "tiny"]) == 0
    Path("tiny/Wan2.2_VAE.pth").unlink()
    capsys.readouterr()
    arguments = ["generate", "--model", "tiny", "a fox", *SMALL]
    assert main([*arguments, "--output", "x.png"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: this checkpoint has no VAE") and "generate:" not in err
    assert main([*arguments, "--output", "x.latent"]) == 0


def workflow() -> dict:
    return {
        "1": {"class_type": "LoadLance", "inputs": {"checkpoint": "tiny", "weight_dtype": "default"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "picture.png"}},
        "3": {
            "class_type": "EncodeSemantic",
            "inputs": {"model": ["1", 0], "media": ["2", 0], "resolution": "native"},
        },
        "4": {
            "class_type": "LanceUnderstand",
            "inputs": {"model": ["1", 0], "semantic": ["3", 0], "question": "What?", "max_new_tokens": 5},
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "copy"}},
    }


def test_run_shows_answers_and_files(capsys, home, monkeypatch):
    (home / "farm" / "lance").mkdir(parents=True)
    (home / "farm" / "lance" / "tiny").symlink_to(TINY, target_is_directory=True)
    (home / "flows").mkdir()
    (home / "flows" / "ask.json").write_text(json.dumps(workflow()), encoding="utf-8")
    lance = load_lance(TINY, device="cpu", dtype="fp32")
    semantic = encode_semantic(lance, read_image("picture.png"), resolution=None)

    options = ("--models", "farm", "--device", "cpu", "--dtype", "fp32", "--set", "LanceUnderstand.question=Why?")
    assert main(["run", "flows/ask.json", *options]) == 0
    picture = Path("output/copy_00001_.png")
    answer = understand(lance, semantic, "Why?", max_new_tokens=5)
    assert set(capsys.readouterr().out.splitlines()) == {*answer.splitlines(), str(picture)}
    with Image.open(picture) as image:
        assert json.loads(image.text["prompt"])["4"]["inputs"]["question"] == "Why?"

    (home / "picture.png").rename(home / "flows" / "picture.png")  # beside the workflow
    monkeypatch.setenv("LANCE_MODELS", str(home / "farm"))
    assert main(["run", "flows/ask.json", "--output", "other"]) == 0
    assert Path("other/copy_00001_.png").exists()


def test_the_shipped_workflows_can_be_read(capsys, home):
    folder = Path(__file__).parent.parent / "workflows" / "api"
    paths = sorted(folder.glob("*.json"))
    assert paths
    for path in paths:
        if path.stem in ("ksampler", "inpaint"):  # through core's own sampler
            refused(capsys, home, ("run", path), "which only ComfyUI can run")
        else:
            # Everything about the graph is right: what is missing is the checkpoint, which is loaded first.
            refused(capsys, home, ("run", path, "--model", "none"), "(LoadLance)", "no checkpoint 'none'")


def test_run_takes_another_checkpoint_than_the_workflow_s(capsys):
    workflow = Path(__file__).parent.parent / "workflows/api/ask_image.json"
    nodes = {node["class_type"]: node["inputs"] for node in json.loads(workflow.read_text(encoding="utf-8")).values()}
    short = ("--set", "LanceUnderstand.max_new_tokens=4", "--set", "EncodeSemantic.resolution=image_256res")
    assert main(["run", str(workflow), "--model", str(TINY), "--device", "cpu", *short]) == 0
    lance, (drawn, _) = load_lance(TINY, device="cpu"), example(nodes["LanceExample"]["seed"])
    semantic = encode_semantic(lance, drawn, resolution="image_256res")
    expected = understand(lance, semantic, nodes["LanceUnderstand"]["question"], max_new_tokens=4)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("generate", *MODEL, "x", "--width", "50", "--height", "32"), ["width is 50", "multiple of 16"]),
        (("generate", *MODEL, "x", "--width", "1040", "--height", "1040"), ["1040x1040", "too large"]),
        (("generate", *MODEL, "x", "--width", "48"), ["height"]),
        (("generate", *MODEL, "x", *SMALL, "--steps", "0"), ["steps is 0"]),
        (("generate", *MODEL, "x", *SMALL, "--steps", "-3"), ["steps is -3"]),
        (("generate", *MODEL, "x", *SMALL, "--frames", "0"), ["frames is 0"]),
        (("generate", *MODEL, "x", *SMALL, "--frames", "125"), ["125 frames"]),
        (("generate", *MODEL, "x", *SMALL, "--guidance", "nan"), ["guidance is nan"]),
        (("generate", *MODEL, "x", *SMALL, "--guidance-interval", "0", "2"), ["guidance_interval is 2"]),
        (("generate", *MODEL, "x", *SMALL, "--seed", "-1"), ["seed is -1"]),
        (("generate", *MODEL, "x", *SMALL, "--output", "x.gif"), ["x.gif", ".png"]),
        (("generate", *MODEL, "x", *SMALL, "--frames", "5", "--output", "x.png"), ["x.png", "5 frames", ".mp4"]),
        (("generate", *MODEL, "x", *SMALL, "--output", "picture.png/x.png"), ["picture.png", "cannot be written"]),
        (("generate", *MODEL, "x", *SMALL, "--output", "picture.png/x.latent"), ["picture.png", "cannot be written"]),
        (("generate", *MODEL, "x", "--first-frame", "no.png", "--frames", "5"), ["no.png"]),
        (("generate", "--model", "nowhere", "x"), ["nowhere"]),
        (("generate", "--model", str(TINY), "--device", "warp", "x", *SMALL), ["warp"]),
        (("generate", "--model", str(TINY), "--device", "meta", "x", *SMALL), ["meta", "not available"]),
        (("generate", "--model", str(TINY), "--dtype", "fp16", "x", *SMALL), ["16"]),
        (("generate", *MODEL, "x", *SMALL, "--tile", "0"), ["--tile is 0"]),
        (("make-tiny", "new", "--seed", str(10**24)), ["seed is 1000"]),
        (("understand", *MODEL, " "), ["question is empty"]),
        (("understand", *MODEL, "x", "--media", "no.png"), ["no.png"]),
        (("understand", *MODEL, "x", "--top-p", "2"), ["top_p is 2"]),
        (("edit", *MODEL, "x", "--media", "no.png"), ["no.png"]),
        (("edit", *MODEL, "x", "--media", "text.txt"), ["text.txt"]),
        (("decode", *MODEL, "no.safetensors"), ["no.safetensors", "does not exist"]),
        (("decode", *MODEL, "text.txt"), ["text.txt", "save it again"]),
        (("decode", *MODEL, "other.safetensors", "--output", "x.png"), ["other.safetensors", "latent_tensor"]),
        (("decode", *MODEL, "flat.safetensors", "--output", "x.png"), ["[48, 2, 2]"]),
        (("decode", *MODEL, "clip.safetensors", "--output", "x.png"), ["x.png", "5 frames"]),
        (("decode", *MODEL, "clip.safetensors", "--output", "x.latent"), ["x.latent", ".mp4"]),
        (("decode", *MODEL, "clip.safetensors", "--tile", "0"), ["--tile is 0"]),
        (("decode", *MODEL, "clip.safetensors", "--fps", "0"), ["--fps is 0.0"]),
        (("inspect", "nowhere"), ["nowhere"]),
        (("make-tiny", "picture.png"), ["picture.png"]),
        (("run", "no.json"), ["no.json", "cannot be read"]),
        (("run", "text.txt"), ["text.txt", "JSON"]),
        (("run", "editor.json"), ["editor's format", "Export (API)"]),
    ],
    ids=lambda value: "_".join(map(str, value))[-40:] if isinstance(value, tuple) else "",
)
def test_errors_are_one_sentence_and_leave_no_file(capsys, home, arguments, parts):
    (home / "text.txt").write_text("not a latent, nor JSON")
    (home / "editor.json").write_text('{"nodes": [], "links": []}')
    save_file({"weight": torch.zeros(2)}, home / "other.safetensors")
    save_file({"latent_tensor": torch.zeros(48, 2, 2)}, home / "flat.safetensors")
    save_file({"latent_tensor": torch.zeros(1, 48, 2, 2, 2)}, home / "clip.safetensors")
    refused(capsys, home, arguments, *parts)


def test_a_typewriter_writes_only_what_is_new(capsys):
    typewriter = Typewriter()
    for text in ("", "A", "A cat", "A cat sits."):
        typewriter(text)
    assert capsys.readouterr().out == "A cat sits."


def test_a_bar_is_closed_when_something_else_begins(capsys):
    with Bars() as bars:
        bars("answer", 1, 256)
        bars("generate", 1, 2)
        bars("generate", 2, 2)
        bars("generate", 1, 2)
    lines = capsys.readouterr().err.strip().split("\n")  # bars redraw after \r
    assert [line.split("\r")[-1].split(":")[0] for line in lines] == ["answer", "generate", "generate"]


def test_ctrl_c_stops_with_one_line_and_no_file(home):
    command = [sys.executable, "-m", "lance_core", "generate", *MODEL, "x", "--width", "48", "--height", "32"]
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--output", "x.png"],
        cwd=home,
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr.read(9) == b"\rgenerate"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == b""
    assert err.decode().splitlines()[-1] == "stopped" and "Traceback" not in err.decode()
    assert files(home) == {"picture.png"}


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for command in ("understand", "generate", "edit", "decode", "inspect", "make-tiny", "run"):
        assert command in out


def test_a_clip_file_is_understood(capsys):
    media = str(DATA / "media" / "a_vid.mp4")
    options = ("--resolution", "video_192p", "--max-new-tokens", "2")
    assert main(["understand", *MODEL, "--media", media, "What happens?", *options]) == 0
    assert "2/2" in capsys.readouterr().err


def test_less_memory_gives_the_same_picture(home):
    for name, options in (("whole.png", ()), ("less.png", ("--memory", "0.01"))):
        assert main(["generate", *MODEL, "a fox", *SMALL, *options, "--output", name]) == 0
    assert (home / "whole.png").read_bytes() == (home / "less.png").read_bytes()


def test_too_little_memory_is_told_in_one_sentence(capsys, home):
    refused(capsys, home, ("generate", *MODEL, "a fox", *SMALL, "--memory", "0.0001"), "GiB of device memory at least")
    refused(capsys, home, ("generate", *MODEL, "a fox", *SMALL, "--memory", "much"), "memory is 'much'")


@pytest.mark.parametrize(
    ("task", "phases"),
    [
        ("generate", ["paint", "decode"]),
        ("edit", ["look", "encode", "paint", "decode"]),
        ("understand", ["look", "answer"]),
    ],
)
def test_memory_tells_every_phase_of_a_request(capsys, task, phases):
    assert main(["memory", *MODEL, task, "--width", "64", "--height", "64"]) == 0
    head, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == phases
    for row in rows:
        weights, working, whole, least = map(float, row.split()[1:])
        assert least <= whole and whole >= working


def test_memory_refuses_impossible_sizes(capsys, home):
    refused(capsys, home, ("memory", *MODEL, "generate", "--width", "100"), "width is 100: give a multiple of 16")
