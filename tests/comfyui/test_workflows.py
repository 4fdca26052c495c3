"""The committed workflows are what `build_workflows` writes, in both forms."""

from __future__ import annotations

import json

import pytest

from .build_workflows import GRAPHS, WORKFLOWS, documents

DOCUMENTS = documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_the_committed_file_is_what_its_source_says(path):
    assert json.loads((WORKFLOWS / path).read_text(encoding="utf-8")) == DOCUMENTS[path]


def test_there_is_no_other_workflow():
    committed = {path.relative_to(WORKFLOWS) for path in WORKFLOWS.rglob("*.json")}
    assert committed == set(DOCUMENTS)


@pytest.mark.parametrize("name", [graph.__name__ for graph in GRAPHS])
def test_it_has_a_thumbnail_and_media_that_the_pack_ships(name):
    graph = DOCUMENTS[next(path for path in DOCUMENTS if path.parts == ("api", f"{name}.json"))]
    files = [node["inputs"].get("image") or node["inputs"].get("file") for node in graph.values()
             if node["class_type"] in ("LoadImage", "LoadVideo")]  # fmt: skip
    assert (WORKFLOWS / f"{name}.jpg").is_file()
    assert all((WORKFLOWS / "media" / file).is_file() for file in files)


@pytest.mark.parametrize("name", [graph.__name__ for graph in GRAPHS])
def test_links_of_the_editor_s_form_agree_with_its_nodes(name):
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, slot, target, index, type_ in graph["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][index]["link"] == number
        assert nodes[source]["outputs"][slot]["type"] == type_
        accepted = nodes[target]["inputs"][index]["type"]
        assert accepted == "*" or type_ in accepted.split(",")


@pytest.mark.parametrize("name", [graph.__name__ for graph in GRAPHS])
def test_no_two_nodes_overlap(name):
    nodes = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for left2, top2, right2, bottom2 in boxes[i + 1 :]:
            assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
