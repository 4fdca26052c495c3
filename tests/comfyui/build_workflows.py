"""Writes workflows/*.json, workflows/api/*.json and subgraphs/*.json: `python -m tests.comfyui.build_workflows`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_core.prompts import describe_prompt
from lance_core.world.render import SIDE

from .blueprint import blueprint
from .workflow_graph import Graph, Node

WORKFLOWS = Path(__file__).parents[2] / "workflows"
SUBGRAPHS = WORKFLOWS.parent / "subgraphs"
REAL_MODEL = """\
### From the toy to the real model
*nano (built in)* comes with the pack and knows coloured shapes in 48 x 48 pixels, nothing else. For real pictures
download Lance once (30 GB):
```
hf download bytedance-research/Lance --local-dir ComfyUI/models/lance
```
then press **R**, choose *{model}* in *Load Lance*, {source}and write freely."""

PICTURE, ONE_SHAPE, CLIP = 2692, 21, 53  # seeds of Lance Example
CLIP_FRAMES = 9
OWN_PICTURE = "put *Load Image* in the place of *Lance Example* "
OWN_CLIP = "put *Load Video* in the place of *Lance Example* "
DESCRIBE = "Describe the picture."
FIRST_FRAME = "choose *video_480p* in *Encode Latent*, "
OFFICIAL = {"seed": 42, "steps": 30, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
SEED = "The same seed gives the same result; change it to see another one."


def note(title: str, *paragraphs: str, model: str = "Lance_3B", source: str = "") -> str:
    """source: what else is to be done before the real model is of use."""
    return "\n\n".join((f"## {title}", *paragraphs, REAL_MODEL.format(model=model, source=source)))


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
            "*size* auto is what the model knows best; others that it was trained with come in six aspect ratios, and"
            f" *megapixels* and *custom* take any. {SEED}",
        )
    )
    lance = graph.add("LoadLance")
    prompt = "A big red circle at the top left and a small blue square on the right, on a white background."
    save_image(graph, lance, graph.add("LanceGenerate", model=lance[0], prompt=prompt))
    return graph


def text_to_video() -> Graph:
    graph = Graph(
        note(
            "Text to video",
            "Write what should happen in *prompt* and press **Run**.",
            "*frames* is a multiple of 4 plus 1, at 12 frames a second: nano knows 9, of the real model 49 is four "
            f"seconds and 121 the longest. {SEED}",
            model="Lance_3B_Video",
        )
    )
    lance = graph.add("LoadLance")
    prompt = "A big red circle moves right, starting on the left, on a white background."
    clip = graph.add("LanceGenerate", model=lance[0], prompt=prompt, frames=CLIP_FRAMES)
    save_video(graph, lance, clip)
    return graph


def image_to_video() -> Graph:
    graph = Graph(
        note(
            "Image to video",
            "The picture becomes the first frame; *prompt* says what happens next. "
            "The clip has the size at which *Encode Latent* reads the picture, whatever *size* says.",
            model="Lance_3B_Video",
            source=FIRST_FRAME + OWN_PICTURE,
        )
    )
    lance = graph.add("LoadLance")
    picture = graph.add("LanceExample", seed=PICTURE)
    first_frame = graph.add("EncodeLatent", vae=lance[1], media=picture[0])
    clip = graph.add(
        "LanceGenerate",
        model=lance[0],
        prompt="A small red circle moves up, starting in the center, and a big blue square rests at the bottom left, on"
        " a white background.",
        frames=CLIP_FRAMES,
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
            source=OWN_PICTURE,
        )
    )
    lance = graph.add("LoadLance")
    picture = graph.add("LanceExample", seed=PICTURE)
    semantic = graph.add("EncodeSemantic", model=lance[0], media=picture[0])
    latent = graph.add("EncodeLatent", vae=lance[1], media=picture[0])
    instruction = "Make the circle blue."
    edited = graph.add("LanceEdit", model=lance[0], semantic=semantic[0], latent=latent[0], instruction=instruction)
    save_image(graph, lance, edited)
    return graph


def video_edit() -> Graph:
    graph = Graph(
        note(
            "Edit a video",
            "Write the change you want in *instruction*. The clip is read at 12 frames a second, "
            "six seconds of it at most.",
            model="Lance_3B_Video",
            source=OWN_CLIP,
        )
    )
    lance = graph.add("LoadLance")
    clip = graph.add("LanceExample", seed=CLIP, frames=CLIP_FRAMES)
    semantic = graph.add("EncodeSemantic", model=lance[0], media=clip[1])
    latent = graph.add("EncodeLatent", vae=lance[1], media=clip[1])
    instruction = "Make the circle blue."
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
            "Nano can do one thing with two pictures: add the shape of the first to the second.",
            source=OWN_PICTURE,
        )
    )
    lance = graph.add("LoadLance")
    first = graph.add("LanceExample", title="First picture", seed=ONE_SHAPE)
    second = graph.add("LanceExample", title="Second picture", seed=PICTURE)
    semantic = [graph.add("EncodeSemantic", model=lance[0], media=picture[0]) for picture in (first, second)]
    latent = [graph.add("EncodeLatent", vae=lance[1], media=picture[0]) for picture in (first, second)]
    edited = graph.add(
        "LanceEdit",
        model=lance[0],
        semantic=semantic[0][0],
        latent=latent[0][0],
        semantic_2=semantic[1][0],
        latent_2=latent[1][0],
        instruction="Add the square of the first picture at the top left of the second picture.",
    )
    save_image(graph, lance, edited)
    return graph


def ask_image() -> Graph:
    graph = Graph(
        note(
            "Ask about an image",
            "Write a *question* and press **Run**; the answer appears in *Preview as Text*. "
            "With *sampling* off the answer is always the same.",
            source=OWN_PICTURE,
        )
    )
    lance = graph.add("LoadLance")
    picture = graph.add("LanceExample", seed=PICTURE)
    semantic = graph.add("EncodeSemantic", model=lance[0], media=picture[0])
    question = "What colour is the circle?"
    answer = graph.add("LanceUnderstand", model=lance[0], question=question, semantic=semantic[0])
    graph.add("PreviewAny", source=answer[0])
    return graph


def ask_video() -> Graph:
    graph = Graph(
        note(
            "Ask about a video",
            "Write a *question* and press **Run**; the answer appears in *Preview as Text*. "
            "The clip is read at 12 frames a second, six seconds of it at most.",
            model="Lance_3B_Video",
            source=OWN_CLIP,
        )
    )
    lance = graph.add("LoadLance")
    clip = graph.add("LanceExample", seed=CLIP, frames=CLIP_FRAMES)
    semantic = graph.add("EncodeSemantic", model=lance[0], media=clip[1])
    answer = graph.add(
        "LanceUnderstand", model=lance[0], question="Which way does the red circle move?", semantic=semantic[0]
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
            source=OWN_PICTURE,
        )
    )
    lance = graph.add("LoadLance")
    picture = graph.add("LanceExample", seed=PICTURE)
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
    graph.add("PreviewAny", stage="Decide", source=instruction[0])
    edited = graph.add("LanceEdit", model=lance[0], semantic=semantic[0], latent=latent[0], instruction=instruction[0])
    save_image(graph, lance, edited)
    return graph


def ksampler() -> Graph:
    graph = Graph(
        note(
            "KSampler",
            "Lance as any other model of ComfyUI: *Lance Conditioning* reads the words, *KSampler* paints, "
            "*VAE Decode* shows. Samplers, schedulers, LoRAs and latent nodes of other packs fit in between.",
            "Euler, *simple*, 30 steps and a cfg of 4 are the official settings. An empty *negative_prompt* is what "
            f"the model was trained with. {SEED}",
            source="set *Empty Latent Image* to 768 x 768 ",
        )
    )
    lance = graph.add("LoadLance")
    prompt = "A big yellow star in the center and a small purple circle at the bottom right, on a gray background."
    words = graph.add("LanceConditioning", model=lance[0], prompt=prompt)
    empty = graph.add("EmptyLatentImage", width=SIDE, height=SIDE)
    painted = graph.add(
        "KSampler", model=lance[0], positive=words[0], negative=words[1], latent_image=empty[0], **OFFICIAL
    )
    decoded = graph.add("VAEDecode", samples=painted[0], vae=lance[1])
    graph.add("SaveImage", images=decoded[0])
    return graph


def inpaint() -> Graph:
    graph = Graph(
        note(
            "Paint a part of an image anew",
            "Only the white part of the mask changes. *prompt* describes the whole picture as it shall be, "
            "not only the part.",
            "To draw a mask by hand, open the menu of *Load Image*, choose **Open in MaskEditor**, and link its MASK "
            "to *Set Latent Noise Mask* in the place of the rectangle.",
            source=OWN_PICTURE,
        )
    )
    lance = graph.add("LoadLance")
    picture = graph.add("LanceExample", seed=PICTURE)
    latent = graph.add("EncodeLatent", vae=lance[1], media=picture[0])
    where = "Decide where"
    keep = graph.add("SolidMask", stage=where, title="Keep everything", value=0.0, width=SIDE, height=SIDE)
    change = graph.add("SolidMask", stage=where, title="Change this much", value=1.0, width=16, height=16)
    mask = graph.add(
        "MaskComposite",
        stage=where,
        title="Change it here",
        destination=keep[0],
        source=change[0],
        x=16,
        y=16,
        operation="add",
    )
    graph.add("MaskPreview", stage=where, mask=mask[0])
    words = graph.add(
        "LanceConditioning",
        stage="Decide what",
        model=lance[0],
        prompt="A small green star in the center and a big blue square at the bottom left, on a white background.",
    )
    masked = graph.add("SetLatentNoiseMask", stage="Decide what", samples=latent[0], mask=mask[0])
    painted = graph.add(
        "KSampler", model=lance[0], positive=words[0], negative=words[1], latent_image=masked[0], **OFFICIAL
    )
    save_image(graph, lance, painted)
    return graph


def describe_and_regenerate() -> Graph:
    graph = Graph(
        note(
            "Generate, describe, generate again",
            "One model paints a picture, looks at what it painted, describes it in words, and paints again from its "
            "own words. What the second picture has kept is what the words could hold.",
            f"Put *Load Image* in the place of the first picture to have one of your own retold. {SEED}",
            source="empty *system* ",
        )
    )
    lance = graph.add("LoadLance")
    prompt = "A big purple star on the left and a small yellow circle at the top right, on a black background."
    first = graph.add("LanceGenerate", stage="Paint first", model=lance[0], prompt=prompt)
    picture = graph.add("DecodeVideo", stage="Paint first", vae=lance[1], latent=first[0])
    semantic = graph.add("EncodeSemantic", model=lance[0], media=picture[0])
    graph.add("PreviewImage", stage="Look", images=picture[0])
    words = graph.add(
        "LanceUnderstand",
        model=lance[0],
        question=DESCRIBE,
        system=describe_prompt("image"),
        semantic=semantic[0],
    )
    graph.add("PreviewAny", stage="Decide", source=words[0])
    again = graph.add("LanceGenerate", stage="Paint again", model=lance[0], prompt=words[0])
    save_image(graph, lance, again)
    return graph


def image_to_video_from_generated() -> Graph:
    graph = Graph(
        note(
            "Paint a picture, then set it in motion",
            "The first prompt paints a picture, the second says what happens next. *Encode Latent* turns the picture "
            "into the first frame, and the clip has its size.",
            f"To try several beginnings, change the first *seed*; to try several motions, the second. {SEED}",
            model="Lance_3B_Video",
            source="choose *video_480p* in *Encode Latent* and as *size* of the first picture, ",
        )
    )
    lance = graph.add("LoadLance")
    still = graph.add(
        "LanceGenerate",
        stage="Paint a picture",
        model=lance[0],
        prompt="A big yellow square on the right, on a white background.",
    )
    picture = graph.add(
        "DecodeVideo", stage="Paint a picture", title="Decode the picture", vae=lance[1], latent=still[0]
    )
    first_frame = graph.add("EncodeLatent", vae=lance[1], media=picture[0])
    graph.add("PreviewImage", stage="Look", images=picture[0])
    clip = graph.add(
        "LanceGenerate",
        stage="Paint a clip",
        model=lance[0],
        prompt="A big yellow square moves left, starting on the right, on a white background.",
        frames=CLIP_FRAMES,
        first_frame=first_frame[0],
    )
    save_video(graph, lance, clip)
    return graph


def batch_of_four() -> Graph:
    graph = Graph(
        note(
            "Four at once",
            "*batch_size* (among the advanced inputs) paints four pictures of the same words with different noise, "
            "to choose from. Click one of the four to see it larger.",
            f"Four need four times the time, and some more memory. {SEED}",
        )
    )
    lance = graph.add("LoadLance")
    prompt = "A big green circle in the center and a small red star at the top left, on a white background."
    four = graph.add("LanceGenerate", model=lance[0], prompt=prompt, batch_size=4)
    decoded = graph.add("DecodeVideo", vae=lance[1], latent=four[0])
    graph.add("PreviewImage", images=decoded[0])
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
    ksampler,
    inpaint,
    describe_and_regenerate,
    image_to_video_from_generated,
    batch_of_four,
)


@dataclass(frozen=True)
class Offer:
    """A blueprint: the graph it wraps, its place in the node library, and the widgets that it shows."""

    graph: Callable[[], Graph]
    name: str
    category: str
    description: str
    widgets: tuple[tuple[str, str], ...]


def painted_by(node: str, *widgets: str) -> tuple[tuple[str, str], ...]:
    return (*((node, widget) for widget in (*widgets, "seed", "steps")), ("LoadLance", "checkpoint"))


ASKED = (("LanceUnderstand", "question"), ("LanceUnderstand", "max_new_tokens"), ("LoadLance", "checkpoint"))
IMAGE_TOOLS, VIDEO_TOOLS = "Image generation and editing", "Video generation and editing"
BLUEPRINTS = (
    Offer(
        text_to_image,
        "Text to Image (Lance)",
        f"{IMAGE_TOOLS}/Text to image",
        "Paints a picture from words.",
        painted_by("LanceGenerate", "prompt", "size"),
    ),
    Offer(
        text_to_video,
        "Text to Video (Lance)",
        f"{VIDEO_TOOLS}/Text to video",
        "Paints a clip from words.",
        painted_by("LanceGenerate", "prompt", "size", "frames"),
    ),
    Offer(
        image_to_video,
        "Image to Video (Lance)",
        f"{VIDEO_TOOLS}/Image to video",
        "Paints a clip that begins with a picture.",
        painted_by("LanceGenerate", "prompt", "frames"),
    ),
    Offer(
        image_edit,
        "Image Edit (Lance)",
        f"{IMAGE_TOOLS}/Edit image",
        "Changes a picture by an instruction.",
        painted_by("LanceEdit", "instruction"),
    ),
    Offer(
        video_edit,
        "Video Edit (Lance)",
        f"{VIDEO_TOOLS}/Video Edit",
        "Changes a clip by an instruction.",
        painted_by("LanceEdit", "instruction"),
    ),
    Offer(
        ask_image,
        "Ask about an Image (Lance)",
        "Text Tools",
        "Answers a question about a picture.",
        ASKED,
    ),
    Offer(
        ask_video,
        "Ask about a Video (Lance)",
        "Text Tools",
        "Answers a question about a clip.",
        ASKED,
    ),
)


def documents() -> dict[Path, dict[str, Any]]:
    """Every workflow file, in both forms: its path below `workflows/` and its content."""
    made = {graph.__name__: graph() for graph in GRAPHS}
    editor = {Path(f"{name}.json"): graph.editor() for name, graph in made.items()}
    return editor | {Path("api", f"{name}.json"): graph.api() for name, graph in made.items()}


def blueprints() -> dict[Path, dict[str, Any]]:
    """Every blueprint file: its path below `subgraphs/` and its content."""
    return {
        Path(f"{offer.name}.json"): blueprint(
            offer.graph(), offer.name, offer.category, offer.description, offer.widgets
        )
        for offer in BLUEPRINTS
    }


def main() -> None:
    for folder, files in ((WORKFLOWS, documents()), (SUBGRAPHS, blueprints())):
        for path, document in files.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
