"""A packed batch computes what inference computes, and no example sees another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lance_core.errors import LanceError
from lance_core.sequence import build, context_blocks, unconditional, visual_first
from lance_core.text import tokens
from lance_core.tiny import random_lance
from lance_core.train.examples import Example
from lance_core.train.objective import Objective, Trainee
from lance_core.train.packing import Batch, pack, tokens_of
from lance_core.transformer import latent_position_ids, latent_position_rows
from lance_core.vit import normalize_pixels

PLAIN = Objective(text_dropout=0.0, reference_dropout=0.0)


@pytest.fixture(scope="module")
def lance():
    return random_lance()


def latent(seed: int, *grid: int) -> torch.Tensor:
    return torch.randn(48, *grid, generator=torch.Generator().manual_seed(seed))


def pixels(seed: int, frames: int = 1, height: int = 56, width: int = 56) -> torch.Tensor:
    return normalize_pixels(torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed)))


EXAMPLES = (
    Example("generate", "a red circle", target=latent(0, 1, 4, 3)),
    Example("edit", "make it blue", pixels=(pixels(1),), latents=(latent(1, 1, 4, 4),), target=latent(2, 1, 4, 4)),
    Example(
        "edit",
        "join them",
        pixels=(pixels(2), pixels(3, 1, 84, 56)),
        latents=(latent(3, 1, 2, 4), latent(4, 1, 2, 2)),
        target=latent(5, 1, 2, 2),
    ),
    Example("idip", "the same, in snow", pixels=(pixels(4),), latents=(latent(6, 1, 2, 2),), target=latent(7, 1, 4, 2)),
    Example("understand", "what colour?", answer="red", pixels=(pixels(5, 1, 84, 84),)),
    Example("understand", "what moves in it?", answer="a circle", kind="video", pixels=(pixels(6, 5),)),
    Example("understand", "hello", answer="yes"),
    Example("generate", "a clip", target=latent(8, 3, 2, 4), first_frame=True),
)


def packed(lance, examples, objective=PLAIN, seed=0) -> Batch:
    return pack(examples, lance.tokenizer, lance.config, objective, torch.Generator().manual_seed(seed))


def context_of(lance, example: Example, without_words: bool = False):
    """The context and the noise block with which inference would paint an example."""
    transformer = lance.transformer
    semantics = [lance.vision(x) for x in example.pixels]
    grids = [lance.vision.grid(x) for x in example.pixels]
    sequence = build(
        lance.tokenizer,
        example.task,
        "image" if example.target.shape[1] == 1 else "video",
        example.text,
        semantics=[(t, h // 2, w // 2) for t, h, w in grids],
        latents=[tuple(x.shape[1:]) for x in example.latents],
        target=tuple(example.target.shape[1:]),
        tokens_per_second=lance.config.text.tokens_per_second,
    )
    if without_words:
        sequence = unconditional(sequence, lance.config.text.tokens_per_second)
    context = transformer.prefill(context_blocks(sequence, semantics, example.latents))
    (noise,) = sequence.find("noise")
    rows = latent_position_rows(latent_position_ids(*noise.grid), transformer.config.hidden_size, torch.float32)
    return context, transformer.noise_block(*visual_first(sequence, noise), rows)


def velocities(lance, batch: Batch) -> torch.Tensor:
    transformer = lance.transformer
    _, gen = Trainee(transformer, lance.vision, PLAIN).hidden(batch)
    return transformer.llm2vae(transformer.language_model.model.norm_moe_gen(gen[0]))


def blocks_of(batch: Batch) -> list[torch.Tensor]:
    """Rows of every block of one time."""
    return [torch.nonzero(batch.time_index == i)[:, 0] for i in range(len(batch.times))]


@torch.no_grad()
@pytest.mark.parametrize("without_words", (False, True), ids=("with words", "without"))
def test_velocities_are_those_of_inference(lance, without_words):
    batch = packed(lance, EXAMPLES, replace(PLAIN, text_dropout=float(without_words)))
    found, blocks = velocities(lance, batch), blocks_of(batch)
    number = 0
    for example in EXAMPLES:
        if example.target is None:
            continue
        number += len(example.latents)
        own = blocks[number : number + (example.target.shape[1] if example.first_frame else 1)]
        number += len(own)
        times = batch.times[number - len(own) : number]
        context, block = context_of(lance, example, without_words)
        rows = torch.cat(own)
        expected = lance.transformer.denoise(batch.rows[rows][None], times[None], block, context)[0]
        torch.testing.assert_close(found[rows], expected, atol=2e-5, rtol=1e-4)
    assert number == len(blocks)


@torch.no_grad()
def test_answers_are_scored_as_they_are_written(lance):
    """What the model writes greedily has the least cross-entropy of each of its tokens."""
    seen, question = pixels(9, 1, 84, 84), "what colour?"
    sequence = build(lance.tokenizer, "understand", "image", question, semantics=[(1, 3, 3)])
    *before, last = context_blocks(sequence, [lance.vision(seen)], [])
    context = lance.transformer.prefill([*before, last.without_last()])
    position = int(sequence.positions[0, -1])
    written = tokens(lance.transformer, context, last.ids[-1:], position, lambda logits: logits.argmax(), 1)
    first = int(next(iter(written)))
    batch = packed(lance, [Example("understand", question, answer="anything at all", pixels=(seen,))])
    und, _ = Trainee(lance.transformer, lance.vision, PLAIN).hidden(batch)
    model = lance.transformer.language_model
    logits = model.lm_head(model.model.norm(und[0, batch.answer_index]))
    assert int(logits[0].argmax()) == first
    assert batch.answers.tolist() == [
        *lance.tokenizer.encode("anything at all"),
        lance.tokenizer.special("<|im_end|>"),
    ]


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(len(EXAMPLES))), taken=st.integers(2, len(EXAMPLES)))
def test_no_example_sees_another(lance, order, taken):
    """Losses are means over tokens, so those of a batch follow from those of its examples alone."""
    examples = [EXAMPLES[i] for i in order[:taken]]
    together = packed(lance, examples)
    assert sum(len(group.index) for group in together.groups) == taken
    trainee = Trainee(lance.transformer, lance.vision, PLAIN)
    und, gen = trainee.hidden(together)
    before_ids = before_rows = 0
    for example in examples:
        alone = packed(lance, [example])
        ids, rows = len(alone.ids), len(alone.rows)
        torch.testing.assert_close(together.ids[before_ids : before_ids + ids], alone.ids)
        if example.target is None:  # latents have other noise in another batch, texts are the same
            own = trainee.hidden(alone)[0]
            torch.testing.assert_close(und[:, before_ids : before_ids + ids], own[:, :ids], atol=2e-5, rtol=1e-4)
        before_ids, before_rows = before_ids + ids, before_rows + rows
    assert (gen is None) == (before_rows == 0)


@torch.no_grad()
def test_draws_share_their_context_and_do_not_see_each_other(lance):
    example = EXAMPLES[1]
    batch = packed(lance, [example], replace(PLAIN, draws=3))
    source, *draws = blocks_of(batch)
    assert len(draws) == 3 and len(set(batch.times.tolist())) == 4
    assert len(batch.ids) == len(packed(lance, [example]).ids) + 2 * 2
    context, block = context_of(lance, example)
    found = velocities(lance, batch)
    for rows, time in zip(draws, batch.times[1:]):
        expected = lance.transformer.denoise(batch.rows[rows][None], time[None, None], block, context)[0]
        torch.testing.assert_close(found[rows], expected, atol=2e-5, rtol=1e-4)
        noise = batch.rows[rows] - (1 - time) * example.target.flatten(1).T
        assert 0.8 < (noise / time).std() < 1.2


@torch.no_grad()
def test_questions_about_one_picture_are_scored_as_if_alone(lance):
    pairs = [("what colour?", "red"), ("where is it, and how many?", "top left"), ("big?", "no")]
    (first, answer), *others = pairs
    together = Example("understand", first, answer=answer, pixels=(pixels(5, 1, 84, 84),), others=tuple(others))
    alone = [replace(together, text=text, answer=answer, others=()) for text, answer in pairs]
    trainee = Trainee(lance.transformer, lance.vision, PLAIN)

    def written(batch: Batch) -> torch.Tensor:
        return trainee.hidden(batch)[0][0, batch.answer_index]

    batch, apart = packed(lance, [together]), packed(lance, alone)
    assert len(batch.seen[0][0]) == 2 and len(apart.seen[0][0]) == 6
    assert batch.answers.tolist() == apart.answers.tolist()
    torch.testing.assert_close(written(batch), written(apart), atol=2e-5, rtol=1e-4)
    assert tokens_of(together) < sum(map(tokens_of, alone))


def test_the_velocity_is_from_data_to_noise(lance):
    example = EXAMPLES[0]
    batch = packed(lance, [example])
    t, clean = batch.times[0], example.target.flatten(1).T
    torch.testing.assert_close(batch.rows - t * batch.targets, clean, atol=1e-5, rtol=1e-5)
    assert 0 < t < 1


def test_a_given_first_frame_is_clean_and_not_learned(lance):
    example = EXAMPLES[-1]
    batch = packed(lance, [example])
    frame = 2 * 4
    torch.testing.assert_close(batch.rows[:frame], example.target[:, 0].flatten(1).T)
    assert batch.times[0] == 0 and batch.times[1] == batch.times[2] > 0
    assert batch.target_index.tolist() == list(range(frame, 3 * frame))


@pytest.mark.parametrize(
    "dropped, seen, rows",
    [
        (("vit",), 0, 32),
        (("vae",), 1, 16),
        (("reference",), 0, 16),
        (("vit", "vae"), 0, 16),
        (("text", "reference"), 0, 16),
    ],
)
def test_conditions_are_dropped(lance, dropped, seen, rows):
    batch = packed(lance, [EXAMPLES[1]], replace(PLAIN, **{f"{name}_dropout": 1.0 for name in dropped}))
    assert (len(batch.seen), len(batch.rows)) == (seen, rows)


def test_what_is_asked_about_is_never_dropped(lance):
    batch = packed(lance, [EXAMPLES[4]], replace(PLAIN, text_dropout=1.0, reference_dropout=1.0, vit_dropout=1.0))
    assert len(batch.seen) == 1 and torch.equal(batch.ids, packed(lance, [EXAMPLES[4]]).ids)


def test_each_reference_is_dropped_by_itself_and_with_both_of_its_blocks(lance):
    """Of two references of different sizes either may be missing, and an edit without them stands as if it had none."""
    kept = set()
    for seed in range(40):
        batch = packed(lance, [EXAMPLES[2]], replace(PLAIN, reference_dropout=0.5), seed)
        seen, latents = {tuple(x.shape[2:]) for x in batch.seen}, len(batch.rows) - EXAMPLES[2].target[0].numel()
        assert latents == 8 * ((56, 56) in seen) + 4 * ((84, 56) in seen)
        kept.add(latents)
    assert kept == {0, 4, 8, 12}
    without = packed(lance, [replace(EXAMPLES[2], pixels=(), latents=())])
    dropped = packed(lance, [EXAMPLES[2]], replace(PLAIN, reference_dropout=1.0))
    assert torch.equal(dropped.ids, without.ids) and torch.equal(dropped.positions, without.positions)


def test_words_are_dropped_as_often_as_asked(lance):
    examples = [EXAMPLES[0]] * 400
    lengths = [len(packed(lance, [EXAMPLES[0]], replace(PLAIN, text_dropout=p)).ids) for p in (0.0, 1.0)]
    batch = packed(lance, examples, replace(PLAIN, text_dropout=0.25))
    share = (400 * lengths[0] - len(batch.ids)) / (400 * (lengths[0] - lengths[1]))
    assert 0.15 < share < 0.35


def test_times_are_logit_normal_and_shifted():
    objective = Objective(timestep_mean=0.2, timestep_std=0.7, timestep_shift=3.0)
    t = objective.times(20000, torch.Generator().manual_seed(0))
    unshifted = torch.logit(t / (3.0 - 2.0 * t))
    assert abs(unshifted.mean() - 0.2) < 0.02 and abs(unshifted.std() - 0.7) < 0.02


@torch.no_grad()
def test_answers_compete_with_words_of_the_tokenizer_alone(lance):
    """Rows behind them are never written (`stages.understand` leaves them out too): what they say does not matter."""
    words = len(lance.tokenizer) - 5  # the tokenizer of this model has as many as its vocabulary
    batch = packed(lance, [EXAMPLES[4]])
    head = lance.transformer.language_model.lm_head.weight
    trainee = Trainee(lance.transformer, lance.vision, PLAIN, words)
    before, kept = trainee(batch)["ce"], head[words:].clone()
    head[words:] *= 100
    try:
        assert torch.equal(trainee(batch)["ce"], before)
        assert Trainee(lance.transformer, lance.vision, PLAIN)(batch)["ce"] > before
    finally:
        head[words:] = kept


def test_gradients_reach_everything_that_was_used(lance):
    trainee = Trainee(lance.transformer, lance.vision, PLAIN).requires_grad_(True)
    try:
        trainee(packed(lance, EXAMPLES))["loss"].backward()
        without = {name for name, weight in trainee.named_parameters() if weight.grad is None}
        assert without == set(), without
    finally:
        trainee.requires_grad_(False)
        for weight in trainee.parameters():
            weight.grad = None


def test_an_example_without_a_result_is_named(lance):
    with pytest.raises(LanceError, match="a red circle.*answer or a target"):
        packed(lance, [Example("generate", "a red circle")])


def test_tokens_of_media_are_counted_exactly(lance):
    for example in EXAMPLES:
        batch = packed(lance, [example])
        words = replace(example, pixels=(), latents=(), target=None)
        assert tokens_of(example) - tokens_of(words) == len(batch.seen_order) + len(batch.rows)
