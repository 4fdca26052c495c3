"""What people feel of a pack that fits its host: progress, previews, the stop button, memory, clear refusals."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lance_core.tiny import TINY_TEXT, make_tiny

from .conftest import server_in
from .server import ComfyServer, ExecutionFailed, InvalidPrompt, Prompt
from .test_server import assert_sentence, file_of, one, read, shown_text, small

LONG = {"steps": 200, "max_new_tokens": 2000, "resolution": "image_768res"}
STAGES = (
    ("image_edit", "EncodeSemantic"),
    ("image_edit", "EncodeLatent"),
    ("image_edit", "LanceEdit"),
    ("text_to_image", "LanceGenerate"),
    ("ksampler", "KSampler"),
    ("ksampler", "VAEDecode"),
    ("text_to_image", "DecodeVideo"),
    ("ask_image", "LanceUnderstand"),
)


def stopper(server: ComfyServer, node_id: str) -> Callable[[str, dict], None]:
    """Presses the stop button as soon as a node begins."""

    def stop(kind: str, data: dict) -> None:
        if kind == "executing" and data.get("node") == node_id:
            server.interrupt()

    return stop


@pytest.mark.parametrize(("workflow", "node_type"), STAGES)
def test_every_stage_can_be_stopped(server, workflow, node_type):
    decodes = node_type in ("VAEDecode", "DecodeVideo")
    changes = {"size.width": 768, "size.height": 768, "width": 768, "height": 768} | ({} if decodes else LONG)
    prompt = small(read(workflow), seed=len(node_type), **changes)
    node_id, _ = one(prompt, node_type)
    with pytest.raises(ExecutionFailed) as failure:
        server.run(prompt, on_event=stopper(server, node_id))
    assert failure.value.kind == "execution_interrupted"
    assert failure.value.event["node_id"] == node_id
    assert file_of(server, server.run(small(read("text_to_image"), seed=len(workflow))), ".png").is_file()


@pytest.mark.parametrize("workflow", ["text_to_image", "ksampler", "image_edit", "text_to_video"])
def test_previews_arrive_while_sampling(server, workflow):
    run = server.run(small(read(workflow), seed=31, steps=8), preview_method="latent2rgb")
    assert run.previews
    with Image.open(io.BytesIO(run.previews[0])) as preview:
        colours = preview.convert("RGB").getextrema()
    assert all(low < high for low, high in colours)


def test_the_answer_appears_while_it_is_written(server):
    prompt = small(read("ask_image"), question="What do you see here?", max_new_tokens=300)
    node_id, inputs = one(prompt, "LanceUnderstand")
    inputs |= {"sampling": "on", "sampling.temperature": 2.0, "sampling.top_p": 1.0, "sampling.top_k": 0}
    inputs |= {"sampling.seed": 5}
    run = server.run(prompt)
    texts = [text for node, text in run.texts if node == node_id]
    assert len(texts) > 1
    assert all(shown_text(run).startswith(text) for text in texts)
    assert texts == sorted(texts, key=len)
    assert texts[-1] == shown_text(run)


def test_progress_of_an_answer_is_its_tokens(server):
    prompt = small(read("ask_image"), question="And what else?", max_new_tokens=9)
    node_id, _ = one(prompt, "LanceUnderstand")
    run = server.run(prompt)
    values = [data["value"] for kind, data in run.events if kind == "progress" and data["node"] == node_id]
    assert values == sorted(values) and values[-1] <= 9


def test_only_what_has_changed_runs_again(server):
    """Another question does not look at the picture again, and the same inputs twice run nothing."""
    prompt = small(read("ask_image"), question="Which colours are there?")
    server.run(prompt)
    asked = server.run(small(read("ask_image"), question="Which shapes are there?"))
    again = server.run(small(read("ask_image"), question="Which shapes are there?"))
    assert cached(asked, prompt) == {"LoadLance", "LanceExample", "EncodeSemantic"}
    assert "LanceUnderstand" in cached(again, prompt)


def cached(run, prompt: Prompt) -> set[str]:
    (nodes,) = [data["nodes"] for kind, data in run.events if kind == "execution_cached"]
    return {prompt[node]["class_type"] for node in nodes}


# --- memory --------------------------------------------------------------------------------------------------------

LARGE = replace(TINY_TEXT, intermediate_size=65536)


def anonymous_memory(server: ComfyServer) -> float:
    """Megabytes that the server holds beside files it has mapped."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


@pytest.fixture
def large_checkpoint(server):
    folder = make_tiny(server.folder / "models/lance/large", text=LARGE)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through /proc, which this system lacks")
def test_free_gives_the_memory_back(server, large_checkpoint):
    stored = (large_checkpoint / "Lance_3B/model.safetensors").stat().st_size
    weights = 2 * stored / 2**20  # stored in bf16, float32 on a CPU
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.run(small(read("text_to_image"), seed=1))
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.run(small(read("text_to_image"), seed=2))
    before = anonymous_memory(server)
    server.run(small(read("text_to_image"), checkpoint="large/Lance_3B"))
    loaded = anonymous_memory(server)
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.run(small(read("text_to_image"), seed=3))  # freeing waits for the queue
    after = anonymous_memory(server)
    assert weights > 100
    assert loaded - before > 0.8 * weights
    assert after - before < 0.2 * weights


def test_without_a_cache(tmp_path_factory, comfyui, tiny_checkpoint):
    """`--cache-none` recomputes everything, and gives the same."""
    fresh = server_in(tmp_path_factory.mktemp("uncached"), comfyui, tiny_checkpoint)
    uncached = ComfyServer(fresh.comfyui, fresh.python, fresh.folder, (*fresh.arguments, "--cache-none"))
    with uncached as server:
        pictures = []
        for prefix in ("a", "b"):
            prompt = small(read("understand_then_edit"), filename_prefix=prefix)
            with Image.open(file_of(server, server.run(prompt), ".png")) as picture:
                pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workflow", "node_type", "change"),
    [
        ("text_to_image", "LanceGenerate", {"steps": 0}),
        ("text_to_image", "LanceGenerate", {"steps": "many"}),
        ("text_to_image", "LanceGenerate", {"frames": 125}),
        ("text_to_image", "LanceGenerate", {"guidance": -1.0}),
        ("text_to_image", "LanceGenerate", {"shift": 0.0}),
        ("text_to_image", "LanceGenerate", {"batch_size": 0}),
        ("text_to_image", "LanceGenerate", {"seed": -1}),
        ("text_to_image", "LanceGenerate", {"size.width": 8}),
        ("image_edit", "LanceEdit", {"task": "paint"}),
        ("image_edit", "EncodeSemantic", {"resolution": "8k"}),
        ("image_edit", "EncodeLatent", {"resolution": "8k"}),
        ("ask_image", "LanceUnderstand", {"max_new_tokens": 0}),
        ("text_to_image", "DecodeVideo", {"fps": 0.0}),
        ("ksampler", "LanceConditioning", {"task": "paint"}),
        ("text_to_image", "LoadLance", {"checkpoint": "nowhere"}),
        ("text_to_image", "LoadLance", {"weight_dtype": "fp4"}),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_runs(server, workflow, node_type, change):
    prompt = small(read(workflow), **change)
    node_id, inputs = one(prompt, node_type)
    inputs |= change
    with pytest.raises(InvalidPrompt) as refused:
        server.run(prompt)
    assert refused.value.errors[node_id]


@pytest.mark.parametrize(
    ("workflow", "node_type", "input_name", "source"),
    [
        ("text_to_image", "LanceGenerate", "model", "LanceExample"),
        ("image_edit", "EncodeSemantic", "model", "EncodeLatent"),
        ("image_edit", "EncodeSemantic", "media", "EncodeLatent"),
        ("image_edit", "EncodeLatent", "vae", "LanceExample"),
        ("image_edit", "LanceEdit", "semantic", "EncodeLatent"),
        ("image_edit", "LanceEdit", "latent", "EncodeSemantic"),
        ("ask_image", "LanceUnderstand", "semantic", "LanceExample"),
        ("ksampler", "LanceConditioning", "model", "EmptyLatentImage"),
        ("image_edit", "DecodeVideo", "latent", "LanceExample"),
    ],
)
def test_a_wire_of_another_type_is_refused(server, workflow, node_type, input_name, source):
    prompt = small(read(workflow))
    prompt["90"] = small(read("image_edit"))["2"] | {"_meta": {}}
    origin = "90" if source == "LanceExample" else one(prompt, source)[0]
    node_id, inputs = one(prompt, node_type)
    inputs[input_name] = [origin, 0]
    with pytest.raises(InvalidPrompt) as refused:
        server.run(prompt)
    assert input_name in refused.value.errors[node_id][0]


def test_a_checkpoint_that_is_deleted_while_the_editor_is_open(server):
    folder = server.folder / "models/lance/leaving"
    shutil.copytree(server.folder / "models/lance/Lance_3B", folder)
    server.run(small(read("ask_image"), checkpoint="leaving"))
    shutil.rmtree(folder)
    with pytest.raises(InvalidPrompt) as refused:
        server.run(small(read("ask_image"), checkpoint="leaving"))
    (message,) = refused.value.errors[one(small(read("ask_image")), "LoadLance")[0]]
    assert "leaving" in message and "hf download" in message


@pytest.mark.parametrize(
    ("workflow", "node_type", "gone", "there"),
    [
        ("text_to_image", "LanceGenerate", "size", {"width": 64, "height": 48}),  # as before there was a size widget
        ("text_to_image", "LanceGenerate", "size", {"size": "8k"}),
        ("ask_image", "LanceUnderstand", "sampling", {"sampling": "maybe"}),
    ],
)
def test_a_workflow_of_another_version(server, workflow, node_type, gone, there):
    prompt = small(read(workflow))
    _, inputs = one(prompt, node_type)
    for name in [name for name in inputs if name.split(".")[0] == gone]:
        del inputs[name]
    inputs |= there
    with pytest.raises(ExecutionFailed) as failure:
        server.run(prompt)
    assert failure.value.node_type == node_type
    assert_sentence(failure.value.message)
    assert gone in failure.value.message
