"""The pack in the real editor, in a headless Chromium: with classic nodes and with Nodes 2.0.

COMFYUI_FRONTEND_ROOT, a folder such as `comfyui_frontend_package/static`, names a second editor to test beside the
server's own. LANCE_SCREENSHOTS names a folder that keeps pictures of what was seen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from .build_workflows import GRAPHS, WORKFLOWS
from .conftest import server_in
from .server import PACK, ComfyServer

NAMES = [graph.__name__ for graph in GRAPHS]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
READY = "window.app?.graph && Object.keys(window.LiteGraph.registered_node_types).length > 100"
FRONTENDS = {"own": None, **({"other": root} if (root := os.environ.get("COMFYUI_FRONTEND_ROOT")) else {})}
NODES_2 = {"classic": False, "nodes2": True}
SETTINGS = {"Comfy.Execution.PreviewMethod": "latent2rgb", "Comfy.Locale": "en"}

DROP = """([name, text]) => {
    const dataTransfer = new DataTransfer(), place = {clientX: 900, clientY: 500};
    dataTransfer.items.add(new File([text], name, {type: 'application/json'}));
    const canvas = document.querySelector('#graph-canvas');
    canvas.dispatchEvent(new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer, ...place}));
}"""
WATCH = """() => {
    const seen = window.seen = {progress: 0, previews: 0, end: null};
    app.api.addEventListener('progress', () => seen.progress++);
    app.api.addEventListener('b_preview', () => seen.previews++);
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(end, ({detail}) => seen.end = [end, detail.exception_message ?? '']);
}"""
# Shorter than shipped, so that a test of the editor does not wait for the model.
SHRINK = """() => {
    const small = {steps: 2, seed: Date.now(), max_new_tokens: 64 + Date.now() % 4000};  // fresh, or nothing would run
    for (const node of app.graph.nodes) {
        const set = values => node.widgets?.filter(({name}) => name in values)
            .forEach(widget => widget.value = values[widget.name]);
        set(small);
        set({frames: Math.min(node.widgets?.find(({name}) => name === 'frames')?.value, 5)});
    }
}"""
NODE = "type => app.graph.nodes.find(node => node.type === type)"
STREAMED = "$$node-text-preview"  # the editor's own widget for text that a node sends while it works


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def of_ours(message: ConsoleMessage) -> bool:
    return message.type == "error" and (
        f"/extensions/{PACK}/" in message.location["url"] or "lance" in message.text.lower()
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if (browser_path := find_browser()) is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=FRONTENDS)
def editor(request, tmp_path_factory, comfyui, tiny_checkpoint) -> Iterator[ComfyServer]:
    """A server with one of the editors."""
    if (root := FRONTENDS[request.param]) is None:
        yield request.getfixturevalue("server")
        return
    server = server_in(tmp_path_factory.mktemp("other_editor"), comfyui, tiny_checkpoint)
    server.arguments += ("--front-end-root", root)
    with server:
        yield server


def open_editor(browser: Browser, server: ComfyServer, errors: list[str], **settings: object) -> Page:
    """A page with the editor. Errors of the page, and those of its console that speak of the pack, go to `errors`."""
    for name, value in (SETTINGS | settings).items():
        server.post(f"/settings/{name}", value)
    page = browser.new_page(viewport={"width": 1800, "height": 1000})
    page.on("console", lambda message: errors.append(message.text) if of_ours(message) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(READY, timeout=90_000)
    page.wait_for_function("app.extensionManager.workflow.activeWorkflow")  # after it, nothing else is loaded
    expect(page.locator(".p-blockui-mask")).to_have_count(0)  # it stays for good where work begins under it
    page.evaluate(WATCH)
    return page


@pytest.fixture(scope="module")
def errors() -> list[str]:
    return []


@pytest.fixture(scope="module", params=NODES_2)
def page(request, browser: Browser, editor: ComfyServer, errors: list[str]) -> Iterator[Page]:
    page = open_editor(browser, editor, errors, **{"Comfy.VueNodes.Enabled": NODES_2[request.param]})
    yield page
    page.close()


@pytest.fixture
def photograph(request) -> Callable[[Page], None]:
    """Keeps a picture of the page under the test's name, where pictures are wanted."""

    def keep(page: Page, what: str = "") -> None:
        if folder := os.environ.get("LANCE_SCREENSHOTS"):
            name = request.node.name.removeprefix("test_").replace("[", "-").replace("]", "")
            page.screenshot(path=Path(folder, f"{name}{what and '-'}{what}.png"))

    return keep


def editor_form(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def load(page: Page, name: str) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", editor_form(name))
    page.wait_for_timeout(300)


def drop(page: Page, name: str) -> None:
    """Drops a workflow's file on the canvas, and waits until it is there."""
    text = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    page.evaluate("app.graph.clear()")
    page.evaluate(DROP, [f"{name}.json", text])
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(json.loads(text)["nodes"]))
    page.wait_for_timeout(200)


def add_node(page: Page, type: str) -> None:
    page.evaluate("app.graph.clear()")
    page.evaluate("type => { app.graph.add(LiteGraph.createNode(type)); app.canvas.ds.reset() }", type)
    page.evaluate("app.canvas.ds.offset = [150, 150]")


def run(page: Page) -> None:
    page.evaluate("Object.assign(seen, {progress: 0, previews: 0, end: null})")
    page.get_by_test_id("queue-button").click()


def wait_for_end(page: Page, seconds: float = 120) -> list[str]:
    """How the run ended, and what the node said."""
    page.wait_for_function("seen.end", timeout=1000 * seconds)
    return page.evaluate("seen.end")


def without_titles(prompt: dict) -> dict:
    """The prompt as the server sees it; `video-preview` is what core's Load Video shows, not an input of it."""
    return {
        node_id: (node["class_type"], {key: v for key, v in node["inputs"].items() if key != "video-preview"})
        for node_id, node in prompt.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_workflow_is_understood_saved_and_run(page, editor, name, photograph):
    drop(page, name)
    unknown = "app.graph.nodes.filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])"
    assert page.evaluate(f"{unknown}.map(node => node.type)") == []
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert without_titles(sent) == without_titles(json.loads((WORKFLOWS / f"api/{name}.json").read_text("utf-8")))
    check_saved(page.evaluate("app.graph.serialize()"), editor_form(name))

    page.evaluate(SHRINK)
    run(page)
    assert wait_for_end(page) == ["execution_success", ""]
    assert page.evaluate("seen.progress") > 0
    paints = any(node["type"] in ("LanceGenerate", "LanceEdit", "KSampler") for node in editor_form(name)["nodes"])
    assert (page.evaluate("seen.previews") > 0) == paints
    newest = max(editor.get("/history").values(), key=lambda entry: entry["prompt"][0])
    assert newest["outputs"]
    page.wait_for_function("ids => ids.every(id => app.nodeOutputs[id])", arg=list(newest["outputs"]))
    page.wait_for_timeout(300)
    photograph(page)


def check_saved(saved: dict, committed: dict) -> None:
    """What the editor saves of a workflow that it has loaded is what was loaded."""
    assert sorted(saved["links"]) == sorted(committed["links"])  # newer editors save them in another order
    assert [group["title"] for group in saved["groups"]] == [group["title"] for group in committed["groups"]]
    for before, after in zip(committed["nodes"], saved["nodes"], strict=True):
        assert after["type"] == before["type"]
        assert after.get("widgets_values", []) == before["widgets_values"]
        assert [(o["name"], o["type"], o["links"]) for o in after["outputs"]] == [
            (o["name"], o["type"], o["links"]) for o in before["outputs"]
        ]
        sockets = [(i["name"], i["type"], i["link"]) for i in before["inputs"] if "widget" not in i]
        assert [(i["name"], i["type"], i["link"]) for i in after["inputs"] if "widget" not in i] == sockets


def test_load_lance_says_what_the_checkpoint_needs_and_the_machine_has(page, photograph):
    add_node(page, "LoadLance")
    memory = page.locator(".lance-status p.memory")
    expect(memory).to_contain_text("in fp32: model")
    expect(memory).to_contain_text("RAM:")
    choose = (
        f"value => {{ const widget = ({NODE})('LoadLance').widgets[1]; widget.value = value; widget.callback(value) }}"
    )
    page.evaluate(choose, "bf16")
    expect(memory).to_contain_text("in bf16: model")
    expect(page.locator(".lance-status p.problem")).to_have_count(0)
    assert page.evaluate(f"({NODE})('LoadLance').serialize().widgets_values.length") == 2
    photograph(page)


def test_the_answer_appears_on_the_node_while_it_is_written(page, photograph):
    drop(page, "ask_image")
    find = f"({NODE})('LanceUnderstand').widgets.find(({{name}}) => name === '{STREAMED}')?.value"
    page.evaluate(f"({NODE})('LanceUnderstand').widgets.find(({{name}}) => name === 'max_new_tokens').value = 3000")
    page.evaluate(f"({NODE})('LanceUnderstand').widgets[0].value = 'What is it? Tell all, {id(page)}.'")
    page.evaluate(f"({NODE})('LoadLance').widgets[0].value = 'Lance_3B'")  # random weights: they do not come to an end
    run(page)
    page.wait_for_function(f"{find}?.length > 40", timeout=60_000)
    begun = page.evaluate(find)
    expect(page.get_by_text(begun[:30]).first).to_be_visible()
    photograph(page)
    page.wait_for_function(f"length => {find}.length > length", arg=len(begun))
    assert page.evaluate("seen.end") is None  # it was seen while the node still worked
    stop(page)
    assert wait_for_end(page)[0] == "execution_interrupted"


def stop(page: Page) -> None:
    page.get_by_label("Cancel current run").or_(page.get_by_label("Interrupt current job")).first.click()


def test_the_button_stops_painting_within_steps(page, editor, photograph):
    drop(page, "text_to_image")
    for name, value in (("size", "'image_768res'"), ("steps", 200)):
        page.evaluate(f"({NODE})('LanceGenerate').widgets.find(({{name}}) => name === '{name}').value = {value}")
    run(page)
    page.wait_for_function("seen.previews > 1", timeout=60_000)
    photograph(page)
    stop(page)
    assert wait_for_end(page, seconds=20)[0] == "execution_interrupted"
    assert page.evaluate("seen.progress") < 150
    assert editor.get("/queue") == {"queue_running": [], "queue_pending": []}


def open_templates(page: Page) -> None:
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").get_by_text(PACK, exact=True).first.click()


def test_the_template_browser_lists_them_with_pictures(page, photograph):
    open_templates(page)
    for name in NAMES:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()  # pictures are there only while they are seen
        picture = card.locator("img").first.element_handle(timeout=20_000)
        page.wait_for_function("image => image.naturalWidth === 400", arg=picture)
    photograph(page)
    page.keyboard.press("Escape")
    page.get_by_test_id("dialog-overlay").wait_for(state="hidden")


def test_a_newcomer_opens_a_template_and_presses_run(page):
    """A workflow as shipped, at its full size, from the template browser to the answer on the canvas."""
    open_templates(page)
    page.get_by_test_id("template-workflow-ask_image").click()
    page.get_by_test_id("dialog-overlay").wait_for(state="hidden")
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'LanceUnderstand')")
    assert page.get_by_test_id("error-overlay").count() == 0
    run(page)
    assert wait_for_end(page) == ["execution_success", ""]
    page.wait_for_function(f"app.nodeOutputs?.[({NODE})('PreviewAny').id]?.text")


@pytest.mark.parametrize(
    "language, title, label", [("en", "Lance Generate", "aspect_ratio"), ("zh", "Lance 生成", "宽高比")]
)
def test_node_and_help_page_speak_the_language(browser, editor, errors, photograph, language, title, label):
    page = open_editor(browser, editor, errors, **{"Comfy.Locale": language, "Comfy.VueNodes.Enabled": False})
    add_node(page, "LanceGenerate")
    page.evaluate(f"({NODE})('LanceGenerate').widgets.find(({{name}}) => name === 'size').value = 'image_768res'")
    widget = f"({NODE})('LanceGenerate').widgets.find(({{name}}) => name === 'size.aspect_ratio')"
    assert page.evaluate(f"{widget}.label") == label
    page.evaluate(f"app.canvas.selectNode(({NODE})('LanceGenerate'))")
    page.get_by_test_id("info-button").first.click()
    help = page.locator(".node-help-content")
    expect(help.get_by_role("heading", name=title)).to_be_visible()
    picture = help.locator("img").first
    expect(picture).to_be_visible()
    page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    photograph(page)
    page.close()


def test_nothing_of_ours_went_wrong_in_the_browser(page, errors):
    assert errors == []


@pytest.fixture(scope="module")
def bare(tmp_path_factory, comfyui, tiny_checkpoint) -> Iterator[ComfyServer]:
    """A server without checkpoints, as people have after installing the pack."""
    server = server_in(tmp_path_factory.mktemp("bare"), comfyui, tiny_checkpoint)
    shutil.rmtree(server.folder / "models/lance")
    server.arguments = ("--front-end-root", FRONTENDS["other"]) if "other" in FRONTENDS else ()
    with server:
        yield server


@pytest.mark.parametrize("mode", NODES_2)
def test_load_lance_says_what_is_missing_and_where_it_belongs(browser, bare, tiny_checkpoint, photograph, mode):
    errors: list[str] = []
    page = open_editor(browser, bare, errors, **{"Comfy.VueNodes.Enabled": NODES_2[mode]})
    drop(page, "text_to_image")
    status, folder = page.locator(".lance-status"), bare.folder / "models/lance"
    expect(status.locator("p.memory")).to_contain_text("in fp32: model")  # of the built-in model
    expect(status.locator("p.problem")).to_have_count(0)
    choose = f"value => {{ const widget = ({NODE})('LoadLance').widgets[0]; widget.value = value; widget.callback() }}"
    page.evaluate(choose, "Lance_3B")
    expect(status).to_contain_text(f"There is no checkpoint yet. Put Lance into {folder}")
    expect(status.locator("code")).to_have_text(f"hf download bytedance-research/Lance --local-dir {folder}")
    page.wait_for_timeout(300)
    photograph(page, "empty")

    shutil.copytree(tiny_checkpoint, folder)
    (folder / "Wan2.2_VAE.pth").unlink()
    (folder / "Lance_3B/model.safetensors").unlink()
    try:
        page.evaluate("app.refreshComboInNodes()")
        release = "https://huggingface.co/bytedance-research/Lance/resolve/main"
        for file, place in (("Lance_3B/model.safetensors", folder / "Lance_3B"), ("Wan2.2_VAE.pth", folder)):
            line = status.locator("p.problem", has_text=f"Missing: {Path(file).name}, which belongs into {place}.")
            expect(line.get_by_role("link")).to_have_attribute("href", f"{release}/{file}")
        page.wait_for_timeout(300)
        photograph(page, "partial")
    finally:
        shutil.rmtree(folder)
    assert errors == []
    page.close()
