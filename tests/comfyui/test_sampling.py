"""Lance on core's samplers, in ComfyUI's own interpreter: measured by `sampling_inside.py`."""

from __future__ import annotations

import json
import subprocess

import pytest

from .conftest import ROOT
from .server import find_python
from .test_server import assert_sentence

SAME = 1e-5  # relative L2: the same latent by another way
SUBTLE = 2e-4  # core's table of 1,000 times instead of ours
EFFECT = 1e-3  # what nobody would call the same


@pytest.fixture(scope="module")
def measured(tmp_path_factory, comfyui, tiny_checkpoint):
    results = tmp_path_factory.mktemp("measured") / "results.json"
    script = ROOT / "tests/comfyui/sampling_inside.py"
    command = [find_python(comfyui), script, comfyui, tiny_checkpoint / "Lance_3B", results]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=comfyui)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())


def test_every_way_gives_the_library_s_latent(measured):
    assert {name: error for name, error in measured["equality"].items() if error > SAME} == {}


def test_every_sampler_and_scheduler_paints(measured):
    assert len(measured["samplers"]) > 40
    assert [name for name, finite in measured["samplers"].items() if not finite] == []


@pytest.mark.parametrize(
    "node", ["ConditioningZeroOut", "ConditioningCombine", "TorchCompileModel", "KSamplerAdvanced in two parts",
             "the model again"]
)  # fmt: skip
def test_a_core_node_changes_nothing(measured, node):
    assert measured["core_nodes"][node] <= SAME


@pytest.mark.parametrize(
    "node",
    ["negative prompt", "cfg 1", "ModelSamplingSD3 8", "ModelSamplingFlux", "EasyCache", "LazyCache",
     "ModelComputeDtype bf16", "upscaled, denoise 0.5"],
)  # fmt: skip
def test_a_core_node_has_an_effect(measured, node):
    assert EFFECT < measured["core_nodes"][node] < 2


@pytest.mark.parametrize("node", ["ModelSamplingSD3 3.5", "ModelSamplingAuraFlow"])
def test_core_s_own_shift_is_the_official_one(measured, node):
    assert measured["core_nodes"][node] < SUBTLE


@pytest.mark.parametrize("target", ["picture", "clip"])
def test_a_mask_keeps_the_rest_bit_for_bit(measured, target):
    assert measured["masks"][f"{target} kept"] is True
    assert measured["masks"][f"{target} changed"] > EFFECT


def test_a_mask_holds_where_noise_is_handed_on(measured):
    assert measured["masks"]["two parts kept"] is True
    assert measured["masks"]["two parts and one"] <= SAME


def test_a_soft_mask_leaves_no_noise(measured):
    assert {strength: left for strength, left in measured["masks"]["soft"].items() if left > SAME} == {}


def test_a_first_frame_stays_bit_for_bit(measured):
    assert measured["masks"]["first frame kept"] is True


@pytest.mark.parametrize(
    ("change", "prefills"),
    [
        ("first", 3),  # what both branches begin with, and the rest of each
        ("seed", 0),
        ("size", 0),
        ("the short way, same words", 0),
        ("words", 1),  # the positive prompt's, behind the system prompt
        ("edit", 3),
        ("edit, seed", 0),
        ("edit, words", 2),  # the words of both branches, not the picture
        ("LoRA behind the conditioning", 3),
        ("LoRA, seed", 0),
    ],
)
def test_only_what_has_changed_is_prefilled(measured, change, prefills):
    assert measured["caching"]["prefills"][change] == prefills


def test_contexts_are_those_of_one_sampling_and_go_with_the_model(measured):
    assert measured["caching"]["kept"] == 3
    assert measured["caching"]["kept after unloading"] == 0


def test_a_second_question_about_a_picture_reads_its_words_alone(measured):
    questions = measured["questions"]
    tokens = questions["tokens"]
    assert tokens["again"] == questions["words"]
    for changed in ("first", "LoRA", "without LoRA", "another system prompt", "another picture"):
        assert tokens[changed] > questions["picture"] + questions["words"], changed
    assert questions["same answers"] == questions["asked"]


def test_what_was_read_goes_with_the_model(measured):
    assert measured["questions"]["kept"] is True
    assert measured["questions"]["kept after unloading"] is False


def test_a_lora_acts_on_the_words_whatever_stands_first(measured):
    assert measured["caching"]["LoRA's effect on words alone"] > EFFECT


def test_a_lora_as_a_hook_is_the_same_lora(measured):
    assert measured["hooks"]["hook and LoRA"] <= SAME
    assert measured["hooks"]["hook and nothing"] > EFFECT
    assert measured["hooks"]["afterwards"] == 0


def test_hooks_keep_no_more_contexts_than_requests(measured):
    """Two requests, and what each begins with; a hook whose strength changes at every step replaces its own."""
    assert measured["hooks"]["contexts under keyframes"] <= 4
    assert measured["hooks"]["prefills with a hook on one side"] == 4


def test_guidance_is_computed_on_every_second_guided_step(measured):
    assert measured["seldom_guided"]["passes"] == {"exact": 56, "every 2": 43, "cfg 1": 30, "heun": 85}
    assert measured["seldom_guided"]["effect"] > EFFECT


def test_each_context_window_computes_its_own_guidance(measured):
    exact, every_2 = measured["seldom_guided"]["passes in context windows"]
    assert every_2 == exact > 56


def test_what_is_reused_goes_with_its_sampling(measured):
    """Also with a stopped one; and without the setting there is nothing to go."""
    seldom = measured["seldom_guided"]
    assert seldom["made without"] == 0 and seldom["made"] > 4
    assert seldom["left"] == 0
    assert seldom["error"].startswith("InterruptProcessingException")
    assert seldom["after a stop"] == 0


def test_a_partly_loaded_model_computes_the_same_bits(measured):
    assert measured["partial_loading"]["loaded"] < 0.5
    assert measured["partial_loading"]["equal"] is True


def test_a_stopped_sampling_leaves_nothing(measured):
    stopped = measured["stopped"]
    assert stopped["error"].startswith("InterruptProcessingException") and stopped["calls"] == 10
    assert stopped["left"] == 0
    assert stopped["then"] <= SAME


@pytest.mark.parametrize(
    ("mistake", "word"),
    [
        ("another model", "MODEL of Load Lance"),
        ("another model's words", "MODEL of Load Lance"),
        ("another model's picture", "MODEL of Load Lance"),
        ("conditioning of another model", "Lance Conditioning"),
        ("conditioning of something else", "Lance Conditioning"),
        ("joined conditionings", "Combine"),
        ("latent of another model", "[1, 4, 1, 8, 8]"),
        ("latent with NaN", "NaN"),
        ("long negative prompt", "4096"),
        ("float16", "--fp16-unet"),
        ("too large", "64x1040"),
        ("too long", "121"),
        ("semantic alone", "1 semantic and 0 latent"),
        ("first frames for three", "batch of 3"),
        ("batch as a reference", "batch of 2"),
    ],
)
def test_a_mistake_gets_a_sentence(measured, mistake, word):
    kind, sentence = measured["mistakes"][mistake].split(": ", 1)
    assert kind == "LanceError" and word in sentence
    assert_sentence(sentence)


def test_the_memory_estimate_counts_what_there_is(measured):
    estimates = measured["estimates"]
    assert estimates["large"] < estimates["two"] < 2 * estimates["large"]
    assert estimates["large"] == 48 * 48 // 12 * estimates["small"]
    assert estimates["context"] == estimates["keys and values"] > 0


def test_the_benchmark_of_samplers_judges_what_they_paint(comfyui):
    script, options = ROOT / "benchmarks/samplers.py", ["--count=1", "--steps", "1", "--samplers", "euler", "heun"]
    command = [find_python(comfyui), script, comfyui, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=comfyui)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if " passes" in line]
    assert [row[0] for row in rows] == ["| euler", "| heun"] and all("% (" in row[1] for row in rows)
