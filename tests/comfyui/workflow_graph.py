"""A graph of ComfyUI nodes, and its two JSON forms: the editor's (LiteGraph 0.4) and the server's (API).

The editor's form stores widget values by position and repeats every socket, so it is never written by hand:
`SPECS` says once what each node has, in the order of its schema, and both forms follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from lance_core.layout import BUILT_IN_CHOICE

PACK = "lance-core"  # the project's name, by which the registry knows the pack
CONTROL = "fixed"  # what the editor does with a seed after a run
RESOLUTIONS = (
    "auto", "image_256res", "image_512res", "image_768res", "video_192p", "video_360p", "video_480p", "native",
)  # fmt: skip


class Socket(NamedTuple):
    type: str
    optional: bool = False


class Widget(NamedTuple):
    type: str
    default: Any
    optional: bool = False
    suffix: tuple[Any, ...] = ()  # what the editor stores after the value: a seed's control, an upload button
    choices: Mapping[str, Mapping[str, Widget]] = MappingProxyType({})  # option -> the widgets that it brings


class Output(NamedTuple):
    """An output of a node in a graph: what an input can be linked to."""

    node: Node
    slot: int


@dataclass(frozen=True)
class Spec:
    """A node type: the stage of the work it belongs to, inputs in schema order, output types, and drawn size."""

    stage: str
    inputs: Mapping[str, Socket | Widget]
    outputs: Mapping[str, str]
    size: tuple[int, int]
    pack: str = "comfy-core"


@dataclass(eq=False)
class Node:
    id: int
    type: str
    values: dict[str, Any]
    stage: str
    title: str | None = None

    @property
    def spec(self) -> Spec:
        return SPECS[self.type]

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)

    @property
    def inputs(self) -> dict[str, Socket | Widget]:
        """The inputs in schema order, each chosen option's own behind its combo as `<combo>.<name>`."""
        found = {}
        for name, entry in self.spec.inputs.items():
            found[name] = entry
            if isinstance(entry, Widget) and entry.choices:
                chosen = entry.choices[self.values.get(name, entry.default)]
                found |= {f"{name}.{part}": widget for part, widget in chosen.items()}
        return found

    def ordered(self) -> list[tuple[str, Socket | Widget]]:
        """The inputs as the editor lists them: sockets before widgets."""
        return sorted(self.inputs.items(), key=lambda item: isinstance(item[1], Widget))

    def value(self, name: str) -> Any:
        """What the input is set or linked to: a widget's default, and None for a free socket, unless given."""
        return self.values.get(name, getattr(self.inputs[name], "default", None))


SAMPLING = {
    "seed": Widget("INT", 42, suffix=(CONTROL,)),
    "steps": Widget("INT", 30),
    "guidance": Widget("FLOAT", 4.0),
    "batch_size": Widget("INT", 1),
    "shift": Widget("FLOAT", 3.5),
}
MEDIA_TYPES = "IMAGE,VIDEO"
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
PICTURE_RATIO, CLIP_RATIO = ({"aspect_ratio": Widget("COMBO", ratio)} for ratio in ("1:1", "16:9"))
SIZES = {
    "auto": {},
    "image_768res": PICTURE_RATIO,
    "image_512res": PICTURE_RATIO,
    "video_480p": CLIP_RATIO,
    "video_360p": CLIP_RATIO,
    "megapixels": {"aspect_ratio": Widget("COMBO", "1:1"), "megapixels": Widget("FLOAT", 0.6)},
    "custom": {"width": Widget("INT", 768), "height": Widget("INT", 768)},
}
CHANCE = {
    "temperature": Widget("FLOAT", 0.7),
    "top_p": Widget("FLOAT", 0.9),
    "top_k": Widget("INT", 0),
    "seed": Widget("INT", 0, suffix=(CONTROL,)),
}

SPECS = {
    "LoadLance": Spec(
        "Load",
        {"checkpoint": Widget("COMBO", BUILT_IN_CHOICE), "weight_dtype": Widget("COMBO", "default")},
        {"MODEL": "MODEL", "VAE": "VAE"},
        (320, 180),
        PACK,
    ),
    "LanceExample": Spec(
        "Load",
        {"seed": Widget("INT", 0, suffix=(CONTROL,)), "frames": Widget("INT", 1)},
        {"IMAGE": "IMAGE", "VIDEO": "VIDEO", "caption": "STRING"},
        (320, 150),
        PACK,
    ),
    "EncodeSemantic": Spec(
        "Look",
        {"model": Socket("MODEL"), "media": Socket(MEDIA_TYPES), "resolution": Widget("COMBO", "auto")},
        {"semantic": "LANCE_SEMANTIC"},
        (300, 110),
        PACK,
    ),
    "EncodeLatent": Spec(
        "Look",
        {"vae": Socket("VAE"), "media": Socket(MEDIA_TYPES), "resolution": Widget("COMBO", "auto")},
        {"LATENT": "LATENT"},
        (300, 110),
        PACK,
    ),
    "LanceUnderstand": Spec(
        "Decide",
        {
            "model": Socket("MODEL"),
            "question": Widget("STRING", ""),
            "max_new_tokens": Widget("INT", 256),
            "sampling": Widget(DYNAMIC, "off", choices={"off": {}, "on": CHANCE}),
            "semantic": Socket("LANCE_SEMANTIC", optional=True),
            "semantic_2": Socket("LANCE_SEMANTIC", optional=True),
            "system": Widget("STRING", "", optional=True),
        },
        {"answer": "STRING"},
        (380, 260),
        PACK,
    ),
    "LanceGenerate": Spec(
        "Paint",
        {
            "model": Socket("MODEL"),
            "prompt": Widget("STRING", ""),
            "size": Widget(DYNAMIC, "auto", choices=SIZES),
            "frames": Widget("INT", 1),
            **SAMPLING,
            "first_frame": Socket("LATENT", optional=True),
        },
        {"LATENT": "LATENT"},
        (400, 360),
        PACK,
    ),
    "LanceEdit": Spec(
        "Paint",
        {
            "model": Socket("MODEL"),
            "semantic": Socket("LANCE_SEMANTIC"),
            "latent": Socket("LATENT"),
            "instruction": Widget("STRING", ""),
            "task": Widget("COMBO", "edit"),
            **SAMPLING,
            "semantic_2": Socket("LANCE_SEMANTIC", optional=True),
            "latent_2": Socket("LATENT", optional=True),
        },
        {"LATENT": "LATENT"},
        (400, 480),
        PACK,
    ),
    "LanceConditioning": Spec(
        "Decide",
        {
            "model": Socket("MODEL"),
            "prompt": Widget("STRING", ""),
            "negative_prompt": Widget("STRING", ""),
            "task": Widget("COMBO", "edit"),
            "semantic": Socket("LANCE_SEMANTIC", optional=True),
            "latent": Socket("LATENT", optional=True),
            "semantic_2": Socket("LANCE_SEMANTIC", optional=True),
            "latent_2": Socket("LATENT", optional=True),
        },
        {"positive": "CONDITIONING", "negative": "CONDITIONING"},
        (400, 360),
        PACK,
    ),
    "DecodeVideo": Spec(
        "Save",
        {
            "vae": Socket("VAE"),
            "latent": Socket("LATENT"),
            "fps": Widget("FLOAT", 12.0),
            "source": Socket("VIDEO", optional=True),
        },
        {"IMAGE": "IMAGE", "VIDEO": "VIDEO"},
        (300, 130),
        PACK,
    ),
    "SolidMask": Spec(
        "Decide",
        {"value": Widget("FLOAT", 1.0), "width": Widget("INT", 512), "height": Widget("INT", 512)},
        {"MASK": "MASK"},
        (300, 130),
    ),
    "MaskComposite": Spec(
        "Decide",
        {
            "destination": Socket("MASK"),
            "source": Socket("MASK"),
            "x": Widget("INT", 0),
            "y": Widget("INT", 0),
            "operation": Widget("COMBO", "multiply"),
        },
        {"MASK": "MASK"},
        (300, 150),
    ),
    "MaskPreview": Spec("Decide", {"mask": Socket("MASK")}, {"mask": "MASK"}, (300, 320)),
    "SetLatentNoiseMask": Spec(
        "Decide", {"samples": Socket("LATENT"), "mask": Socket("MASK")}, {"LATENT": "LATENT"}, (300, 70)
    ),
    "EmptyLatentImage": Spec(
        "Decide",
        {"width": Widget("INT", 512), "height": Widget("INT", 512), "batch_size": Widget("INT", 1)},
        {"LATENT": "LATENT"},
        (400, 130),
    ),
    "KSampler": Spec(
        "Paint",
        {
            "model": Socket("MODEL"),
            "seed": Widget("INT", 0, suffix=(CONTROL,)),
            "steps": Widget("INT", 20),
            "cfg": Widget("FLOAT", 8.0),
            "sampler_name": Widget("COMBO", "euler"),
            "scheduler": Widget("COMBO", "simple"),
            "positive": Socket("CONDITIONING"),
            "negative": Socket("CONDITIONING"),
            "latent_image": Socket("LATENT"),
            "denoise": Widget("FLOAT", 1.0),
        },
        {"LATENT": "LATENT"},
        (360, 480),
    ),
    "VAEDecode": Spec("Save", {"samples": Socket("LATENT"), "vae": Socket("VAE")}, {"IMAGE": "IMAGE"}, (300, 70)),
    "StringConcatenate": Spec(
        "Decide",
        {
            "string_a": Widget("STRING", ""),
            "string_b": Widget("STRING", ""),
            "delimiter": Widget("STRING", ""),
        },
        {"STRING": "STRING"},
        (380, 200),
    ),
    "PreviewAny": Spec("Save", {"source": Socket("*")}, {"STRING": "STRING"}, (380, 240)),
    "PreviewImage": Spec("Save", {"images": Socket("IMAGE")}, {"images": "IMAGE"}, (400, 420)),
    "SaveImage": Spec(
        "Save",
        {"images": Socket("IMAGE"), "filename_prefix": Widget("STRING", "lance/image")},
        {"images": "IMAGE"},
        (400, 420),
    ),
    "SaveVideo": Spec(
        "Save",
        {
            "video": Socket("VIDEO"),
            "filename_prefix": Widget("STRING", "lance/video"),
            "format": Widget(DYNAMIC, "auto", choices={"auto": {"codec": Widget(DYNAMIC, "auto")}}),
            "codec": Widget(DYNAMIC, "auto", optional=True),
        },
        {"video": "VIDEO"},
        (400, 420),
    ),
}  # fmt: skip

GAP, TITLE_BAR = 60, 40
COLOURS = {"Load": "#3f789e", "Look": "#8A8", "Decide": "#b58b2a", "Paint": "#a1309b", "Save": "#8AA"}


class Graph:
    """Nodes in the order they were added, and the note that explains them to a newcomer."""

    def __init__(self, note: str):
        self.note = note
        self.nodes: list[Node] = []

    def add(
        self,
        type: str,
        *,
        stage: str | None = None,
        title: str | None = None,
        **values: Any,
    ) -> Node:
        """Add a node. `values` sets widgets, or links inputs to an `Output`; names must be the spec's.

        stage: the box it is drawn in, where that is not its type's own; its first word is one of `COLOURS`.
        """
        node = Node(len(self.nodes) + 1, type, values, stage or SPECS[type].stage, title)
        if unknown := values.keys() - node.inputs.keys():
            raise ValueError(f"{type} has no input {sorted(unknown)}")
        self.nodes.append(node)
        return node

    def api(self) -> dict[str, Any]:
        """The graph as the server takes it: `{id: {class_type, inputs, _meta}}`."""
        return {str(node.id): _api_node(node) for node in self.nodes}

    def links(self) -> list[Link]:
        """Every link, in the order of the nodes they lead to."""
        wires = [
            (source, node, index)
            for node in self.nodes
            for index, (name, _) in enumerate(node.ordered())
            if isinstance(source := node.value(name), Output)
        ]
        return [Link(number, *wire) for number, wire in enumerate(wires, start=1)]

    def editor(self) -> dict[str, Any]:
        """The graph as the editor saves it."""
        links = self.links()
        places, groups = layout(self.nodes)
        drawn = [editor_node(node, order, places[node.id], links) for order, node in enumerate(self.nodes)]
        note_id = len(self.nodes) + 1
        return {
            "revision": 0,
            "last_node_id": note_id,
            "last_link_id": len(links),
            "nodes": [*drawn, _note(note_id, self.note)],
            "links": [
                [link.id, link.source.node.id, link.source.slot, link.target.id, link.index, link.type]
                for link in links
            ],
            "groups": groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }


class Link(NamedTuple):
    """A wire from an output to the input of that index, as the editor lists a node's inputs."""

    id: int
    source: Output
    target: Node
    index: int

    @property
    def type(self) -> str:
        return list(self.source.node.spec.outputs.values())[self.source.slot]


def _api_node(node: Node) -> dict[str, Any]:
    values = {name: node.value(name) for name in node.inputs}
    inputs = {
        name: [str(value.node.id), value.slot] if isinstance(value, Output) else value
        for name, value in values.items()
        if value is not None
    }
    return {"class_type": node.type, "inputs": inputs, "_meta": {"title": node.title or node.type}}


def editor_node(node: Node, order: int, place: tuple[int, int], links: list[Link]) -> dict[str, Any]:
    """The node as the editor saves it, with its corner at `place`."""
    links_in = {link.index: link.id for link in links if link.target is node}
    links_out = [[link.id for link in links if link.source == node[slot]] for slot in range(len(node.spec.outputs))]
    inputs = [
        {"name": name, "type": entry.type}
        | ({"shape": 7} if entry.optional else {})
        | ({"widget": {"name": name}} if isinstance(entry, Widget) else {})
        | {"link": links_in.get(index)}
        for index, (name, entry) in enumerate(node.ordered())
    ]
    outputs = [
        {"name": name, "type": type_, "links": ids or None}
        for (name, type_), ids in zip(node.spec.outputs.items(), links_out, strict=True)
    ]
    return {
        "id": node.id,
        "type": node.type,
        "pos": list(place),
        "size": list(node.spec.size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": {"cnr_id": node.spec.pack, "Node name for S&R": node.type},
        "widgets_values": [value for name, entry in node.inputs.items() for value in _stored(node, name, entry)],
    }


def _stored(node: Node, name: str, entry: Socket | Widget) -> list[Any]:
    """What `widgets_values` holds for an input. A linked widget keeps the value it had before."""
    if isinstance(entry, Socket):
        return []
    value = node.value(name)
    return [entry.default if isinstance(value, Output) else value, *entry.suffix]


def layout(nodes: list[Node]) -> tuple[dict[int, tuple[int, int]], list[dict[str, Any]]]:
    """Corners of the nodes, in one column per stage of the work, and a titled box around each column."""
    places, groups, x = {}, [], 0
    for number, stage in enumerate(dict.fromkeys(node.stage for node in nodes), start=1):
        y, width = 0, 0
        for node in (node for node in nodes if node.stage == stage):
            places[node.id] = (x, y)
            y += node.spec.size[1] + GAP
            width = max(width, node.spec.size[0])
        box = [x - 20, -2 * TITLE_BAR, width + 40, y - GAP + 2 * TITLE_BAR + 20]
        colour = COLOURS[stage.split()[0]]
        title = f"{number} · {stage}"
        groups.append({"id": number, "title": title, "bounding": box, "color": colour, "font_size": 24, "flags": {}})
        x += width + 2 * GAP
    return places, groups


def _note(id: int, text: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": [-480, -40],
        "size": [420, 400],
        "flags": {},
        "order": id - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About this workflow",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#000",
    }
