"""What a request needs: estimates beside what is counted in real runs, and the targets at the released size."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from lance_core import LanceError, memory, stages
from lance_core.checkpoint import Lance
from lance_core.config import LanceConfig, TextConfig, VisionConfig
from lance_core.counting import LiveTensors, on_meta, peak
from lance_core.needs import Job, Phase, needs, plan, seen_shape, sequences
from lance_core.placement import GIB, model_parts
from lance_core.quantized import quantize_model
from lance_core.stages import target_grid
from lance_core.tiny import TINY_VISION, random_lance, tokenizer_specification
from lance_core.tokenizer import Tokenizer
from lance_core.train.config import TrainConfig, Training
from lance_core.train.lora import LoraConfig
from lance_core.train.plan import training_needs
from lance_core.transformer import LanceTransformer
from lance_core.vae import VAEConfig, WanVAE
from lance_core.vit import VisionTower


@cache
def released(format: str | None = None) -> Lance:
    """The released model without data."""
    config, empty = LanceConfig(), {"dtype": torch.bfloat16, "device": "meta"}
    transformer = LanceTransformer(config.text, **empty)
    if format:
        quantize_model(transformer, format)
    parts = transformer, VisionTower(config.vision, **empty), WanVAE(VAEConfig(), **empty)
    return Lance(config, *parts, Tokenizer(tokenizer_specification()), torch.device("meta"), torch.bfloat16)


@cache
def small() -> Lance:
    """Wide enough for the model's activations to outweigh whatever else there is."""
    text = TextConfig(640, 256, 1024, 5, 8, 2, mrope_section=(4, 6, 6))
    vision = VisionConfig(**{**vars(TINY_VISION), "out_hidden_size": 256, "hidden_size": 64, "intermediate_size": 128})
    return random_lance(LanceConfig(text, vision), VAEConfig(encoder_width=16, decoder_width=16))


@cache
def phases(job: Job, format: str | None = None) -> tuple[Phase, ...]:
    return tuple(needs(released(format), job))


def most(run) -> int:
    with torch.inference_mode(), LiveTensors("cpu") as count:
        run()
    return count.peak


def test_live_tensors_are_counted_by_storage_and_while_they_live():
    weight = torch.zeros(100, 100, device="meta")

    def run() -> None:
        x = torch.empty(100, 100, device="meta")  # 40,000 bytes
        y = x @ weight  # 40,000 more
        view = y[1:].t()
        del x, y
        z = view * 2  # 39,600 beside y's 40,000
        del view, z

    assert peak(run) == 80_000


def test_composite_operations_are_counted_inside_and_attention_is_not():
    def scores() -> None:
        q = torch.empty(1, 1, 1000, 8, device="meta")
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert peak(scores) == 2 * 1000 * 8 * 4
    linear = nn.Linear(10, 1000, device="meta")
    assert peak(lambda: linear(torch.empty(5, 10, device="meta"))) == 5 * 1010 * 4


def test_a_copy_without_data_has_no_hooks_and_no_compiled_methods():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model.register_forward_hook(lambda *call: pytest.fail("hook ran"))
    model[0].forward = lambda x: pytest.fail("compiled method ran")
    copy = on_meta(model)
    assert copy(torch.empty(2, 3, device="meta")).shape == (2, 3)
    assert all(p.is_meta for p in copy.parameters()) and not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 48, 1, 20, 20), (1, 48, 6, 8, 10)])
@pytest.mark.parametrize("tile", [None, 8])
def test_decoding_needs_what_is_counted_on_a_cpu(shape, tile):
    lance = small()
    latent = torch.randn(shape)
    frames = latent.new_empty(1, 3, 4 * shape[2] - 3, 16 * shape[3], 16 * shape[4]).nbytes
    counted = most(lambda: lance.vae.decode(latent.clone(), tile=tile)) - frames
    assert memory.decoding(lance.vae, shape, torch.float32, tile) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("shape", [(1, 3, 1, 320, 320), (1, 3, 21, 128, 160)])
def test_encoding_needs_what_is_counted_on_a_cpu(shape):
    vae, pixels = small().vae, torch.randn(shape)
    counted = most(lambda: vae.encode(pixels.clone()))
    assert memory.encoding(vae, shape, torch.float32) == pytest.approx(counted, rel=0.1)


def test_looking_needs_what_is_counted_on_a_cpu():
    vision, pixels = small().vision, torch.randn(3, 4, 280, 196)
    counted = most(lambda: vision(pixels.clone()))
    assert memory.looking(vision, pixels.shape, torch.float32) == pytest.approx(counted, rel=0.1)


REQUESTS = {
    "picture": (stages.Request("generate", "a fox in the snow"), (1, 40, 40)),
    "clip": (stages.Request("generate", "a fox in the snow"), (5, 16, 20)),
    "edit": (
        stages.Request(
            "edit",
            "make it blue",
            (stages.Semantic(torch.randn(400, 256), (1, 40, 40), "image"),),
            (torch.randn(1, 48, 1, 32, 32),),
        ),
        (1, 32, 32),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("together", [False, True])
def test_painting_needs_what_is_counted_on_a_cpu(name, together):
    lance, (request, grid) = small(), REQUESTS[name]
    sequences = stages.sides(lance, request, grid, guided=True)
    t, h, w = grid

    def run() -> None:
        both = stages.branches(lance, request, sequences)
        lance.transformer.velocities(torch.randn(1, t * h * w, 48), torch.rand(1, t), both, together=together)

    estimate = memory.painting(lance.transformer, sequences, 1, together, torch.float32)
    assert estimate == pytest.approx(most(run), rel=0.1)


def test_answering_needs_what_is_counted_on_a_cpu():
    lance = small()
    semantic = stages.Semantic(torch.randn(900, 256), (1, 60, 60), "image")
    sequence, _ = stages.question_blocks(lance, [semantic], "what is this?", None)
    counted = most(lambda: stages.understand(lance, semantic, "what is this?", max_new_tokens=40))
    assert memory.answering(lance.transformer, sequence, 40, torch.float32) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("job", [Job("generate", 256, 256), Job("edit", 256, 256, references=1)])
def test_a_few_layers_tell_what_all_need(job, monkeypatch):
    estimated = list(needs(released(), job))
    monkeypatch.setattr(memory, "STEADY_LAYERS", 100)
    counted = list(needs(released(), job))
    assert [phase.working for phase in estimated] == pytest.approx([phase.working for phase in counted], rel=0.02)


def test_a_few_frames_tell_what_all_need(monkeypatch):
    def both() -> tuple[int, int]:
        vae = released().vae
        return (
            memory.decoding(vae, (1, 48, 9, 16, 16), torch.bfloat16),
            memory.encoding(vae, (1, 3, 33, 256, 256), torch.bfloat16),
        )

    estimated = both()
    monkeypatch.setattr(memory, "STEADY_FRAMES", 100)
    assert estimated == pytest.approx(both(), rel=0.02)


IMAGE, EDIT = Job("generate", 768, 768), Job("edit", 768, 768, references=1)
LONG, FROM_IMAGE = Job("generate", 848, 480, 121), Job("generate", 848, 480, 121, references=1)
QUESTION = Job("understand", 768, 768, references=1)
CLIP_EDIT = Job("edit", 848, 480, 121, references=1)


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize(
    ("budget", "job"), [(6.1, IMAGE), (6.1, EDIT), (6.1, QUESTION), (8.0, LONG), (8.0, FROM_IMAGE)]
)
def test_small_cards_hold_every_phase(budget, job, format):
    lance = released(format)
    parts = model_parts(lance.transformer, lance.vision, lance.vae, present=False)
    for phase in phases(job, format):
        assert plan(parts, phase, int(budget * GIB)).peak <= budget * GIB, phase.name


@pytest.mark.parametrize(("budget", "job"), [(11.5, IMAGE), (13.0, LONG)])
def test_bfloat16_is_whole_on_larger_cards(budget, job):
    """Of 121 frames a few layers pass, for the plan leaves some room for what an allocator rounds."""
    lance = released()
    parts = model_parts(lance.transformer, lance.vision, lance.vae, present=False)
    for phase in phases(job):
        found = plan(parts, phase, int(budget * GIB))
        assert found.peak <= budget * GIB and found.streamed <= 0.6 * GIB, phase.name


def test_activations_do_not_grow():
    """Guards against a layer or a stage that holds more than it did."""
    worst = {phase.name: phase.working / GIB for phase in phases(FROM_IMAGE)}
    assert worst["paint"] <= 2.6 and worst["decode"] <= 2.1 and worst["encode"] <= 0.25


def test_a_budget_below_the_least_is_refused():
    lance = released()
    parts = model_parts(lance.transformer, lance.vision, lance.vae, present=False)
    with pytest.raises(LanceError, match="at least .* and 2 GiB may be used"):
        for phase in phases(LONG):
            plan(parts, phase, 2 * GIB)


@pytest.mark.parametrize("shape", [(3, 2, 672, 672), (3, 50, 476, 840)])
def test_a_rough_figure_for_looking_is_enough(shape):
    lance = released()
    assert memory.looking(lance.vision, shape, lance.dtype) < memory.roughly_looking(lance.vision, shape, lance.dtype)


@pytest.mark.parametrize(("t", "h", "w"), [(1, 16, 16), (1, 48, 48), (13, 30, 53)])
def test_a_rough_figure_for_coding_is_enough(t, h, w):
    vae, dtype = released().vae, released().dtype
    pixels = 1, 3, 4 * (t - 1) + 1, 16 * h, 16 * w
    most = max(memory.encoding(vae, pixels, dtype), memory.decoding(vae, (1, 48, t, h, w), dtype))
    assert most < memory.roughly_coding(vae, pixels, dtype)


@pytest.mark.parametrize("job", [IMAGE, EDIT, LONG, CLIP_EDIT])
def test_a_rough_figure_for_painting_is_enough(job):
    lance, (paint,) = released(), [phase for phase in phases(job) if phase.name == "paint"]
    target = target_grid(job.width, job.height, job.frames)
    both = sequences(lance, job, seen_shape(lance, job) if job.references else None, target)
    (noise,) = both[0].find("noise")
    tokens = noise.end - noise.start
    context = len(both[0].ids) - tokens
    assert paint.working < memory.roughly_running(lance.transformer, tokens, context, lance.dtype, 2)


def test_a_rough_figure_for_answering_is_enough():
    (answer,) = [phase for phase in phases(QUESTION) if phase.name == "answer"]
    lance = released()
    tokens = answer.context // lance.transformer.context_memory(1, lance.dtype)
    assert answer.working < memory.roughly_running(lance.transformer, 1, tokens, lance.dtype)


@pytest.mark.parametrize(("format", "most"), [(None, 24), ("nf4", 12)])
def test_a_lora_of_the_released_size_can_be_trained_on_a_card(format, most):
    """Of so many GiB, one of them for the system and CUDA; the table of docs/lora.md is `table` of this."""
    training = Training(method="lora", checkpointing=True)
    config = TrainConfig(Path("run"), train=training, lora=LoraConfig())
    assert training_needs(config, released.__wrapped__(format)).total <= (most - 1) * GIB


def test_the_edit_of_a_long_clip_fits_a_card_of_8_gib():
    """7 GiB of it, for the system and CUDA take some."""
    lance = released()
    parts = model_parts(lance.transformer, lance.vision, lance.vae, present=False)
    for phase in phases(CLIP_EDIT):
        assert plan(parts, phase, 7 * GIB).peak <= 7 * GIB, phase.name
