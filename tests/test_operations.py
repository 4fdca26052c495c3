"""What a step asks of the device: few operations, as many for a large picture as for a small one, and no answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parity import lance
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from operations import Operations, count, count_per_call

from lance_core import flow, stages
from lance_core.transformer import MLP_CHUNK, Run

LIMIT = 60  # operations per layer and branch
SMALL, LARGE, CLIP = (1, 8, 8), (1, 24, 24), (4, 6, 6)  # 64, 576 and 144 tokens
TASKS = ("generate", "edit")
PROMPT = "a red fox on a stone"


def branches(task: str, grid: tuple[int, int, int], text: str = PROMPT) -> list[stages.Branch]:
    """Both branches of a request, behind one reference of the target's size where it is an edit."""
    t, h, w = grid
    request = stages.Request("generate", text)
    if task == "edit":
        seen = stages.Semantic(torch.zeros(t * h * w, lance().config.text.hidden_size), (t, 2 * h, 2 * w), "image")
        request = stages.Request("edit", text, (seen,), (torch.zeros(1, 48, *grid),))
    return stages.branches(lance(), request, stages.sides(lance(), request, grid, guided=True))


def guided_steps(both: list[stages.Branch], count: int) -> Tensor:
    """Guided Euler steps from zero noise."""
    transformer = lance().transformer
    rows = torch.zeros(1, len(both[0].block.position_rows), 48)

    def velocity(x: Tensor, time: Tensor, guided: bool) -> Tensor:
        v, u = (transformer.denoise(x, time.expand(1, 1), branch.block, branch.context) for branch in both)
        return flow.guide(v, u, 4.0)

    return flow.sample(velocity, rows, flow.schedule(count, 3.5), [True] * count)


def one_step(task: str, grid: tuple[int, int, int]) -> Operations:
    """The operations of one guided step, the loop included."""
    with torch.inference_mode():
        both = branches(task, grid)
    return count(lambda: guided_steps(both, 3)) - count(lambda: guided_steps(both, 2))


def layers_of(call) -> list[Operations]:
    return count_per_call(lance().transformer.language_model.model.layers, call)


def computed(operations: list[Operations]) -> set[int]:
    return {each.computed.total() for each in operations}


@pytest.mark.parametrize("task", TASKS)
def test_a_layer_asks_for_at_most_60_operations_per_branch(task):
    with torch.inference_mode():
        both = branches(task, SMALL)
    layers = layers_of(lambda: guided_steps(both, 1))
    assert len(layers) == 2 * lance().config.text.num_hidden_layers
    assert 0 < max(computed(layers)) <= LIMIT


@pytest.mark.parametrize("task", TASKS)
def test_a_step_asks_for_as_many_operations_whatever_the_size(task):
    small = one_step(task, SMALL)
    assert small.computed.total() > 0
    assert one_step(task, LARGE) == one_step(task, CLIP) == small


@pytest.mark.parametrize("task", TASKS)
def test_a_step_never_waits_for_the_host(task):
    assert one_step(task, SMALL).waits == {}


@pytest.mark.parametrize("options", [{}, {"renorm": "channel"}, {"guidance": 1.0}])
def test_painting_adds_no_wait_to_a_step(options):
    def paint(steps: int) -> Operations:
        return count(lambda: stages.generate(lance(), PROMPT, width=64, height=64, steps=steps, **options))

    assert (paint(3) - paint(2)).waits == {}


@pytest.mark.parametrize("task", TASKS)
def test_prefill_asks_for_as_many_operations_whatever_the_length(task):
    short = layers_of(lambda: branches(task, SMALL))
    assert layers_of(lambda: branches(task, LARGE)) == short
    assert layers_of(lambda: branches(task, SMALL, 40 * PROMPT)) == short
    assert max(computed(short)) <= LIMIT


def test_a_written_token_asks_for_as_many_operations_whatever_is_before_it():
    def written(length: int, prompt: str) -> Operations:
        return count(lambda: stages.understand(lance(), None, prompt, max_new_tokens=length))

    short, long = (written(4, prompt) - written(3, prompt) for prompt in (PROMPT, 40 * PROMPT))
    assert long == short
    assert short.computed.total() <= LIMIT * lance().config.text.num_hidden_layers


@pytest.mark.parametrize("tokens, parts", [(1, 1), (MLP_CHUNK, 1), (MLP_CHUNK + 1, 2), (20670, 2)])
def test_an_mlp_takes_tokens_whole_until_they_would_fill_the_memory(tokens, parts):
    transformer = lance().transformer
    streams = tuple(torch.zeros(1, n, transformer.config.hidden_size) for n in (2, tokens))
    rotary = transformer.rotary(torch.zeros(3, 2 + tokens, dtype=torch.long), torch.float32)
    run = Run(streams, *rotary, attend=lambda layer, q, k, v: q)
    seen = count(lambda: transformer.language_model.model.layers[0](0, [run]))
    assert seen.computed["silu"] == 1 + parts  # the other one is that of the boundaries
    assert seen.computed.total() <= LIMIT


def test_counting_tells_operations_views_and_waits_apart():
    x = torch.ones(3, 4)
    seen = count(lambda: (x.transpose(0, 1).reshape(12), x.reshape(12), x.clone().add_(1), x.sum().item(), x[x > 0]))
    assert seen.views == {"transpose": 1, "reshape": 1}
    assert seen.computed == {"reshape": 1, "clone": 1, "add_": 1, "sum": 1, "item": 1, "gt": 1, "index": 1}
    assert seen.waits == {"item": 1, "index": 1}


def test_a_copy_to_the_host_is_a_wait_wherever_it_starts():
    x = torch.ones(3)
    assert count(lambda: x.cpu()).waits.total() == 1
    assert count(lambda: x.to(torch.float64)).waits == {}
