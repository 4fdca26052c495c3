"""The shipped workflows, as they are and with nothing downloaded or uploaded, mean something in a real ComfyUI."""

from __future__ import annotations

from random import Random

import pytest

from lance_core.media import read_clip, read_image
from lance_core.world import judge
from lance_core.world.accuracy import nothing_else_made, plain, shows_all
from lance_core.world.edits import KEEP, suggestion
from lance_core.world.scene import Scene, Thing, random_clip, random_scene

from .build_workflows import CLIP, GRAPHS, PICTURE
from .server import ComfyServer, Run
from .test_server import file_of, read, shown_text

SCENE, FILM = random_scene(Random(PICTURE), "test"), random_clip(Random(CLIP), "test")


@pytest.fixture(scope="module")
def runs(server: ComfyServer):
    """Runs of the shipped graphs, each once: `runs(name)`."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            done[name] = server.run(read(name))
        return done[name]

    return run


@pytest.mark.parametrize("name", [graph.__name__ for graph in GRAPHS])
def test_it_runs_as_shipped(runs, name):
    assert any(runs(name).history["outputs"].values())


@pytest.mark.parametrize("name, answer", [("ask_image", "red"), ("ask_video", FILM.direction)])
def test_it_answers(runs, name, answer):
    assert plain(shown_text(runs(name))) == answer


def test_it_makes_the_circle_blue(server, runs):
    (circle,) = [thing for thing in SCENE.things if thing.shape == "circle"]
    picture = read_image(file_of(server, runs("image_edit"), ".png"))
    assert nothing_else_made(picture, SCENE, SCENE.changed(circle, colour="blue"))


def test_it_understands_then_edits(server, runs):
    true = suggestion(SCENE)
    assert shown_text(runs("understand_then_edit")) == true.instruction + KEEP["en"]
    picture = read_image(file_of(server, runs("understand_then_edit"), ".png"))
    assert nothing_else_made(picture, SCENE, true.after)


@pytest.mark.parametrize(
    "name, background, things",
    [
        ("text_to_image", "white", [Thing((0, 0), "red", "circle"), Thing((1, 2), "blue", "square")]),
        ("ksampler", "gray", [Thing((1, 1), "yellow", "star"), Thing((2, 2), "purple", "circle")]),
    ],
)
def test_it_paints_what_it_is_told(server, runs, name, background, things):
    picture = read_image(file_of(server, runs(name), ".png"))
    assert shows_all(judge.read_picture(picture[0]), Scene(background, tuple(things)))


def test_it_paints_a_motion(server, runs):
    frames, _ = read_clip(file_of(server, runs("text_to_video"), ".mp4"))
    assert judge.read_clip(frames).direction == "right"
