"""The workflows and blueprints are what `build_workflows` writes, and what the server and the editor take them for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from lance_core.layout import BUILT_IN_CHOICE as NANO

from .blueprint import SINKS, SOURCES
from .build_workflows import BLUEPRINTS, GRAPHS, SUBGRAPHS, WORKFLOWS, Offer, blueprints, documents
from .server import PACK, ComfyServer, Prompt
from .test_browser import FLAGS, READY, find_browser

DOCUMENTS = documents()
BLUEPRINT_FILES = blueprints()


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_the_committed_file_is_what_its_source_says(path):
    assert json.loads((WORKFLOWS / path).read_text(encoding="utf-8")) == DOCUMENTS[path]


@pytest.mark.parametrize("path", BLUEPRINT_FILES, ids=str)
def test_the_committed_blueprint_is_what_its_source_says(path):
    assert json.loads((SUBGRAPHS / path).read_text(encoding="utf-8")) == BLUEPRINT_FILES[path]


def test_there_is_no_other_workflow():
    committed = {path.relative_to(WORKFLOWS) for path in WORKFLOWS.rglob("*.json")}
    assert committed == set(DOCUMENTS)
    assert {path.relative_to(SUBGRAPHS) for path in SUBGRAPHS.rglob("*.json")} == set(BLUEPRINT_FILES)


@pytest.mark.parametrize("name", [graph.__name__ for graph in GRAPHS])
def test_it_has_a_thumbnail_and_needs_no_file(name):
    """Neither pictures nor a downloaded model: it runs as soon as the pack is installed."""
    graph = DOCUMENTS[Path("api", f"{name}.json")]
    assert (WORKFLOWS / f"{name}.jpg").is_file()
    assert not {"LoadImage", "LoadVideo"} & {node["class_type"] for node in graph.values()}
    assert {node["inputs"]["checkpoint"] for node in graph.values() if "checkpoint" in node["inputs"]} == {NANO}


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


@pytest.mark.parametrize("name", [graph.__name__ for graph in GRAPHS])
def test_its_stages_are_boxed(name):
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    boxes = [group["bounding"] for group in graph["groups"]]
    for node in graph["nodes"]:
        (x, y), (w, h) = node["pos"], node["size"]
        inside = [bx <= x and by <= y and x + w <= bx + bw and y + h <= by + bh for bx, by, bw, bh in boxes]
        assert sum(inside) == (node["type"] != "MarkdownNote")


# --- the blueprints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[Page]:
    if (browser_path := find_browser()) is None:
        pytest.skip("no browser on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.goto(server.url)
        page.wait_for_function(READY, timeout=90_000)
        page.wait_for_function("app.extensionManager.workflow.activeWorkflow")  # after it, nothing else is loaded
        yield page
        browser.close()


def test_the_server_offers_one_blueprint_per_task(server):
    entries = server.get("/global_subgraphs").values()
    ours = {entry["name"] for entry in entries if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert ours == {offer.name for offer in BLUEPRINTS}


def insert(page: Page, offer: Offer) -> None:
    """Puts the blueprint into a new workflow, as people do: by searching for its name."""
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("app.graph.nodes.length === 0")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.locator("input:focus").fill(offer.name)
    page.get_by_text(offer.description).last.wait_for()
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.length === 1")
    page.evaluate("app.canvas.finalizeGhostPlacement(false)")  # it hangs at the pointer until then


def sent(page: Page) -> Prompt:
    return page.evaluate("async () => (await app.graphToPrompt()).output")


def inner(prompt: Prompt) -> dict[str, tuple]:
    """The nodes that a blueprint holds, without the ids of the node around them and links from outside."""
    nodes = {
        node_id.rpartition(":")[2]: node
        for node_id, node in prompt.items()
        if node["class_type"] not in (*SOURCES, *SINKS)
    }
    return {
        node_id: (
            node["class_type"],
            {
                name: [value[0].rpartition(":")[2], value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
                if not isinstance(value, list) or value[0].rpartition(":")[2] in nodes
            },
        )
        for node_id, node in nodes.items()
    }


@pytest.mark.parametrize("offer", BLUEPRINTS, ids=lambda offer: offer.name)
def test_the_editor_inserts_a_blueprint_that_does_what_the_workflow_does(page, offer):
    insert(page, offer)
    assert inner(sent(page)) == inner(offer.graph().api())
    shown = page.evaluate("app.graph.nodes[0].widgets.map(widget => widget.name)")
    assert shown == [widget.rpartition(".")[2] for _, widget in offer.widgets]
    assert "proxyWidgetErrorQuarantine" not in page.evaluate("app.graph.nodes[0].serialize().properties")


CONNECT = """([source, sink, values]) => {
    const [node] = app.graph.nodes;
    for (const [name, value] of Object.entries(values))
        node.widgets.find(widget => widget.name === name).value = value;
    const add = type => { const made = LiteGraph.createNode(type); app.graph.add(made); return made; };
    if (source) add(source).connect(0, node, 0);
    node.connect(0, add(sink), 0);
}"""


@pytest.mark.parametrize(
    ("name", "source", "sink", "values"),
    [
        ("Text to Image (Lance)", None, "SaveImage", {"steps": 1}),
        ("Image Edit (Lance)", "LanceExample", "SaveImage", {"steps": 1}),
        ("Ask about an Image (Lance)", "LanceExample", "PreviewAny", {"max_new_tokens": 4}),
    ],
)
def test_a_blueprint_runs_in_the_editor(page, server, name, source, sink, values):
    (offer,) = [offer for offer in BLUEPRINTS if offer.name == name]
    insert(page, offer)
    page.evaluate(CONNECT, [source, sink, values])
    before = set(server.get("/history"))
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(
        "sink => app.nodeOutputs?.[app.graph.nodes.find(node => node.type === sink).id]", arg=sink, timeout=120_000
    )
    ((entry),) = [entry for id_, entry in server.get("/history").items() if id_ not in before]
    assert entry["status"]["status_str"] == "success"
    (prompt,) = [entry["prompt"][2]]
    for key, value in values.items():
        assert value in [node["inputs"].get(key) for node in prompt.values()]
