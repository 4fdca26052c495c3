"""The editor's subgraph form of a graph: one node with the graph inside, as `subgraphs/*.json` of a pack offers it.

What loads media and what saves or shows results stays outside: links to them become the node's inputs and outputs,
and the widgets that people need become widgets of the node.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from .workflow_graph import GAP, PACK, Graph, Link, Node, Output, editor_node, layout

SOURCES, SINKS = ("LanceExample",), ("SaveImage", "SaveVideo", "PreviewAny")
INPUTS, OUTPUTS = Node(-10, "inputs", {}, ""), Node(-20, "outputs", {}, "")  # the ids that the editor gives them
NAMESPACE = uuid.UUID("6f1c7f0e-52f3-4d3c-9a2b-6c1d3a0e7a11")
SIZE = (400, 400)
ROW = 20


@dataclass(frozen=True)
class Slot:
    """An input or output of the subgraph node, and the links that lead from or to it inside."""

    name: str
    type: str
    links: tuple[Link, ...]


def blueprint(
    graph: Graph, name: str, category: str, description: str, widgets: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """The file of a blueprint. widgets: (node type, input) of each widget that the node shows, in that order."""
    inner = [node for node in graph.nodes if node.type not in (*SOURCES, *SINKS)]
    only = {node.type: node for node in inner}
    shown = [(only[type_], widget) for type_, widget in widgets]
    inside = [link for link in graph.links() if link.source.node in inner and link.target in inner]
    wires = count(max(link.id for link in inside) + 1)
    media = dict.fromkeys(link.source for link in graph.links() if link.source.node.type in SOURCES)
    inputs, outputs = [], []
    for source in media:
        targets = [(link.target, link.index) for link in graph.links() if link.source == source]
        type_ = list(source.node.spec.outputs.values())[source.slot]
        inputs.append(_entry(wires, len(inputs), type_.lower(), type_, targets))
    for node, widget in shown:
        index = [input_ for input_, _ in node.ordered()].index(widget)
        inputs.append(_entry(wires, len(inputs), widget.rpartition(".")[2], node.inputs[widget].type, [(node, index)]))
    for link in graph.links():
        if link.target.type in SINKS:
            slot = list(link.source.node.spec.outputs)[link.source.slot]
            wire = Link(next(wires), link.source, OUTPUTS, len(outputs))
            outputs.append(Slot(slot, link.type, (wire,)))
    links = [*inside, *(link for slot in (*inputs, *outputs) for link in slot.links)]
    id_ = str(uuid.uuid5(NAMESPACE, name))
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_outer_node(id_, name, inputs, outputs, shown)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [_definition(id_, name, category, description, inner, inputs, outputs, links)]},
        "extra": {},
    }


def _entry(wires: Iterator[int], index: int, name: str, type_: str, targets: Iterable[tuple[Node, int]]) -> Slot:
    links = tuple(Link(next(wires), Output(INPUTS, index), node, place) for node, place in targets)
    return Slot(name, type_, links)


def _outer_node(
    id_: str, name: str, inputs: list[Slot], outputs: list[Slot], shown: list[tuple[Node, str]]
) -> dict[str, Any]:
    widgets = {slot.name for slot in inputs[len(inputs) - len(shown) :]}
    return {
        "id": 1,
        "type": id_,
        "pos": [0, 0],
        "size": list(SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": slot.name, "type": slot.type}
            | ({"widget": {"name": slot.name}} if slot.name in widgets else {})
            | {"link": None}
            for slot in inputs
        ],
        "outputs": [{"name": slot.name, "type": slot.type, "links": []} for slot in outputs],
        "properties": {
            "proxyWidgets": [[str(node.id), widget] for node, widget in shown],
            "cnr_id": PACK,
        },
        "widgets_values": [],
        "title": name,
    }


def _definition(
    id_: str,
    name: str,
    category: str,
    description: str,
    inner: list[Node],
    inputs: list[Slot],
    outputs: list[Slot],
    links: list[Link],
) -> dict[str, Any]:
    places, groups = layout(inner)
    right = max(places[node.id][0] + node.spec.size[0] for node in inner)
    left = -4 * GAP
    return {
        "id": id_,
        "version": 1,
        "state": {
            "lastGroupId": len(groups),
            "lastNodeId": max(node.id for node in inner),
            "lastLinkId": max(link.id for link in links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": INPUTS.id, "bounding": [left, 0, 2 * GAP, ROW * (len(inputs) + 2)]},
        "outputNode": {"id": OUTPUTS.id, "bounding": [right + 2 * GAP, 0, 2 * GAP, ROW * (len(outputs) + 2)]},
        "inputs": [_slot(id_, "input", slot, [left + 2 * GAP - ROW, ROW * i]) for i, slot in enumerate(inputs, 1)],
        "outputs": [_slot(id_, "output", slot, [right + 2 * GAP + ROW, ROW * i]) for i, slot in enumerate(outputs, 1)],
        "widgets": [],
        "nodes": [editor_node(node, order, places[node.id], links) for order, node in enumerate(inner)],
        "groups": groups,
        "links": [
            {
                "id": link.id,
                "origin_id": link.source.node.id,
                "origin_slot": link.source.slot,
                "target_id": link.target.id,
                "target_slot": link.index,
                "type": link.target.ordered()[link.index][1].type if link.source.node is INPUTS else link.type,
            }
            for link in links
        ],
        "extra": {},
        "category": category,
        "description": description,
    }


def _slot(id_: str, kind: str, slot: Slot, place: list[int]) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid5(uuid.UUID(id_), f"{kind} {slot.name}")),
        "name": slot.name,
        "type": slot.type,
        "linkIds": [link.id for link in slot.links],
        "pos": place,
    }
