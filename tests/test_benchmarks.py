"""Every benchmark runs, with tiny sizes on a CPU, and prints its table; what it counts is what the code does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from agreement import NAMES, against_recordings, result, streamed
from goldens import golden, relative_error
from limits import products
from measuring import markdown, table
from nano import MEASUREMENTS, TARGETS, ablations
from parity import lance, requests
from released import TASKS, Form, official_steps, pass_flops, random_model, sampling_flops
from shortcuts import columns

from lance_core.config import LanceConfig, Resolution, Resolutions, TextConfig
from lance_core.flow import Sampling
from lance_core.quantized import FORMATS, QuantizedLinear
from lance_core.tiny import TINY_TEXT, TINY_VISION, random_lance
from lance_core.transformer import Block, Branch, LanceTransformer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
GPU = ("gpu.py", "--device=cpu", "--tiny", "--steps=3", "--repeats=1")
TEXT = 120  # tokens of template, system prompt and an ordinary caption; without the caption a little less
PETAFLOP = {"image": 0.81, "edit": 0.92, "clip": 13.5, "long": 55.5}  # of 30 steps, 56 passes


def printed(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the printed table by the row's name: two spaces or more stand between cells."""
    split = (line.split("  ") for line in text.splitlines())
    return {first.strip(): [cell.strip() for cell in cells if cell.strip()] for first, *cells in split}


def test_cpu_prints_every_figure_of_a_size():
    found = rows(printed("cpu.py", "--size=tiny", "--forms", "fp32", "bf16", "--repeats=1", "--threads=1"))
    for name in (
        "text to image: guided step, ms",
        "image edit: prefill of both branches, ms",
        "decode, tokens/s",
        "VAE decode of 256x256, ms",
        "share of their rate that a guided step reaches, %",
        "peak memory, GB",
    ):
        assert len(found[name]) == 2 and all(float(cell) > 0 for cell in found[name])
    for task in ("text to image", "image edit"):
        assert found[f"{task}: waits for the host per guided step"] == ["0", "0"]


def test_branches_prints_both_ways():
    found = rows(printed("branches.py", "--sizes=tiny", "--repeats=1", "--threads=1"))
    assert len(found["together, ms"]) == len(found["in turn, ms"]) == 5


def test_gpu_prints_times_limits_and_memory_of_every_task():
    found = json.loads(printed(*GPU, "--json", "--tasks", "edit", "question", "--weights=int8"))
    times, *memory = found.values()
    edit, question = times.values()
    assert edit["whole request, s"] > edit["sampling, 26 guided and 4 plain steps, s"] > 0
    assert edit["sampling / that"] > 0 and question["tokens/s"] > 0
    assert [list(phases) for phases in memory] == [["look", "encode", "sample", "decode"], ["look", "answer"]]
    assert all(phase["estimated"] > 0 and phase["host"] > 0 for phases in memory for phase in phases.values())


def test_gpu_says_what_completes_on_a_small_card():
    found = rows(printed(*GPU, "--tasks", "image", "--fraction-gib", "8"))
    assert found["text to image 64x64"] == ["completed, not limited"]


def test_gpu_says_where_a_budget_is_too_small():
    found = rows(printed(*GPU, "--tasks", "image", "--fraction-gib", "8", "--memory", "0.0001"))
    assert found["text to image 64x64"][0].startswith("refused: ")


def test_nano_prints_what_is_found_beside_what_is_wanted():
    found = printed("nano.py", "--count=2", "--steps=1", "--only", "generation", "reconstruction")
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in found.splitlines()}
    share, count, target = cells["shape, colour and position"]
    assert "% (" in share and (count, target) == ("2", "90 %")
    assert float(cells["pictures, dB"][0].split()[0]) > 0 and cells["pictures, dB"][2] == "32"


def test_every_target_has_its_measurement_and_every_ablation_changes_one_setting():
    assert set(TARGETS) <= set(MEASUREMENTS)
    official, *others = ablations().values()
    assert len(others) == 12
    assert all(sum(other[name] != official[name] for name in official) == 1 for other in others)


def test_every_shortcut_has_its_share_of_what_is_right():
    small = Resolution(64, 56)
    own = random_lance(LanceConfig(TINY_TEXT, TINY_VISION, Resolutions(small, small)))
    options = {"width": 64, "height": 64, "frames": 1, "steps": 1, "seed": 0}
    found = columns(own, options, repeats=1, count=1)
    assert set(found["pictures right"]) == set(found["edits right"]) == set(found["passes"])
    assert found["edits right"]["exact"].count == 1
    assert "edits right" not in columns(own, options, repeats=1, count=0)


@pytest.mark.parametrize("script", ["nano.py", "quality.py", "shortcuts.py"])
def test_a_wrong_path_is_told_in_one_sentence(script):
    command = [sys.executable, str(BENCHMARKS / script), "--checkpoint=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: /nowhere does not exist") and done.stderr.count("\n") == 1


def test_results_are_compared_with_the_recordings_and_streamed_ones_with_resident_ones():
    request, recorded = requests()[NAMES[0]], golden(5)[f"{NAMES[0]}.steps4.final_latent"]
    found = against_recordings(request, recorded, torch.device("cpu"))
    assert found["float32 here"] < 1e-5 < found["bf16 here"] < 0.1
    assert relative_error(streamed(request, lance()), result(request, lance())) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_are_in_the_form_that_was_asked_for(format):
    lance = random_model(Form(torch.device("cpu"), torch.bfloat16, format, tiny=True))
    layer = lance.transformer.language_model.model.layers[1]
    assert isinstance(layer.mlp_moe_gen.up_proj, QuantizedLinear) and layer.mlp.up_proj.format == format
    weight = layer.self_attn.q_proj.dequantized(torch.float32)
    assert 0.015 < float(weight.std()) < 0.025 and torch.equal(layer.input_layernorm.weight.float(), torch.ones(128))
    networks = (lance.transformer, lance.vision, lance.vae)
    assert not any(p.is_meta or not p.any() for network in networks for p in network.parameters())


def counted_flops(config: TextConfig, tokens: int, context: int) -> int:
    """Of one pass without data, with a context of so many tokens."""
    transformer = LanceTransformer(config, dtype=torch.bfloat16, device="meta")

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    def real(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    with torch.inference_mode():
        before = transformer.prefill([Block(ids(context), ids(3, context), causal=True)])
        block = transformer.noise_block(ids(2), ids(3, 2 + tokens), real(tokens, config.hidden_size))
        with FlopCounterMode(display=False) as counter:
            transformer.velocities(real(1, tokens, 48), real(1, 1), [Branch(before, block)])
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PETAFLOP)
def test_a_request_of_the_released_size_costs_what_is_written(name):
    """Nothing but the products of the layers costs, and these as often as 30 steps make 56 passes."""
    task = TASKS[name]
    context = 2980 if task.kind == "edit" else TEXT
    assert official_steps() == (26, 4)
    counted = counted_flops(TextConfig(), task.tokens, context)
    assert counted == pytest.approx(pass_flops(TextConfig(), task.tokens, context), rel=0.02)
    whole = sampling_flops(TextConfig(), task.tokens, (context, context), Sampling())
    assert whole == pytest.approx(56 * counted, rel=0.02)
    assert whole / 1e15 == pytest.approx(PETAFLOP[name], rel=0.02)


def test_products_are_those_of_the_call_behind_its_beginning():
    x, first, second = torch.ones(5, 8), torch.ones(4, 8), torch.ones(6, 4)

    def call() -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, first), second)

    whole = products(call)
    assert (whole.flops, whole.read, len(whole.calls)) == (2 * 5 * 4 * 8 + 2 * 5 * 6 * 4, 4 * (4 * 8 + 6 * 4), 2)
    rest = products(call, after=lambda: torch.nn.functional.linear(x, first))
    assert rest.flops == 2 * 5 * 6 * 4
    with torch.inference_mode():
        assert torch.equal(rest.calls[0](), call())


def test_a_table_has_a_row_for_every_figure_of_any_column():
    assert rows(table({"x": {"a": 1.0, "b": 2}, "y": {"b": "word", "c": 0.123456}})) == {
        "": ["x", "y"],
        "a": ["1", "-"],
        "b": ["2", "word"],
        "c": ["-", "0.1235"],
    }


def test_a_table_in_markdown_has_a_cell_for_every_column_of_any_row():
    assert markdown("title", {"x": {"a": 1.5, "b": "word"}, "y": {"b": 2}}).splitlines() == [
        "| title | a | b |",
        "| --- | --- | --- |",
        "| x | 1.5 | word |",
        "| y |  | 2 |",
    ]
