"""The nodes and workflows in a real ComfyUI, with a small random checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lance_core.workflow import run_workflow
from lance_core.world.example import example
from lance_core.world.render import SIDE

from .build_workflows import GRAPHS, WORKFLOWS
from .server import ComfyServer, ExecutionFailed, InvalidPrompt, Prompt, Run
from .workflow_graph import PACK, RESOLUTIONS, SPECS, Socket, Spec

OURS = {name: spec for name, spec in SPECS.items() if spec.pack == PACK}
WIDTH, HEIGHT, FRAMES, STEPS = 64, 48, 5, 2


def read(name: str, folder: str = "api") -> dict:
    return json.loads((WORKFLOWS / folder / f"{name}.json").read_text(encoding="utf-8"))


def small(prompt: Prompt, **changes: object) -> Prompt:
    """The graph for random weights, with small sizes, few steps, short answers, and other values by name."""
    video = any(node["class_type"] == "SaveVideo" or node["inputs"].get("frames", 1) > 1 for node in prompt.values())
    values = {
        "checkpoint": "Lance_3B_Video" if video else "Lance_3B",
        "steps": STEPS,
        "max_new_tokens": 6,
        "resolution": "video_192p" if video else "image_256res",
        **changes,
    }
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": WIDTH, "height": HEIGHT}
        if "size" in inputs:
            inputs |= {"size": "custom", "size.width": WIDTH, "size.height": HEIGHT}
        if inputs.get("frames", 1) > 1:
            inputs["frames"] = FRAMES
        inputs.update({name: value for name, value in values.items() if name in inputs})
    return prompt


def loading(prompt: Prompt, node_type: str, **inputs: object) -> Prompt:
    """The graph with one of core's loaders in the place of Lance Example."""
    node_id, _ = one(prompt, "LanceExample")
    return prompt | {node_id: {"class_type": node_type, "inputs": inputs}}


def one(prompt: Prompt, node_type: str) -> tuple[str, dict]:
    """The id and the inputs of the graph's only node of a type."""
    ((node_id, node),) = [(id_, node) for id_, node in prompt.items() if node["class_type"] == node_type]
    return node_id, node["inputs"]


def file_of(server: ComfyServer, run: Run, suffix: str) -> Path:
    (path,) = [path for path in server.output_files(run) if path.suffix == suffix and "output" in path.parts]
    return path


def as_sent(metadata: str) -> Prompt:
    """The graph in a file's metadata, without the fingerprints that the server adds to loaders."""
    prompt = json.loads(metadata)
    return {id_: {key: v for key, v in node.items() if key != "is_changed"} for id_, node in prompt.items()}


def shown_text(run: Run) -> str:
    (text,) = [entry for outputs in run.history["outputs"].values() for entry in outputs.get("text", [])]
    return text


def assert_sentence(message: str) -> None:
    """One sentence, which ends as one and begins anyhow, and nothing of a traceback."""
    assert message.endswith((".", "`")) and len(message.split()) > 4, message
    assert "\n" not in message and "Traceback" not in message and 'File "' not in message, message
    assert message.count(". ") == 0 and len(message) < 400, message


# --- the schemas ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


def schema_inputs(info: dict) -> dict[str, list]:
    """The inputs of a node as (type, options), in the editor's order: required before optional."""
    return {name: entry for group in ("required", "optional") for name, entry in info["input"].get(group, {}).items()}


def required_first(spec: Spec) -> list[str]:
    return sorted(spec.inputs, key=lambda name: spec.inputs[name].optional)


def test_the_pack_has_the_nodes(object_info):
    ours = {name for name, info in object_info.items() if info["python_module"] == "custom_nodes.lance"}
    assert OURS.keys() <= ours
    assert all(name in OURS or name.startswith("Lance") for name in ours)


@pytest.mark.parametrize("name", OURS)
def test_inputs_are_as_designed(object_info, name):
    inputs, spec = schema_inputs(object_info[name]), OURS[name]
    assert list(inputs) == required_first(spec)
    assert {key: entry[0] for key, entry in inputs.items()} == {key: entry.type for key, entry in spec.inputs.items()}
    assert set(object_info[name]["input"].get("optional", {})) == {k for k, e in spec.inputs.items() if e.optional}


@pytest.mark.parametrize("name", SPECS)
def test_outputs_are_as_designed(object_info, name):
    info = object_info[name]
    assert dict(zip(info["output_name"], info["output"])) == SPECS[name].outputs


@pytest.mark.parametrize("name", OURS)
def test_defaults_are_as_designed_and_within_their_range(object_info, name):
    for key, (type_, options) in schema_inputs(object_info[name]).items():
        widget = OURS[name].inputs[key]
        if isinstance(widget, Socket) or key == "checkpoint":
            continue
        if type_ == "COMBO":
            assert options.get("default", options["options"][0]) == widget.default
        elif type_ == "COMFY_DYNAMICCOMBO_V3":
            assert options["options"][0]["key"] == widget.default
        else:
            assert options["default"] == widget.default
        if type_ in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"]


@pytest.mark.parametrize("name", OURS)
def test_a_newcomer_is_told_what_everything_does(object_info, name):
    info = object_info[name]
    assert info["display_name"] and info["description"] and info["category"]
    assert [key for key, (_, options) in schema_inputs(info).items() if not options.get("tooltip")] == []


def test_options(object_info):
    checkpoints = schema_inputs(object_info["LoadLance"])["checkpoint"][1]["options"]
    assert checkpoints == ["nano (built in)", "Lance_3B", "Lance_3B_Video", "tiny/Lance_3B"]
    for name in ("EncodeSemantic", "EncodeLatent"):
        assert tuple(schema_inputs(object_info[name])["resolution"][1]["options"]) == RESOLUTIONS
    assert schema_inputs(object_info["LanceEdit"])["task"][1]["options"] == ["edit", "idip"]
    sampling = schema_inputs(object_info["LanceUnderstand"])["sampling"][1]["options"]
    assert {option["key"]: list(option["inputs"]["required"]) for option in sampling} == {
        "off": [],
        "on": ["temperature", "top_p", "top_k", "seed"],
    }


def test_nothing_of_the_pack_failed_to_load(server):
    assert "IMPORT FAILED" not in server.log.read_text(errors="replace")


# --- the workflows -------------------------------------------------------------------------------------------------

PICTURES = {
    "text_to_image": (WIDTH, HEIGHT),
    "image_edit": (256, 256),
    "two_reference_edit": (256, 256),
    "understand_then_edit": (256, 256),
    "ksampler": (WIDTH, HEIGHT),
    "inpaint": (256, 256),
    "describe_and_regenerate": (WIDTH, HEIGHT),
}
CLIPS = ("text_to_video", "image_to_video", "video_edit", "image_to_video_from_generated")
ANSWERS = ("ask_image", "ask_video", "understand_then_edit", "describe_and_regenerate")
BATCHES = {"batch_of_four": 4}


@pytest.fixture(scope="module")
def runs(server):
    """Runs of the shipped graphs, each once: `runs(name)`."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            done[name] = server.run(small(read(name)), workflow=read(name, folder="."))
        return done[name]

    return run


def test_every_workflow_is_run_here():
    assert {*PICTURES, *CLIPS, *ANSWERS, *BATCHES} == {graph.__name__ for graph in GRAPHS}


@pytest.mark.parametrize("name", PICTURES)
def test_a_workflow_makes_a_picture_that_carries_it(server, runs, name):
    with Image.open(file_of(server, runs(name), ".png")) as picture:
        picture.load()
    assert picture.size == PICTURES[name]
    assert as_sent(picture.info["prompt"]) == small(read(name))
    assert json.loads(picture.info["workflow"]) == read(name, folder=".")


@pytest.mark.parametrize("name", ["text_to_image", "image_edit", "two_reference_edit", "understand_then_edit"])
def test_a_workflow_gives_the_library_s_picture(server, runs, name, tmp_path):
    """The same graph, run without ComfyUI, is the same picture: bytes may differ by rounding."""
    models, inputs = server.folder / "models", server.folder / "input"
    results = run_workflow(small(read(name)), output=tmp_path, inputs=[inputs], models=[models])
    (alone,) = [file for result in results for file in result.files]
    here, there = pixels(file_of(server, runs(name), ".png")), pixels(alone)
    assert np.abs(here - there).max() <= 1


@pytest.mark.parametrize("name", ["image_edit", "understand_then_edit"])
def test_an_edit_is_another_picture_than_its_source(server, runs, name):
    edited = pixels(file_of(server, runs(name), ".png"))
    drawn, _ = example(one(read(name), "LanceExample")[1]["seed"])
    source = Image.fromarray((255 * drawn[0]).byte().numpy()).resize(PICTURES[name])
    assert np.abs(edited - np.asarray(source, dtype=int)).mean() > 8


def pixels(path: Path) -> np.ndarray:
    """Bytes of a picture, `[H, W, 3]`, as numbers that can be subtracted."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


@pytest.mark.parametrize("name", CLIPS)
def test_a_workflow_makes_a_clip(server, runs, name):
    with av.open(str(file_of(server, runs(name), ".mp4"))) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
        assert clip.streams.video[0].average_rate == Fraction(12)
        assert as_sent(clip.metadata["prompt"]) == small(read(name))
    assert len(frames) == FRAMES
    if name == "text_to_video":
        assert frames[0].shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", BATCHES)
def test_a_workflow_shows_a_batch_of_different_pictures(server, runs, name):
    pictures = []
    for path in server.output_files(runs(name)):
        with Image.open(path) as picture:
            assert picture.size == (WIDTH, HEIGHT)
            pictures.append(picture.tobytes())
    assert len(set(pictures)) == len(pictures) == BATCHES[name]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_workflow_shows_an_answer(runs, name):
    text = shown_text(runs(name))
    assert isinstance(text, str)
    if name == "understand_then_edit":
        assert text.endswith(" Keep everything else as it is.")


def test_the_answer_is_the_instruction(server):
    """Another question gives another answer, and so another picture."""
    shipped = read("understand_then_edit")
    asked, other = (server.run(prompt) for prompt in (shipped, with_question(shipped, "What colour is the circle?")))
    assert shown_text(asked) != shown_text(other)
    with Image.open(file_of(server, asked, ".png")) as before, Image.open(file_of(server, other, ".png")) as after:
        assert before.tobytes() != after.tobytes()


def with_question(prompt: Prompt, question: str) -> Prompt:
    changed = copy.deepcopy(prompt)
    one(changed, "LanceUnderstand")[1]["question"] = question
    return changed


def test_progress_and_cache(server):
    prompt = small(read("text_to_image"), seed=7, steps=4)
    node_id, _ = one(prompt, "LanceGenerate")
    first = server.run(prompt)
    values = [data["value"] for kind, data in first.events if kind == "progress" and data["node"] == node_id]
    assert values and values == sorted(values) and values[-1] == 4
    second = server.run(prompt)
    (cached,) = [data["nodes"] for kind, data in second.events if kind == "execution_cached"]
    assert node_id in cached


def test_a_seed_decides_the_picture(server):
    def pixels(seed: int) -> bytes:
        run = server.run(small(read("text_to_image"), seed=seed, filename_prefix=f"seed{seed}"))
        with Image.open(file_of(server, run, ".png")) as picture:
            return picture.tobytes()

    assert pixels(1) != pixels(2)


def test_sampling_an_answer(server):
    prompt = small(read("ask_image"))
    _, inputs = one(prompt, "LanceUnderstand")
    sampled = {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 3}
    inputs |= {"sampling": "on", **{f"sampling.{name}": value for name, value in sampled.items()}}
    assert isinstance(shown_text(server.run(prompt)), str)


def test_a_checkpoint_on_another_disk(server):
    prompt = small(read("text_to_image"), checkpoint="tiny/Lance_3B")
    assert file_of(server, server.run(prompt), ".png").is_file()


def test_an_uploaded_picture(server, tmp_path):
    Image.new("RGBA", (90, 50), (255, 0, 0, 128)).save(tmp_path / "half transparent.png")
    name = server.upload_image(tmp_path / "half transparent.png")
    assert isinstance(shown_text(server.run(loading(small(read("ask_image")), "LoadImage", image=name))), str)


def test_interrupting(server):
    prompt = small(read("text_to_image"), steps=200, seed=11)
    node_id, _ = one(prompt, "LanceGenerate")

    def stop(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == node_id:
            server.interrupt()

    with pytest.raises(ExecutionFailed) as failure:
        server.run(prompt, on_event=stop)
    assert failure.value.kind == "execution_interrupted"
    assert file_of(server, server.run(small(read("text_to_image"), seed=12)), ".png").is_file()


def test_core_nodes_read_our_latent_and_we_read_theirs(server):
    """VAE Decode takes what Lance Edit makes, and Lance Edit what VAE Encode makes."""
    prompt = small(read("image_edit"))
    decode_id, decode = one(prompt, "DecodeVideo")
    latent_id, latent = one(prompt, "EncodeLatent")
    prompt[decode_id] = {"class_type": "VAEDecode", "inputs": {"samples": decode["latent"], "vae": decode["vae"]}}
    prompt[latent_id] = {"class_type": "VAEEncode", "inputs": {"pixels": latent["media"], "vae": latent["vae"]}}
    with Image.open(file_of(server, server.run(prompt), ".png")) as picture:
        assert picture.size == (SIDE, SIDE)


# --- mistakes ------------------------------------------------------------------------------------------------------


def refusal(server: ComfyServer, prompt: Prompt, node_type: str) -> str:
    """The message of the refusal of a graph, of which one node of a type is to blame."""
    with pytest.raises(InvalidPrompt) as refused:
        server.run(prompt)
    node_id, _ = one(prompt, node_type)
    (message,) = refused.value.errors[node_id]
    return message


def failure_of(server: ComfyServer, prompt: Prompt, node_type: str) -> str:
    """The message of the failure of a graph in a node of a type."""
    with pytest.raises(ExecutionFailed) as failure:
        server.run(prompt)
    assert failure.value.kind == "execution_error" and failure.value.node_type == node_type
    return failure.value.message


def test_a_checkpoint_that_is_not_there(server):
    message = refusal(server, small(read("text_to_image"), checkpoint="nowhere"), "LoadLance")
    assert "nowhere" in message and "hf download" in message and "Lance_3B" in message


def test_a_checkpoint_without_its_vae(server):
    """It can still answer questions, so only a graph that needs the VAE is refused, before anything is painted."""
    folder = server.folder / "models/lance/broken"
    shutil.copytree(server.folder / "models/lance/Lance_3B", folder / "Lance_3B")
    try:
        prompt = small(read("text_to_image"), checkpoint="broken/Lance_3B")
        message = failure_of(server, prompt, "LoadLance")
    finally:
        shutil.rmtree(folder)
    assert_sentence(message)
    assert "Wan2.2_VAE.pth" in message


def test_a_truncated_checkpoint(server):
    folder = server.folder / "models/lance/short"
    shutil.copytree(server.folder / "models/lance/Lance_3B", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    try:
        message = failure_of(server, small(read("text_to_image"), checkpoint="short"), "LoadLance")
    finally:
        shutil.rmtree(folder)
    assert_sentence(message)
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("workflow", "changes", "node_type", "words"),
    [
        ("text_to_image", {"size.width": 72}, "LanceGenerate", "16"),
        ("ask_image", {"question": "  "}, "LanceUnderstand", "question"),
    ],
)
def test_a_wrong_value_gets_a_sentence(server, workflow, changes, node_type, words):
    message = failure_of(server, small(read(workflow), **changes), node_type)
    assert_sentence(message)
    assert words in message


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"frames": 125}, {"frames": 0}, {"size.width": 8}, {"guidance": -1.0}, {"shift": 0.0}]
)
def test_a_value_out_of_its_range_is_refused(server, changes):
    message = refusal(server, small(read("text_to_image"), **changes), "LanceGenerate")
    assert next(iter(changes)) in message


def test_a_latent_of_another_model(server):
    prompt = small(read("image_edit"))
    prompt["90"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    _, inputs = one(prompt, "LanceEdit")
    inputs["latent"] = ["90", 0]
    assert_sentence(failure_of(server, prompt, "LanceEdit"))


def test_two_semantics_and_one_latent(server):
    prompt = small(read("two_reference_edit"))
    _, inputs = one(prompt, "LanceEdit")
    del inputs["latent_2"]
    assert_sentence(failure_of(server, prompt, "LanceEdit"))


def test_a_missing_wire(server):
    prompt = small(read("image_edit"))
    _, inputs = one(prompt, "LanceEdit")
    del inputs["semantic"]
    assert "semantic" in refusal(server, prompt, "LanceEdit")


def test_a_wire_of_the_wrong_type(server):
    prompt = small(read("image_edit"))
    _, inputs = one(prompt, "LanceEdit")
    inputs["semantic"] = inputs["latent"]
    assert "LANCE_SEMANTIC" in refusal(server, prompt, "LanceEdit")


def test_a_file_that_is_no_video(server):
    (server.folder / "input/broken.mp4").write_bytes(b"not a video")
    prompt = loading(small(read("ask_video")), "LoadVideo", file="broken.mp4")
    _, looking = one(prompt, "EncodeSemantic")
    looking["media"] = [looking["media"][0], 0]  # Load Video has one output
    assert_sentence(failure_of(server, prompt, "EncodeSemantic"))


def test_a_node_that_is_not_installed(server):
    prompt = small(read("text_to_image")) | {"90": {"class_type": "NoSuchNode", "inputs": {}}}
    with pytest.raises(InvalidPrompt, match="NoSuchNode"):
        server.run(prompt)
