"""The ways through the decoder that must not change a result: branches together, chunks, one reading, compiled."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from parity import lance
from torch import Tensor

from lance_core import LanceError, stages, text, tiny, transformer
from lance_core.config import LanceConfig
from lance_core.sequence import build, context_blocks
from lance_core.transformer import DecodeCache

GRID = (1, 8, 8)
PROMPT = "a red fox on a stone"
SEEN = stages.Semantic(torch.linspace(-1, 1, 16 * 64).view(16, 64), (1, 8, 8), "image")
CLOSE = 2e-6


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def edit_request() -> stages.Request:
    return stages.Request("edit", PROMPT, (SEEN,), (drawn(1, 48, *GRID),))


def both_branches(request: stages.Request) -> list[stages.Branch]:
    return stages.branches(lance(), request, stages.sides(lance(), request, GRID, guided=True))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_branches_give_the_same_together_in_turn_and_alone(batch):
    both = both_branches(edit_request())
    x, t = drawn(batch, 64, 48), torch.full((1, 1), 0.7)
    alone = [lance().transformer.denoise(x, t, branch.block, branch.context) for branch in both]
    assert error(alone[1], alone[0]) > 1e-4  # or the branches would prove nothing
    for together in (True, False):
        for one, other in zip(lance().transformer.velocities(x, t, both, together=together), alone):
            assert one.shape == other.shape and error(one, other) < CLOSE


@pytest.mark.parametrize("together", [True, False])
@torch.no_grad()
def test_every_layer_is_called_once_a_step_for_all_branches(together):
    both, calls = both_branches(edit_request()), []
    layers = lance().transformer.language_model.model.layers
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    try:
        lance().transformer.velocities(drawn(1, 64, 48), torch.ones(1, 1), both, together=together)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == len(layers)


@pytest.mark.parametrize("chunk", [1, 7, 64, 65])
@torch.no_grad()
def test_chunks_change_nothing(monkeypatch, chunk):
    x = drawn(2, 48, *GRID)
    whole = stages.generate(lance(), PROMPT, width=128, height=128, steps=2, noise=x)
    monkeypatch.setattr(transformer, "MLP_CHUNK", chunk)
    assert error(stages.generate(lance(), PROMPT, width=128, height=128, steps=2, noise=x), whole) < CLOSE


def test_questions_share_the_reading_of_a_picture():
    counted = []
    reading = stages.read(lance(), SEEN)
    original = transformer.LanceTransformer.embed_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformer.LanceTransformer,
            "embed_text",
            lambda self, ids, dtype: counted.append(len(ids)) or original(self, ids, dtype),
        )
        for question in ("What is it?", "Is it red? Or is it blue?"):
            counted.clear()
            shared = stages.understand(lance(), reading, question, max_new_tokens=12)
            assert counted[0] == len(context_of(question)[-1].ids) - 1  # the words, and nothing before them
            assert shared == stages.understand(lance(), SEEN, question, max_new_tokens=12)


def context_of(question: str) -> list:
    sequence = build(lance().tokenizer, "understand", "image", question, semantics=[SEEN.tokens])
    return context_blocks(sequence, [SEEN.embeddings], [])


def test_a_reading_keeps_its_system_prompt():
    reading = stages.read(lance(), [SEEN, SEEN], system="Answer in French.")
    whole = stages.understand(lance(), [SEEN, SEEN], "Why?", system="Answer in French.", max_new_tokens=8)
    assert stages.understand(lance(), reading, "Why?", max_new_tokens=8) == whole
    with pytest.raises(LanceError, match="system prompt is another"):
        stages.understand(lance(), reading, "Why?", system="Answer in German.")


def test_a_reading_belongs_to_the_model_that_made_it():
    reading = stages.read(replace(lance(), transformer=copy.deepcopy(lance().transformer)), SEEN)
    with pytest.raises(LanceError, match="the reading is another model's"):
        stages.understand(lance(), reading, "Why?")


@torch.no_grad()
def test_long_contexts_are_read_block_by_block(monkeypatch):
    blocks = [*context_of("What is it?")]
    whole = lance().transformer.prefill(blocks)
    monkeypatch.setattr(transformer, "MLP_CHUNK", 8)
    parts = lance().transformer.prefill(blocks)
    assert parts.length == whole.length and len(parts.layers[0]) == len(blocks)
    for own, other in zip(parts.layers, whole.layers):
        for piece, pair in zip(transformer.joined(own), transformer.joined(other)):
            assert error(piece, pair) < CLOSE


def test_reading_nothing_is_refused():
    with pytest.raises(LanceError, match="nothing to read"):
        stages.read(lance(), None)


@torch.no_grad()
def test_a_decoder_of_fixed_shapes_gives_the_same_logits():
    """What a CUDA graph records: the place in the cache is a tensor, and attention sees a mask instead of less."""
    model = lance().transformer
    context = model.prefill(context_of("What is it?"))
    growing, fixed = DecodeCache(context, 6), DecodeCache(context, 6)
    start = context.length
    cos, sin = model.rotary(torch.arange(start, start + 6).expand(3, -1), torch.float32)
    token = torch.tensor([5])
    for i in range(6):
        expected = model.decode(token, cos[i : i + 1], sin[i : i + 1], growing)
        found = model.decode(token, cos[i : i + 1], sin[i : i + 1], fixed, torch.tensor([start + i]))
        assert error(found, expected) < CLOSE
        token = expected.argmax(keepdim=True)
    assert fixed.length == start  # for its shapes stay as they are


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on the CPU"
)


@needs_compiler
def test_compiled_layers_give_the_same_for_every_size_without_compiling_each_again():
    text_config = replace(tiny.TINY_TEXT, num_hidden_layers=12)  # more than torch compiles for one function
    model = tiny.random_lance(LanceConfig(text_config, replace(tiny.TINY_VISION)))
    sizes = [(64, 64), (96, 128), (160, 64), (128, 128), (192, 96)]

    def everything() -> list[Tensor]:
        pictures = [stages.generate(model, PROMPT, width=w, height=h, steps=2, seed=1) for w, h in sizes]
        two = stages.generate(model, PROMPT, width=64, height=64, steps=2, seed=[1, 2])
        clip = stages.generate(model, PROMPT, width=64, height=64, frames=9, steps=2, seed=1)
        seen = replace(SEEN, embeddings=SEEN.embeddings.repeat(1, 2))
        edited = stages.edit(model, seen, drawn(1, 48, 1, 8, 8), PROMPT, steps=2, seed=1)
        return [*pictures, two, clip, edited]

    eager = everything()
    answer = stages.understand(model, None, "Why?", max_new_tokens=8)
    torch._dynamo.reset()
    model.transformer.compile_layers(model.device)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for found, expected in zip(everything(), eager):
            assert error(found, expected) < 1e-5
        assert stages.understand(model, None, "Why?", max_new_tokens=8) == answer


def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    with pytest.raises(LanceError, match=r"^compiling needs a C\+\+ compiler, [^\n]*\.$"):
        lance().transformer.compile_layers(torch.device("cpu"))
    assert not lance().transformer.compiled
    assert text.partial_text(lance().tokenizer, [5])  # and the model goes on working
