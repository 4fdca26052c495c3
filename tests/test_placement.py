"""Weights that are not where they are used: the same results, bit for bit, within the budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from math import ceil

import pytest
import torch
from goldens import TINY
from hypothesis import given, strategies as st
from torch import Tensor, nn

from lance_core import LanceError, memory, stages
from lance_core.checkpoint import Lance, load_lance
from lance_core.placement import GIB, SLACK, Part, Placement, arrangement, model_parts, spread, weight_bytes
from lance_core.streaming import Piece, Stream
from lance_core.tiny import random_lance

PICTURE = torch.rand(1, 112, 112, 3, generator=torch.Generator().manual_seed(0))
SMALL = dict(width=48, height=32, steps=2)


@cache
def whole() -> Lance:
    """The small checkpoint without a limit."""
    return load_lance(TINY, device="cpu")


@cache
def semantic() -> stages.Semantic:
    return stages.encode_semantic(whole(), PICTURE, resolution=None)


@cache
def latent() -> Tensor:
    return stages.encode_latent(whole(), PICTURE, resolution=None)


def look(lance: Lance) -> Tensor:
    return stages.encode_semantic(lance, PICTURE, resolution=None).embeddings


def encode(lance: Lance) -> Tensor:
    return stages.encode_latent(lance, PICTURE.expand(5, -1, -1, -1), resolution=None)


def paint(lance: Lance) -> Tensor:
    return stages.generate(lance, "a fox", **SMALL)


def paint_clip(lance: Lance) -> Tensor:
    return stages.generate(lance, "it turns", first_frame=latent(), frames=9, steps=2)


def edit(lance: Lance) -> Tensor:
    return stages.edit(lance, semantic(), latent(), "make it blue", steps=2, guidance=2.0)


def decode(lance: Lance) -> Tensor:
    return stages.decode_video(lance, latent().expand(-1, -1, 2, -1, -1))


def answer(lance: Lance) -> str:
    return stages.understand(lance, semantic(), "what is this?", max_new_tokens=6)


def everything(lance: Lance) -> list:
    return [task(lance) for task in TASKS if task is not everything]


TASKS = (look, encode, paint, paint_clip, edit, decode, answer, everything)


@cache
def expected(task):
    return task(whole())


class Watched(Placement):
    """Notes what every use would take at least."""

    def use(self, *names, working=lambda: 0, at_most=None):
        parts = [self.parts[name] for name in ("rest", *names)]
        self.needed = max(getattr(self, "needed", 0), sum(part.least for part in parts) + ceil(SLACK * working()))
        return super().use(*names, working=working)


@cache
def least(task) -> int:
    """The smallest budget with which a task runs."""
    lance = replace(whole(), placement=Watched(whole().placement.parts))
    task(lance)
    return lance.placement.needed


def limited(budget: int) -> Lance:
    """The small checkpoint with so many bytes."""
    return load_lance(TINY, device="cpu", memory=budget / GIB)


def networks(lance: Lance) -> tuple[nn.Module, ...]:
    return lance.transformer, lance.vision, lance.vae


def same(result, other) -> bool:
    if isinstance(result, list):
        return all(map(same, result, other))
    return torch.equal(result, other) if isinstance(result, Tensor) else result == other


def at_home(lance: Lance) -> bool:
    """Whether every tensor that is not on the device is the host's copy, and no hook is left."""
    for part in lance.placement.parts.values():
        for piece in part.pieces:
            if not piece.present and piece.home is not None:
                pairs = zip(piece.tensors, piece.places(piece.home))
                if any(tensor.data_ptr() != place.data_ptr() for tensor, place in pairs):
                    return False
    modules = [module for network in networks(lance) for module in network.modules()]
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_results_are_the_same_with_any_budget(task, share):
    lowest = least(task)
    lance = limited(int(lowest + share * max(0, weight_bytes(*networks(whole())) - lowest)))
    assert same(task(lance), expected(task))
    assert same(task(lance), expected(task)), "a second time"
    assert at_home(lance)


@pytest.mark.parametrize("task", [paint, edit, answer, decode])
def test_a_budget_below_the_least_says_what_is_needed(task):
    lance = limited(least(task) - 1)
    with pytest.raises(LanceError, match="GiB of device memory at least.*choose a smaller size"):
        task(lance)
    assert at_home(lance)


def test_a_budget_that_holds_everything_costs_nothing():
    lance = limited(10 * weight_bytes(*networks(whole())) + 2**30)
    memory = {name: tensor.data_ptr() for name, tensor in lance.transformer.named_parameters()}
    inside = []
    stages.generate(lance, "a fox", **SMALL, on_step=lambda *step: inside.append(at_home(lance)))
    assert all(inside)
    assert memory == {name: tensor.data_ptr() for name, tensor in lance.transformer.named_parameters()}
    assert all(piece.home is None for part in lance.placement.parts.values() for piece in part.pieces)


@pytest.mark.parametrize("task", [paint, edit, answer, decode, look])
def test_what_computes_is_on_the_device_and_within_the_budget(task):
    """On a CPU the host's copies would compute just as well, so look where every tensor is."""
    lance = limited(least(task))
    placement = lance.placement
    rooms, computed = [], set()

    def check(name: str, module: nn.Module, call) -> None:
        homes = [p.home for part in placement.parts.values() for p in part.pieces if p.home is not None]
        spans = [range(home.data_ptr(), home.data_ptr() + home.nbytes) for home in homes]
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert not any(tensor.data_ptr() in span for tensor in own for span in spans), f"{name} computes on the host"
        rooms.append(placement.resident())
        computed.update(map(id, own))

    with placement.use():  # the first thing that brings the small parts
        for network in networks(lance):
            for name, module in network.named_modules():
                if "embed_tokens" not in name:
                    module.register_forward_pre_hook(partial(check, name))
    task(lance)
    assert computed and max(rooms) <= placement.budget


def test_as_many_layers_stay_as_fit_and_the_others_come_in_turn():
    lance = limited(least(paint))
    part = lance.placement.parts["understanding"]
    assert len(part.pieces) == 3
    with lance.placement.use("understanding"):
        assert sum(piece.present for piece in part.pieces) == 3
    tight = Placement(lance.placement.parts, lance.device, 2 * part.largest + lance.placement.parts["rest"].size)
    with tight.use("understanding"):
        assert tight.streams and not any(piece.present for piece in part.pieces)
        assert tight.resident() == tight.budget
    assert not tight.streams and at_home(lance)


@given(count=st.integers(1, 40), chosen=st.integers(0, 40))
def test_layers_that_stay_are_spread_evenly(count, chosen):
    chosen = min(chosen, count)
    places = spread(count, chosen)
    assert len(places) == count and sum(places) == chosen
    runs = [len(run) for run in "".join(".x"[stays] for stays in places).strip("x").split("x")]
    assert not chosen or max(runs) <= -(-(count - chosen) // chosen)


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(sizes, sizes, sizes, st.integers(0, 60_000), st.integers(0, 1000))
def test_an_arrangement_never_takes_more_than_the_budget(first, second, idle, budget, working):
    def pieces(group: list[int]) -> list[Piece]:
        return [Piece([torch.empty(256 * size, dtype=torch.uint8, device="meta")]) for size in group]

    layers = [nn.Identity() for _ in range(12)]
    parts = {"a": Part(pieces(first), layers), "b": Part(pieces(second), layers), "idle": Part(pieces(idle))}
    needed = ceil(SLACK * working) + parts["a"].least + parts["b"].least
    if budget < needed:
        with pytest.raises(LanceError):
            arrangement(parts, ("a", "b"), budget, working)
        return
    places = arrangement(parts, ("a", "b"), budget, working)
    taken = {name: part.taken(places[name]) for name, part in parts.items()}
    assert sum(taken.values()) + SLACK * working <= budget
    if len(set(first)) == 1 and not all(places["a"]):  # the others get no more than what none of the first fits into
        assert taken["b"] - parts["b"].least < parts["a"].largest
    left = budget - ceil(SLACK * working) - sum(taken.values())
    assert all(there or size > left for size, there in zip((256 * size for size in idle), places["idle"]))


def test_a_stop_in_the_middle_leaves_everything_usable():
    lance = limited(least(paint))

    class Stop(Exception):
        pass

    def stop(*call) -> None:
        raise Stop

    for place in (lance.transformer.language_model.model.layers[1].mlp, lance.transformer.llm2vae):
        hook = place.register_forward_hook(stop)
        with pytest.raises(Stop):
            paint(lance)
        hook.remove()
        assert at_home(lance) and not lance.placement.streams
        assert same(paint(lance), expected(paint))


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantised_weights_are_streamed_too(weights):
    full = load_lance(TINY, device="cpu", weights=weights)
    watched = replace(full, placement=Watched(full.placement.parts))
    expected = paint(watched)
    lance = load_lance(TINY, device="cpu", weights=weights, memory=watched.placement.needed / GIB)
    streamed = []
    painted = stages.generate(lance, "a fox", **SMALL, on_step=lambda *step: streamed.append(lance.placement.streams))
    assert all(streamed) and torch.equal(painted, expected)


def test_a_model_loaded_in_inference_mode_can_be_moved():
    with torch.inference_mode():
        lance = limited(least(paint))
    assert torch.equal(paint(lance), expected(paint))


def test_uses_nest():
    """A preview decodes the picture while it is painted."""
    lance = limited(max(least(paint), least(decode)) + least(paint))
    previews = []

    def preview(step: int, steps: int, estimate: Tensor) -> None:
        previews.append(stages.decode_video(lance, estimate))

    assert same(stages.generate(lance, "a fox", **SMALL, on_step=preview), expected(paint))
    assert len(previews) == 2 and at_home(lance)


def test_layers_out_of_order_get_their_weights():
    layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(5)]
    x = torch.randn(2, 4)
    order = [0, 1, 2, 3, 4, 0, 1, 3, 3, 2, 0, 4, 0, 1, 2]
    before = [layers[i](x) for i in order]
    pieces = [Piece(list(layer.parameters()), present=False) for layer in layers]
    stream = Stream(layers, pieces, torch.device("cpu"))
    assert all(torch.equal(layers[i](x), y) for i, y in zip(order, before))
    stream.close()
    assert all(torch.equal(layers[i](x), y) for i, y in zip(order, before))


def test_pieces_hold_whatever_a_module_holds():
    module = nn.Module()
    module.weight = nn.Parameter(torch.randint(-9, 9, (3, 5), dtype=torch.int8), requires_grad=False)
    module.register_buffer("scale", torch.rand(3, 1).to(torch.float8_e4m3fn))
    module.kernel = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), requires_grad=False)
    module.number = nn.Parameter(torch.tensor(3.0, dtype=torch.bfloat16), requires_grad=False)
    tensors = [*module.parameters(), *module.buffers()]
    values = [(tensor.dtype, tensor.shape, tensor.stride(), tensor.float().clone()) for tensor in tensors]
    piece = Piece(tensors)
    for move in (piece.leave, partial(piece.arrive, torch.device("cpu")), piece.leave):
        with torch.inference_mode():
            move()
        for tensor, (dtype, shape, stride, value) in zip(tensors, values):
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (dtype, shape, stride)
            assert torch.equal(tensor.float(), value) and not tensor.is_inference()


def test_every_tensor_belongs_to_one_part():
    parts = model_parts(*networks(whole()))
    found = [id(tensor) for part in parts.values() for piece in part.pieces for tensor in piece.tensors]
    every = [id(tensor) for network in networks(whole()) for tensor in [*network.parameters(), *network.buffers()]]
    assert sorted(found) == sorted(every)
    assert set(parts) == {"rest", "generation", "understanding", "text", "embedding", "vision", "vae"}
    assert parts["rest"].size < parts["generation"].size


@pytest.mark.parametrize("memory", [0, -1, True, "much", float("nan"), float("inf")])
def test_memory_is_a_number_of_gib(memory):
    with pytest.raises(LanceError, match="give a number of GiB above 0, or 'auto'"):
        load_lance(TINY, device="cpu", memory=memory)


def test_a_model_made_by_hand_is_where_it_should_be():
    lance = random_lance()
    assert lance.placement.budget is None
    assert stages.generate(lance, "a", **SMALL).isfinite().all()


def test_a_frame_that_is_too_large_is_decoded_in_tiles():
    latent, vae = torch.randn(1, 48, 1, 40, 40, generator=torch.Generator().manual_seed(0)), whole().vae
    rest = whole().placement.parts["rest"].size + whole().placement.parts["vae"].size
    whole_frame, tiled = (memory.decoding(vae, latent.shape, torch.float32, tile) for tile in (None, 24))
    assert tiled < 0.9 * whole_frame
    lance = limited(rest + ceil(SLACK * tiled) + 2)
    chunks = []
    pixels = stages.decode_video(lance, latent, on_chunk=lambda done, total: chunks.append(total))
    assert chunks[0] > 1
    assert torch.allclose(pixels, stages.decode_video(whole(), latent), atol=1e-5)
