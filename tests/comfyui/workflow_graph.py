"""A graph of ComfyUI nodes, and its two JSON forms: the editor's (LiteGraph 0.4) and the server's (API).

The editor's form stores widget values by position and repeats every socket, so it is never written by hand:
`SPECS` says once what each node has, in the order of its schema, and both forms follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

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


class Output(NamedTuple):
    """An output of a node in a graph: what an input can be linked to."""

    node: Node
    slot: int


@dataclass(frozen=True)
class Spec:
    """A node type: its column in the drawing, inputs in schema order, output types and names, and drawn size."""

    column: str
    inputs: Mapping[str, Socket | Widget]
    outputs: Mapping[str, str]
    size: tuple[int, int]
    pack: str = "comfy-core"

    def ordered(self) -> list[tuple[str, Socket | Widget]]:
        """The inputs as the editor lists them: sockets before widgets."""
        return sorted(self.inputs.items(), key=lambda item: isinstance(item[1], Widget))


@dataclass(eq=False)
class Node:
    id: int
    type: str
    values: dict[str, Any]
    title: str | None = None
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Spec:
        return SPECS[self.type]

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)

    def value(self, name: str) -> Any:
        """What the input is set or linked to: a widget's default, and None for a free socket, unless given."""
        return self.values.get(name, getattr(self.spec.inputs[name], "default", None))


SAMPLING = {
    "seed": Widget("INT", 42, suffix=(CONTROL,)),
    "steps": Widget("INT", 30),
    "guidance": Widget("FLOAT", 4.0),
    "shift": Widget("FLOAT", 3.5),
    "guidance_start": Widget("FLOAT", 0.4),
    "guidance_end": Widget("FLOAT", 1.0),
    "renorm": Widget("COMBO", "global"),
    "renorm_min": Widget("FLOAT", 0.0),
}
MEDIA_TYPES = "IMAGE,VIDEO"

SPECS = {
    "LoadLance": Spec(
        "Load",
        {"checkpoint": Widget("COMBO", "Lance_3B"), "weight_dtype": Widget("COMBO", "default")},
        {"MODEL": "MODEL", "VAE": "VAE"},
        (320, 110),
        "lance",
    ),
    "EncodeSemantic": Spec(
        "Encode",
        {"model": Socket("MODEL"), "media": Socket(MEDIA_TYPES), "resolution": Widget("COMBO", "auto")},
        {"semantic": "LANCE_SEMANTIC"},
        (300, 110),
        "lance",
    ),
    "EncodeLatent": Spec(
        "Encode",
        {"vae": Socket("VAE"), "media": Socket(MEDIA_TYPES), "resolution": Widget("COMBO", "auto")},
        {"LATENT": "LATENT"},
        (300, 110),
        "lance",
    ),
    "LanceUnderstand": Spec(
        "Understand",
        {
            "model": Socket("MODEL"),
            "question": Widget("STRING", ""),
            "max_new_tokens": Widget("INT", 256),
            "sampling": Widget("COMFY_DYNAMICCOMBO_V3", "off"),
            "semantic": Socket("LANCE_SEMANTIC", optional=True),
            "semantic_2": Socket("LANCE_SEMANTIC", optional=True),
            "system": Widget("STRING", "", optional=True),
        },
        {"answer": "STRING"},
        (380, 320),
        "lance",
    ),
    "LanceGenerate": Spec(
        "Generate",
        {
            "model": Socket("MODEL"),
            "prompt": Widget("STRING", ""),
            "width": Widget("INT", 768),
            "height": Widget("INT", 768),
            "frames": Widget("INT", 1),
            **SAMPLING,
            "first_frame": Socket("LATENT", optional=True),
        },
        {"LATENT": "LATENT"},
        (400, 480),
        "lance",
    ),
    "LanceEdit": Spec(
        "Edit",
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
        "lance",
    ),
    "DecodeVideo": Spec(
        "Save",
        {"vae": Socket("VAE"), "latent": Socket("LATENT"), "fps": Widget("FLOAT", 12.0)},
        {"IMAGE": "IMAGE", "VIDEO": "VIDEO"},
        (300, 110),
        "lance",
    ),
    "LoadImage": Spec(
        "Load",
        {"image": Widget("COMBO", "example.png", suffix=("image",))},
        {"IMAGE": "IMAGE", "MASK": "MASK"},
        (320, 340),
    ),
    "LoadVideo": Spec(
        "Load", {"file": Widget("COMBO", "lance_example.mp4", suffix=("image",))}, {"VIDEO": "VIDEO"}, (320, 340)
    ),
    "StringConcatenate": Spec(
        "Text",
        {
            "string_a": Widget("STRING", ""),
            "string_b": Widget("STRING", ""),
            "delimiter": Widget("STRING", ""),
        },
        {"STRING": "STRING"},
        (340, 200),
    ),
    "PreviewAny": Spec("Text", {"source": Socket("*")}, {"STRING": "STRING"}, (340, 240)),
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
            "format": Widget("COMFY_DYNAMICCOMBO_V3", "auto"),
            "format.codec": Widget("COMFY_DYNAMICCOMBO_V3", "auto"),
            "codec": Widget("COMFY_DYNAMICCOMBO_V3", "auto", optional=True),
        },
        {"video": "VIDEO"},
        (400, 420),
    ),
}  # fmt: skip

COLUMNS = ("Load", "Encode", "Understand", "Text", "Generate", "Edit", "Save")
GAP, TITLE_BAR, COLOUR = 60, 40, "#3f789e"


class Graph:
    """Nodes in the order they were added, and the note that explains them to a newcomer."""

    def __init__(self, note: str):
        self.note = note
        self.nodes: list[Node] = []

    def add(
        self, type: str, *, title: str | None = None, properties: dict[str, Any] | None = None, **values: Any
    ) -> Node:
        """Add a node. `values` sets widgets, or links inputs to an `Output`; names must be the spec's."""
        if unknown := values.keys() - SPECS[type].inputs.keys():
            raise ValueError(f"{type} has no input {sorted(unknown)}")
        node = Node(len(self.nodes) + 1, type, values, title, properties or {})
        self.nodes.append(node)
        return node

    def api(self) -> dict[str, Any]:
        """The graph as the server takes it: `{id: {class_type, inputs, _meta}}`."""
        return {str(node.id): _api_node(node) for node in self.nodes}

    def editor(self) -> dict[str, Any]:
        """The graph as the editor saves it."""
        links = [
            (source, (node, index, _type_of(source)))
            for node in self.nodes
            for index, (name, _) in enumerate(node.spec.ordered())
            if isinstance(source := node.value(name), Output)
        ]
        rows = [
            [number, source.node.id, source.slot, target.id, index, type_]
            for number, (source, (target, index, type_)) in enumerate(links, start=1)
        ]
        places, groups = _layout(self.nodes)
        drawn = [_editor_node(node, order, places[node.id], rows) for order, node in enumerate(self.nodes)]
        note_id = len(self.nodes) + 1
        return {
            "revision": 0,
            "last_node_id": note_id,
            "last_link_id": len(rows),
            "nodes": [*drawn, _note(note_id, self.note)],
            "links": rows,
            "groups": groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def _type_of(output: Output) -> str:
    return list(output.node.spec.outputs.values())[output.slot]


def _api_node(node: Node) -> dict[str, Any]:
    values = {name: node.value(name) for name in node.spec.inputs}
    inputs = {
        name: [str(value.node.id), value.slot] if isinstance(value, Output) else value
        for name, value in values.items()
        if value is not None
    }
    return {"class_type": node.type, "inputs": inputs, "_meta": {"title": node.title or node.type}}


def _editor_node(node: Node, order: int, place: tuple[int, int], rows: list[list[Any]]) -> dict[str, Any]:
    links_in = {row[4]: row[0] for row in rows if row[3] == node.id}
    inputs = [
        {"name": name, "type": entry.type}
        | ({"shape": 7} if entry.optional else {})
        | ({"widget": {"name": name}} if isinstance(entry, Widget) else {})
        | {"link": links_in.get(index)}
        for index, (name, entry) in enumerate(node.spec.ordered())
    ]
    outputs = [
        {"name": name, "type": type_, "links": [row[0] for row in rows if row[1:3] == [node.id, slot]] or None}
        for slot, (name, type_) in enumerate(node.spec.outputs.items())
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
        "properties": {"cnr_id": node.spec.pack, "Node name for S&R": node.type, **node.properties},
        "widgets_values": [value for name, entry in node.spec.inputs.items() for value in _stored(node, name, entry)],
    }


def _stored(node: Node, name: str, entry: Socket | Widget) -> list[Any]:
    """What `widgets_values` holds for an input. A linked widget keeps the value it had before."""
    if isinstance(entry, Socket):
        return []
    value = node.value(name)
    return [entry.default if isinstance(value, Output) else value, *entry.suffix]


def _layout(nodes: list[Node]) -> tuple[dict[int, tuple[int, int]], list[dict[str, Any]]]:
    """Corners of the nodes, in one column per stage of the work, and a titled box around each column."""
    places, groups, x = {}, [], 0
    ranked = sorted(nodes, key=lambda node: COLUMNS.index(node.spec.column))
    for column, members in groupby(ranked, key=lambda node: node.spec.column):
        y, width = 0, 0
        for node in members:
            places[node.id] = (x, y)
            y += node.spec.size[1] + GAP
            width = max(width, node.spec.size[0])
        box = [x - 20, -2 * TITLE_BAR, width + 40, y - GAP + 2 * TITLE_BAR + 20]
        group = {"id": len(groups) + 1, "title": column, "bounding": box, "color": COLOUR, "font_size": 24, "flags": {}}
        groups.append(group)
        x += width + 2 * GAP
    return places, groups


def _note(id: int, text: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": [-480, -40],
        "size": [420, 440],
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
