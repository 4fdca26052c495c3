"""What the editor shows of the nodes in each language: complete, and in English what the schemas say.

`python -m tests.comfyui.test_locales` writes the English file anew from the schemas.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from .conftest import ROOT, make_tiny, server_in
from .schemas import of_pack
from .server import PACK, ComfyServer, find_comfyui

LOCALES, DOCS = ROOT / "locales", ROOT / "web/docs"
ENGLISH = LOCALES / "en/nodeDefs.json"
LANGUAGES = ("en", "zh")
SYNTAX = re.compile(r"[{}|@]")  # the editor's translation library reads these as placeholders, plurals and links
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


def inputs_of(kinds: dict[str, dict[str, list]], prefix: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Key and texts of each input, with those that the choices of a dynamic combo bring.

    The editor looks an input `size.width` up as `size_width`, since a dot would lead deeper into the file.
    """
    for inputs in (kinds.get("required", {}), kinds.get("optional", {})):
        for name, (kind, options) in inputs.items():
            yield f"{prefix}{name}", {"name": options.get("display_name") or name, "tooltip": options["tooltip"]}
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for choice in options["options"]:
                    yield from inputs_of(choice["inputs"], f"{prefix}{name}_")


def outputs_of(node: dict) -> dict[str, dict[str, str]]:
    tooltips = node.get("output_tooltips") or [None] * len(node["output_name"])
    texts = zip(node["output_name"], tooltips, strict=True)
    return {str(i): {"name": name} | ({"tooltip": tip} if tip else {}) for i, (name, tip) in enumerate(texts)}


def texts_of(object_info: dict) -> dict[str, dict]:
    """The texts of all nodes of the pack as a `nodeDefs.json` has them."""
    return {
        id: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": dict(inputs_of(node["input"])),
            "outputs": outputs_of(node),
        }
        for id, node in of_pack(object_info).items()
    }


def leaves(value: dict | str, path: str = "") -> dict[str, str]:
    """The texts of a file by their places in it."""
    if isinstance(value, str):
        return {path: value}
    return {place: text for key, inner in value.items() for place, text in leaves(inner, f"{path}/{key}").items()}


def read(language: str, name: str) -> dict:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


@pytest.fixture(scope="module")
def schemas(server: ComfyServer) -> dict[str, dict]:
    return texts_of(server.object_info())


def test_english_says_what_the_schemas_say(schemas):
    assert leaves(read("en", "nodeDefs.json")) == leaves(schemas), "python -m tests.comfyui.test_locales writes it"


def test_chinese_has_every_text(schemas):
    chinese = leaves(read("zh", "nodeDefs.json"))
    assert chinese.keys() == leaves(schemas).keys()
    sentences = {place: text for place, text in chinese.items() if place.endswith(("/tooltip", "/description"))}
    assert [place for place, text in sentences.items() if not re.search(r"[\u4e00-\u9fff]", text)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_has_the_translation_librarys_syntax(language):
    assert {place for place, text in leaves(read(language, "nodeDefs.json")).items() if SYNTAX.search(text)} == set()


def test_both_languages_fill_the_same_names_into_what_our_script_shows():
    english, chinese = (leaves(read(language, "main.json")) for language in LANGUAGES)
    assert {place: names_in(text) for place, text in english.items()} == {
        place: names_in(text) for place, text in chinese.items()
    }
    script = (ROOT / "web/js/lance.js").read_text(encoding="utf-8")
    assert {place.rsplit("/")[-1] for place in english} == set(re.findall(r"texts\)?\(?\)?\)?\.(\w+)", script))


def test_the_server_gives_the_editor_every_file(server):
    translations = server.get("/i18n")
    for language in LANGUAGES:
        ours = read(language, "main.json") | {"nodeDefs": read(language, "nodeDefs.json")}
        assert leaves(ours).items() <= leaves(translations[language]).items()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page_with_a_picture_that_the_server_has(server, schemas, language):
    for id, texts in schemas.items():
        page = server.request(f"/extensions/{PACK}/docs/{id}/{language}.md").decode()
        assert page.startswith(f"# {read(language, 'nodeDefs.json')[id]['display_name']}\n")
        assert (pictures := PICTURE.findall(page)), f"{id}/{language}.md has no picture"
        for picture in pictures:  # the editor resolves them against the folder of all pages
            assert server.request(f"/extensions/{PACK}/docs/{quote(picture)}").startswith(b"\xff\xd8")


def test_no_help_page_is_of_a_node_that_does_not_exist(schemas):
    assert {folder.name for folder in DOCS.iterdir() if folder.is_dir()} == schemas.keys()


def main() -> None:
    if (comfyui := find_comfyui()) is None:
        sys.exit("no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server_in(folder, comfyui, make_tiny(folder / "tiny")) as server:
            texts = texts_of(server.object_info())
    ENGLISH.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
