"""Workflows that people have saved keep loading: no input, output or default changes unnoticed."""

from __future__ import annotations

import json

import pytest

from . import schemas
from .server import ComfyServer

RENEW = (
    "Saved workflows break when an input is renamed, removed, moved or loses a choice: give such a node a new id and"
    " register an io.NodeReplace that maps the old one to it, then renew the snapshot with"
    " `python -m tests.comfyui.schemas`."
)


def lines(schema: schemas.Schema) -> list[str]:
    """A schema as one line per input and output, so that a difference names what changed."""
    return [f"{part} {json.dumps(entry, sort_keys=True)}" for part in schema for entry in schema[part]]


def changes(before: dict[str, schemas.Schema], after: dict[str, schemas.Schema]) -> list[str]:
    found = []
    for id in sorted(before.keys() | after.keys()):
        old, new = (lines(side.get(id, {})) for side in (before, after))
        gone, come = ([line for line in one if line not in other] for one, other in ((old, new), (new, old)))
        found += [f"{id}: - {line}" for line in gone] + [f"{id}: + {line}" for line in come]
        if old != new and not gone and not come:
            found.append(f"{id}: another order")
    return found


def test_every_schema_is_the_recorded_one(server: ComfyServer):
    recorded = json.loads(schemas.SNAPSHOT.read_text(encoding="utf-8"))
    found = changes(recorded, schemas.snapshot(server.object_info()))
    assert not found, "\n".join([RENEW, *found])


def test_the_manager_s_list_names_the_registered_nodes(server: ComfyServer):
    assert json.loads(schemas.NODE_LIST.read_text(encoding="utf-8")) == schemas.node_list(server.object_info()), (
        "The nodes or their descriptions changed: renew node_list.json with `python -m tests.comfyui.schemas`."
    )


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda inputs: inputs[0].update(name="renamed"), '"renamed"'),
        (lambda inputs: inputs[1].update(default="bf16"), '"bf16"'),
        (lambda inputs: inputs.reverse(), "another order"),
        (lambda inputs: inputs.clear(), "LoadLance: - inputs"),
    ],
)
def test_a_changed_input_is_noticed(edit, says):
    before = {"LoadLance": {"inputs": [{"name": "checkpoint"}, {"name": "weight_dtype"}], "outputs": [["VAE", "VAE"]]}}
    after = json.loads(json.dumps(before))
    edit(after["LoadLance"]["inputs"])
    assert any(says in change for change in changes(before, after))
    assert not changes(before, before)
