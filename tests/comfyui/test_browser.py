"""The shipped workflows in the real editor, in a headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from .build_workflows import GRAPHS, WORKFLOWS
from .server import PACK, ComfyServer

NAMES = [graph.__name__ for graph in GRAPHS]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
READY = "window.app?.graph && Object.keys(window.LiteGraph.registered_node_types).length > 100"


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def of_ours(message: ConsoleMessage) -> bool:
    return message.type == "error" and (
        f"/extensions/{PACK}/" in message.location["url"] or "lance" in message.text.lower()
    )


@pytest.fixture(scope="module")
def errors() -> list[str]:
    """Errors of the page, and those of its console that speak of the pack."""
    return []


@pytest.fixture(scope="module")
def page(server: ComfyServer, errors: list[str]) -> Iterator[Page]:
    if (browser_path := find_browser()) is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.on("console", lambda message: errors.append(message.text) if of_ours(message) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_function(READY, timeout=90_000)
        yield page
        browser.close()


def editor_form(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def load(page: Page, name: str) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", editor_form(name))
    page.wait_for_timeout(300)


def without_titles(prompt: dict) -> dict:
    """The prompt as the server sees it; `video-preview` is what core's Load Video shows, not an input of it."""
    return {
        node_id: (node["class_type"], {key: v for key, v in node["inputs"].items() if key != "video-preview"})
        for node_id, node in prompt.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_knows_every_node(page, name):
    load(page, name)
    missing = page.evaluate(
        "app.graph.nodes.filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])"
        ".map(node => node.type)"
    )
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_sends_what_the_api_form_says(page, name):
    load(page, name)
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert without_titles(sent) == without_titles(json.loads((WORKFLOWS / f"api/{name}.json").read_text("utf-8")))


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_saves_what_it_loaded(page, name):
    load(page, name)
    committed, saved = editor_form(name), page.evaluate("app.graph.serialize()")
    assert saved["links"] == committed["links"]
    assert [group["title"] for group in saved["groups"]] == [group["title"] for group in committed["groups"]]
    for before, after in zip(committed["nodes"], saved["nodes"], strict=True):
        assert after["type"] == before["type"]
        assert after.get("widgets_values", []) == before["widgets_values"]
        assert [(o["name"], o["type"], o["links"]) for o in after["outputs"]] == [
            (o["name"], o["type"], o["links"]) for o in before["outputs"]
        ]
        sockets = [(i["name"], i["type"], i["link"]) for i in before["inputs"] if "widget" not in i]
        assert [(i["name"], i["type"], i["link"]) for i in after["inputs"] if "widget" not in i] == sockets


def open_templates(page: Page) -> None:
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("dialog-overlay").wait_for()
    page.get_by_text(PACK, exact=True).last.click()


def test_the_template_browser_lists_them_with_pictures(page):
    open_templates(page)
    for name in NAMES:
        picture = page.get_by_test_id(f"template-workflow-{name}").locator("img").first
        picture.wait_for(timeout=20_000)
        assert picture.evaluate("image => image.complete && image.naturalWidth") == 400
    page.keyboard.press("Escape")
    page.get_by_test_id("dialog-overlay").wait_for(state="hidden")


def test_a_newcomer_opens_a_template_and_presses_run(page, server):
    """A workflow as shipped, at its full size, from the template browser to the answer on the canvas."""
    open_templates(page)
    page.get_by_test_id("template-workflow-ask_image").click()
    page.get_by_test_id("dialog-overlay").wait_for(state="hidden")
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'LanceUnderstand')")
    assert page.get_by_test_id("error-overlay").count() == 0
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(
        "app.nodeOutputs?.[app.graph.nodes.find(node => node.type === 'PreviewAny').id]?.text", timeout=120_000
    )
    newest = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    assert newest["status"]["status_str"] == "success"
    assert newest["prompt"][3]["extra_pnginfo"]["workflow"]["nodes"]


def test_nothing_of_ours_went_wrong_in_the_browser(page, errors):
    assert errors == []
