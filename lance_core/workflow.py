"""Runs a ComfyUI workflow in its API format over the stages, without ComfyUI.

A workflow is `{node id: {"class_type": ..., "inputs": {name: value or [node id, output index]}, "_meta": ...}}`, as
the editor's File -> Export (API) writes it. It is checked as a whole before anything runs; then every node that an
output node needs runs once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from .errors import LanceError
from .workflow_nodes import NODES, REQUIRED, Input, Progress, Session, Shown, output_file

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # types whose values a workflow may hold itself
NUMBERS = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}

Workflow = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Result:
    """What an output node wrote or showed."""

    node: str
    files: tuple[Path, ...] = ()
    text: str | None = None


def read_workflow(path: Path) -> dict[str, Any]:
    """The workflow in a JSON file; LanceError where there is none, or one in the editor's format."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LanceError(f"{path} cannot be read ({error.strerror}); check the name and the folder.") from None
    except (ValueError, RecursionError):
        raise LanceError(f"{path} is not valid JSON; export the workflow again with File -> Export (API).") from None
    check_format(workflow)
    return workflow


def check_format(workflow: Any) -> None:
    """Raises LanceError where that is not a workflow in the API format."""
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        raise LanceError("this workflow is in the editor's format; open it in ComfyUI and use File -> Export (API).")
    good = (
        isinstance(workflow, dict)
        and workflow
        and all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs", {}), dict)
            for node in workflow.values()
        )
    )
    if not good:
        raise LanceError(
            "this is not a workflow in the API format, {node id: {class_type, inputs}}; use File -> Export (API)."
        )


def label(workflow: Workflow, node_id: str) -> str:
    return f"node {node_id} ({workflow[node_id]['class_type']})"


def inputs_of(workflow: Workflow, node_id: str) -> dict[str, Any]:
    """The inputs of a node that its class knows; others belong to the editor and are passed over, as in ComfyUI."""
    known = schemas(workflow, node_id)
    return {name: value for name, value in values_of(workflow, node_id).items() if name in known}


def values_of(workflow: Workflow, node_id: str) -> Mapping[str, Any]:
    return workflow[node_id].get("inputs", {})


def schemas(workflow: Workflow, node_id: str) -> dict[str, Input]:
    """The inputs that a node has as its combos are set."""
    return NODES[workflow[node_id]["class_type"]].chosen(values_of(workflow, node_id))


def possible_schemas(workflow: Workflow, node_id: str) -> dict[str, Input]:
    """The inputs that a node has or could have, were its combos set otherwise."""
    return NODES[workflow[node_id]["class_type"]].possible(values_of(workflow, node_id))


def links_of(workflow: Workflow, node_id: str) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in inputs_of(workflow, node_id).items() if isinstance(value, list))


def check_classes(workflow: Workflow) -> None:
    for node_id, node in workflow.items():
        if node["class_type"] not in NODES:
            raise LanceError(
                f"node {node_id} is a '{node['class_type']}', which only ComfyUI can run; here there are"
                f" {', '.join(sorted(NODES))}."
            )


def order(workflow: Workflow) -> list[str]:
    """All nodes, each behind those it needs; LanceError naming the nodes of a cycle."""
    graph = {}
    for node_id in workflow:
        links = (value for _, value in links_of(workflow, node_id))
        graph[node_id] = [link[0] for link in links if link and isinstance(link[0], str) and link[0] in workflow]
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        nodes = " -> ".join(label(workflow, node_id) for node_id in error.args[1])
        raise LanceError(f"the workflow has a cycle: {nodes}; remove one of these links.") from None


def needed(workflow: Workflow) -> set[str]:
    """The output nodes and all that they depend on; LanceError where there is no output node."""
    open_nodes = [node_id for node_id, node in workflow.items() if NODES[node["class_type"]].is_output]
    if not open_nodes:
        names = ", ".join(name for name, node in NODES.items() if node.is_output)
        raise LanceError(f"the workflow has no output, so there is nothing to do; add one of {names}.")
    found: set[str] = set()
    while open_nodes:
        node_id = open_nodes.pop()
        if node_id not in found:
            found.add(node_id)
            for name, link in links_of(workflow, node_id):
                open_nodes.append(source(workflow, node_id, name, link)[0])
    return found


def source(workflow: Workflow, node_id: str, name: str, link: list) -> tuple[str, int]:
    """The (node, output) that an input is linked to; LanceError where there is no such thing or its type is another."""
    place = f"{label(workflow, node_id)}: input '{name}'"
    good = len(link) == 2 and isinstance(link[0], str) and isinstance(link[1], int) and not isinstance(link[1], bool)
    if not good:
        raise LanceError(f"{place} is {link!r}; a link is [node id, output index].")
    origin, slot = link
    if origin not in workflow:
        raise LanceError(f"{place} is linked to node {origin}, which the workflow does not have; link it again.")
    outputs = NODES[workflow[origin]["class_type"]].outputs
    if not 0 <= slot < len(outputs):
        raise LanceError(
            f"{place} is linked to output {slot} of {label(workflow, origin)}, which has {len(outputs)}, counted from"
            " 0; link it again."
        )
    wanted = schemas(workflow, node_id)[name].type
    if wanted != "*" and outputs[slot] not in wanted.split(","):
        raise LanceError(
            f"{place} takes {wanted.replace(',', ' or ')}, but output {slot} of {label(workflow, origin)} is"
            f" {outputs[slot]}; link another output."
        )
    return origin, slot


def checked(place: str, schema: Input, value: Any) -> Any:
    """A value that is no link, as its input's type; LanceError where it is of another."""
    if schema.type == "*":
        return value
    if schema.type not in WIDGETS:
        kinds = schema.type.replace(",", " or ")
        raise LanceError(f"{place} is {value!r}, but it takes {kinds}: link it to a node that gives it.")
    number = number_of(value)
    if schema.type == "BOOLEAN" and isinstance(value, bool):
        return value
    if schema.type == "FLOAT" and number is not None:
        return number
    if schema.type == "INT" and number is not None and number.is_integer():
        return int(value)
    if schema.type in NUMBERS:
        raise LanceError(f"{place} is {value!r}; give {NUMBERS[schema.type]}.")
    if not isinstance(value, str):
        raise LanceError(f"{place} is {value!r}; give text.")
    if schema.options and value not in schema.options:
        raise LanceError(f"{place} is '{value}'; give one of {', '.join(schema.options)}.")
    return value


def number_of(value: Any) -> float | None:
    """A number of a JSON file; None for all else, and for whole numbers beyond a float's reach."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def arguments(workflow: Workflow, node_id: str) -> dict[str, Any]:
    """Every input of a node by name: a checked value, its default, or a link as a tuple (node, output)."""
    given = inputs_of(workflow, node_id)
    result = {}
    for name, schema in schemas(workflow, node_id).items():
        place = f"{label(workflow, node_id)}: input '{name}'"
        if name not in given or given[name] is None and schema.default is None:
            if schema.default is REQUIRED:
                raise LanceError(f"{place} is missing; link it or give it a value.")
            result[name] = schema.default
        elif isinstance(given[name], list) and not schema.choices:
            result[name] = source(workflow, node_id, name, given[name])
        else:
            result[name] = checked(place, schema, given[name])
    return result


def override(workflow: Workflow, assignment: str) -> dict[str, Any]:
    """The workflow with one input set: "node.input=value", where node is an id, or a title or class that is unique.

    The value is read as JSON for numbers, booleans and links, and taken as it stands for text.
    """
    target, separator, text = assignment.partition("=")
    if not separator:
        raise LanceError(f"'{assignment}' does not say what to set; write node.input=value.")
    node_id, name = find_input(workflow, target.strip())
    schema = possible_schemas(workflow, node_id)[name]
    value = parsed(f"{label(workflow, node_id)}: input '{name}'", schema, text)
    return {**workflow, node_id: {**workflow[node_id], "inputs": {**values_of(workflow, node_id), name: value}}}


def find_input(workflow: Workflow, target: str) -> tuple[str, str]:
    """The (node id, input name) that "node.input" means; LanceError listing what there is where it means nothing."""
    splits = [(target[:i], target[i + 1 :]) for i, letter in enumerate(target) if letter == "."]
    for node_name, input_name in splits:
        matches = find_nodes(workflow, node_name)
        if len(matches) > 1:
            ids = ", ".join(matches)
            raise LanceError(f"'{target}' could mean any of the nodes {ids}; name the node by its id.")
        if matches:
            names = possible_schemas(workflow, matches[0])
            if input_name in names:
                return matches[0], input_name
            raise LanceError(f"{label(workflow, matches[0])} has no input '{input_name}'; it has {', '.join(names)}.")
    known = ", ".join(f"{node_id} ({node['class_type']})" for node_id, node in workflow.items())
    raise LanceError(f"'{target}' names nothing in this workflow; write node.input=value with one of {known}.")


def find_nodes(workflow: Workflow, name: str) -> list[str]:
    """The nodes of that id, or else of that title, or else of that class."""
    if name in workflow:
        return [name]
    titled = [node_id for node_id, node in workflow.items() if title(node) == name]
    return titled or [node_id for node_id, node in workflow.items() if node["class_type"] == name]


def title(node: Mapping[str, Any]) -> str | None:
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None


def parsed(place: str, schema: Input, text: str) -> Any:
    """A value typed on the command line, for an input of that type."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, list) and schema.type not in ("STRING", "COMBO"):
        return value
    if schema.type in ("STRING", "COMBO") and not isinstance(value, str):
        value = text
    return checked(place, schema, value)


def run_workflow(
    workflow: Workflow,
    *,
    output: Path,
    inputs: Sequence[Path] = (),
    models: Sequence[Path] = (),
    overrides: Iterable[str] = (),
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Runs a workflow and returns what its output nodes wrote and showed, in the order in which they ran.

    output: the folder that files are written into; inputs: the folders that LoadImage and LoadVideo read from;
    models: the folders that hold checkpoints, in a subfolder `lance` or directly; overrides: "node.input=value".
    model: a checkpoint, by its name there or its path, in the place of those that the workflow names.
    progress(what, done, total) is called after every step and token, on_result after every output node.
    Raises LanceError, naming the node, for whatever is wrong with the workflow or its values.
    """
    check_format(workflow)
    check_classes(workflow)
    for assignment in overrides:
        workflow = override(workflow, assignment)
    ordered = order(workflow)
    wanted = needed(workflow)
    plan = {node_id: arguments(workflow, node_id) for node_id in ordered if node_id in wanted}
    session = Session(workflow, Path(output), tuple(inputs), tuple(models), model, device, dtype, progress)
    for node_id, planned in plan.items():  # before hours of work, not after
        if isinstance(planned.get("filename_prefix"), str):
            with naming(workflow, node_id):
                output_file(session.output, planned["filename_prefix"])

    values: dict[str, tuple] = {}
    results = []
    for node_id, planned in plan.items():
        filled = {
            name: values[value[0]][value[1]] if isinstance(value, tuple) else value for name, value in planned.items()
        }
        shown = run_node(session, node_id, filled)
        values[node_id] = shown.outputs
        if NODES[workflow[node_id]["class_type"]].is_output:
            results.append(Result(node_id, shown.files, shown.text))
            if on_result is not None:
                on_result(results[-1])
    return results


@contextmanager
def naming(workflow: Workflow, node_id: str) -> Iterator[None]:
    """Puts the node's name before a LanceError from inside."""
    try:
        yield
    except LanceError as error:
        raise LanceError(f"{label(workflow, node_id)}: {error}") from None


def run_node(session: Session, node_id: str, values: Mapping[str, Any]) -> Shown:
    """Runs one node; a LanceError from inside says which node it was."""
    with naming(session.workflow, node_id):
        outcome = NODES[session.workflow[node_id]["class_type"]].run(session, **values)
    return outcome if isinstance(outcome, Shown) else Shown(outcome)
