"""Writes `workflows/*.json` and `workflows/api/*.json`: `python -m tests.comfyui.build_workflows`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .workflow_graph import Graph, Node

WORKFLOWS = Path(__file__).parents[2] / "workflows"
RELEASE = "https://huggingface.co/bytedance-research/Lance/resolve/main"
IMAGE_MODEL, VIDEO_MODEL = "Lance_3B", "Lance_3B_Video"

GET_MODEL = """\
### The model
Download it once into `ComfyUI/models/lance` (30 GB):
```
hf download bytedance-research/Lance --local-dir ComfyUI/models/lance
```
then press **R** and choose it in *Load Lance*."""

OWN_PICTURE = "Choose a picture of your own in *Load Image*."
OWN_FILE = (
    "Choose a {thing} of your own in *{node}*, or copy the example from the pack's `workflows/media` folder into"
    " `ComfyUI/input` and press **R**."
)
SEED = "The same seed gives the same result; change it to see another one."


def note(title: str, *paragraphs: str) -> str:
    return "\n\n".join((f"## {title}", *paragraphs, GET_MODEL))


def load_lance(graph: Graph, model: str) -> Node:
    files = (f"{model}/model.safetensors", "Qwen2.5-VL-ViT/vit.safetensors", "Wan2.2_VAE.pth")
    models = [{"name": file, "url": f"{RELEASE}/{file}", "directory": "lance"} for file in files]
    return graph.add("LoadLance", checkpoint=model, properties={"models": models})


def save_image(graph: Graph, lance: Node, latent: Node) -> None:
    decoded = graph.add("DecodeVideo", vae=lance[1], latent=latent[0])
    graph.add("SaveImage", images=decoded[0])


def save_video(graph: Graph, lance: Node, latent: Node) -> None:
    decoded = graph.add("DecodeVideo", vae=lance[1], latent=latent[0])
    graph.add("SaveVideo", video=decoded[1])


def text_to_image() -> Graph:
    graph = Graph(
        note(
            "Text to image",
            "Write what you want to see in *prompt* and press **Run**.",
            f"Width and height are multiples of 16; 768 x 768 is what the model knows best. {SEED}",
        )
    )
    lance = load_lance(graph, IMAGE_MODEL)
    prompt = "A red paper boat on a calm pond at sunrise, soft mist, a wooden pier in the background."
    save_image(graph, lance, graph.add("LanceGenerate", model=lance[0], prompt=prompt))
    return graph


def text_to_video() -> Graph:
    graph = Graph(
        note(
            "Text to video",
            "Write what should happen in *prompt* and press **Run**.",
            "*frames* is a multiple of 4 plus 1, at 12 frames a second: 49 is four seconds, 121 the longest. "
            f"A smaller size such as 640 x 352 is much faster. {SEED}",
        )
    )
    lance = load_lance(graph, VIDEO_MODEL)
    prompt = "A red paper boat drifts across a calm pond at sunrise while mist rises from the water."
    clip = graph.add("LanceGenerate", model=lance[0], prompt=prompt, width=848, height=480, frames=49)
    save_video(graph, lance, clip)
    return graph


def image_to_video() -> Graph:
    graph = Graph(
        note(
            "Image to video",
            "The picture becomes the first frame; *prompt* says what happens next. "
            "The clip has the size at which *Encode Latent* reads the picture, whatever *width* and *height* say.",
            OWN_PICTURE,
        )
    )
    lance = load_lance(graph, VIDEO_MODEL)
    picture = graph.add("LoadImage")
    first_frame = graph.add("EncodeLatent", vae=lance[1], media=picture[0], resolution="video_480p")
    clip = graph.add(
        "LanceGenerate",
        model=lance[0],
        prompt="The camera moves slowly closer while day turns into night.",
        width=640,
        height=640,
        frames=49,
        first_frame=first_frame[0],
    )
    save_video(graph, lance, clip)
    return graph


def image_edit() -> Graph:
    graph = Graph(
        note(
            "Edit an image",
            "Write the change you want in *instruction*. The model looks at the picture twice: "
            "*Encode Semantic* reads what is in it, *Encode Latent* keeps what it looks like.",
            OWN_PICTURE,
        )
    )
    lance = load_lance(graph, IMAGE_MODEL)
    picture = graph.add("LoadImage")
    semantic = graph.add("EncodeSemantic", model=lance[0], media=picture[0])
    latent = graph.add("EncodeLatent", vae=lance[1], media=picture[0])
    instruction = "Turn the picture into a watercolour painting, keep the composition."
    edited = graph.add("LanceEdit", model=lance[0], semantic=semantic[0], latent=latent[0], instruction=instruction)
    save_image(graph, lance, edited)
    return graph


def video_edit() -> Graph:
    graph = Graph(
        note(
            "Edit a video",
            "Write the change you want in *instruction*. The clip is read at 12 frames a second, "
            "six seconds of it at most.",
            OWN_FILE.format(thing="clip", node="Load Video"),
        )
    )
    lance = load_lance(graph, VIDEO_MODEL)
    clip = graph.add("LoadVideo")
    semantic = graph.add("EncodeSemantic", model=lance[0], media=clip[0])
    latent = graph.add("EncodeLatent", vae=lance[1], media=clip[0])
    instruction = "Turn the red ball into a yellow one."
    edited = graph.add("LanceEdit", model=lance[0], semantic=semantic[0], latent=latent[0], instruction=instruction)
    save_video(graph, lance, edited)
    return graph


def two_reference_edit() -> Graph:
    graph = Graph(
        note(
            "Edit with two references",
            "*instruction* may speak of the first and of the second picture. "
            "The result has the size of the second one.",
            "Set *task* to **idip** to keep a person's or an object's identity rather than the picture around it.",
            OWN_FILE.format(thing="second picture", node="Load Image"),
        )
    )
    lance = load_lance(graph, IMAGE_MODEL)
    first = graph.add("LoadImage", title="First picture")
    second = graph.add("LoadImage", title="Second picture", image="lance_example_2.png")
    semantic = [graph.add("EncodeSemantic", model=lance[0], media=picture[0]) for picture in (first, second)]
    latent = [graph.add("EncodeLatent", vae=lance[1], media=picture[0]) for picture in (first, second)]
    edited = graph.add(
        "LanceEdit",
        model=lance[0],
        semantic=semantic[0][0],
        latent=latent[0][0],
        semantic_2=semantic[1][0],
        latent_2=latent[1][0],
        instruction="Place the object of the first picture beside the cup of the second picture.",
    )
    save_image(graph, lance, edited)
    return graph


def ask_image() -> Graph:
    graph = Graph(
        note(
            "Ask about an image",
            "Write a *question* and press **Run**; the answer appears in *Preview as Text*. "
            "With *sampling* off the answer is always the same.",
            OWN_PICTURE,
        )
    )
    lance = load_lance(graph, IMAGE_MODEL)
    picture = graph.add("LoadImage")
    semantic = graph.add("EncodeSemantic", model=lance[0], media=picture[0])
    question = "What is in the picture, and which colours does it have?"
    answer = graph.add("LanceUnderstand", model=lance[0], question=question, semantic=semantic[0])
    graph.add("PreviewAny", source=answer[0])
    return graph


def ask_video() -> Graph:
    graph = Graph(
        note(
            "Ask about a video",
            "Write a *question* and press **Run**; the answer appears in *Preview as Text*. "
            "The clip is read at 12 frames a second, six seconds of it at most.",
            OWN_FILE.format(thing="clip", node="Load Video"),
        )
    )
    lance = load_lance(graph, VIDEO_MODEL)
    clip = graph.add("LoadVideo")
    semantic = graph.add("EncodeSemantic", model=lance[0], media=clip[0])
    answer = graph.add(
        "LanceUnderstand", model=lance[0], question="In which direction does the ball move?", semantic=semantic[0]
    )
    graph.add("PreviewAny", source=answer[0])
    return graph


def understand_then_edit() -> Graph:
    graph = Graph(
        note(
            "Understand, then edit",
            "One model does both: it looks at the picture and proposes a change, "
            "the text passes through *Concatenate Text*, where you can add to it, "
            "and becomes the instruction of the edit. Both steps share one *Encode Semantic*.",
            OWN_PICTURE,
        )
    )
    lance = load_lance(graph, IMAGE_MODEL)
    picture = graph.add("LoadImage")
    semantic = graph.add("EncodeSemantic", model=lance[0], media=picture[0])
    latent = graph.add("EncodeLatent", vae=lance[1], media=picture[0])
    answer = graph.add(
        "LanceUnderstand",
        model=lance[0],
        question="Name one change that would make this picture more cheerful. Answer with one short sentence.",
        max_new_tokens=64,
        semantic=semantic[0],
    )
    instruction = graph.add(
        "StringConcatenate", string_a=answer[0], string_b="Keep everything else as it is.", delimiter=" "
    )
    graph.add("PreviewAny", source=instruction[0])
    edited = graph.add("LanceEdit", model=lance[0], semantic=semantic[0], latent=latent[0], instruction=instruction[0])
    save_image(graph, lance, edited)
    return graph


GRAPHS: tuple[Callable[[], Graph], ...] = (
    text_to_image,
    text_to_video,
    image_to_video,
    image_edit,
    video_edit,
    two_reference_edit,
    ask_image,
    ask_video,
    understand_then_edit,
)


def documents() -> dict[Path, dict[str, Any]]:
    """Every workflow file, in both forms: its path below `workflows/` and its content."""
    made = {graph.__name__: graph() for graph in GRAPHS}
    editor = {Path(f"{name}.json"): graph.editor() for name, graph in made.items()}
    return editor | {Path("api", f"{name}.json"): graph.api() for name, graph in made.items()}


def main() -> None:
    for path, document in documents().items():
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (WORKFLOWS / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
