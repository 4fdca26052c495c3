"""The training engine: that it learns, that nothing is lost, and that it says what is wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lance_core.__main__ import main
from lance_core.errors import LanceError
from lance_core.inspection import inspect
from lance_core.layout import find_checkpoint
from lance_core.media import write_png
from lance_core.placement import Placement
from lance_core.stages import load_lance
from lance_core.tiny import make_tiny
from lance_core.train.alone import LOCK, alone_in
from lance_core.train.batches import Batches, Share
from lance_core.train.config import Question, Samples, Saving, Training, read_config
from lance_core.train.learner import Learner, recomputed
from lance_core.train.lora import LoraConfig, add_lora
from lance_core.train.parallel import accelerator_of
from lance_core.train.result import LORA
from lance_core.train.schedule import decay, learning_rate
from lance_core.train.state import Facts, newest
from lance_core.train.trainer import batches_of, train
from lance_core.world.render import SIDE
from tests.training_run import STEPS, Handful, configuration, small_lance

ROOT = Path(__file__).parents[1]
PHOTO = str(ROOT / "docs/icon.png")
WEIGHTS = "model/Lance_3B/model.safetensors"


def run(output: Path, **options):
    return train(configuration(output, **options), small_lance(), Handful())


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / WEIGHTS)


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def process(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *(launcher or ("-m", "tests.training_run")), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    run(output)
    return output


def test_learns_a_handful_by_heart(tmp_path):
    lance = small_lance()
    config = configuration(tmp_path, steps=60, tokens=400, learning_rate=1e-2, log_every=10, every=100)
    told = []
    result = train(config, lance, Handful(), lambda step, values: told.append((step, values["loss"])))
    assert [step for step, _ in told] == [10, 20, 30, 40, 50, 60] and result.step == 60
    assert told[-1][1] < 0.7 * told[0][1]
    # What is kept is the average, in the model and on disk alike.
    saved = load_lance(result.path, dtype="fp32")
    for (name, weight), (_, kept) in zip(lance.transformer.named_parameters(), saved.transformer.named_parameters()):
        assert torch.equal(weight, kept), name


def test_a_model_for_video_stays_one(tmp_path):
    lance = load_lance(make_tiny(tmp_path / "video", variant="video"), dtype="fp32")
    result = train(configuration(tmp_path, steps=1), lance, Handful())
    assert find_checkpoint(result.path).variant == "video" and not inspect(result.path).problems


def test_ends_at_any_moment_lose_nothing(tmp_path, uninterrupted):
    """Killed twice, wherever it is after a step was told, and then finished."""
    for last in ("3", "5"):
        with process(tmp_path) as running:
            for line in running.stdout:
                if line.strip() == last:
                    running.send_signal(signal.SIGKILL)
        assert running.returncode == -signal.SIGKILL
    assert len(losses(tmp_path)) < STEPS
    run(tmp_path)
    assert same(tmp_path, uninterrupted) and losses(tmp_path) == losses(uninterrupted)


def test_half_written_states_are_ignored(tmp_path, uninterrupted):
    stop_after(tmp_path, 3)
    half = tmp_path / "checkpoints" / ".step_00000008.part"
    half.mkdir()
    (half / "tensors_00000.safetensors").write_bytes(b"half")
    run(tmp_path)
    assert same(tmp_path, uninterrupted) and not half.exists()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]


def stop_after(output: Path, last: int, **options) -> None:
    def on_step(step: int, values: dict[str, float]) -> None:
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {last} of {STEPS}"):
        train(configuration(output, every=100, **options), small_lance(), Handful(), on_step)


KILLED = """
import os, signal, sys
from contextlib import ExitStack
from pathlib import Path
from lance_core.media import replacing
from lance_core.saving import replacing_folder

output, replace = Path(sys.argv[1]), os.replace

def replace_and_die(*paths):
    replace(*paths)
    os.kill(os.getpid(), signal.SIGKILL)

with ExitStack() as stack:
    for name in sys.argv[2:]:
        stack.enter_context(replacing(output / name)).write_text("half")
    os.replace = replace_and_die
    with replacing_folder(output / "model", overwrite=True) as fresh:
        fresh.mkdir()
"""


def test_what_a_killed_run_was_writing_is_gone_at_the_next_start(tmp_path):
    """The model that it was replacing is back, and what others write into the same folder is not touched."""
    run(tmp_path, steps=2)
    whole = weights(tmp_path)
    latent, own = f"latents/ab/{64 * 'a'}.safetensors", ("log.jsonl", "lora.safetensors", "samples/step_000002_0.png")
    with process(str(tmp_path), *own, latent, "fox.png", launcher=("-c", KILLED)) as killed:
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "model").exists()
    (tmp_path / ".model-int8-abcdefgh").mkdir()
    assert len(hidden(tmp_path)) == 7
    stop_after(tmp_path, 3)
    assert all(torch.equal(weights(tmp_path)[name], weight) for name, weight in whole.items())
    assert [name[:9] for name in hidden(tmp_path)] == [".fox.png.", ".model-in"]


TWO = """
import sys
from pathlib import Path
from lance_core.train.parallel import together
from tests import training_run

try:
    together(2, getattr(training_run, sys.argv[1]), Path(sys.argv[2]))
except BaseException as end:
    print(repr(end))
"""


def test_processes_that_are_one_run_end_with_the_one_that_started_them(tmp_path):
    """However it ends: those of a killed `make-nano` would train into the folder of the next."""
    with process("linger", tmp_path, launcher=("-c", TWO)) as starter:
        while len(list(tmp_path.iterdir())) < 2:
            assert starter.poll() is None
            time.sleep(0.1)
        starter.kill()
        starter.communicate(timeout=60)  # their output ends with the last of them


@pytest.mark.parametrize(("ending", "expected"), [("refuse", "LanceError('no room')"), ("stop", "KeyboardInterrupt()")])
def test_how_processes_that_are_one_run_ended_is_known_where_they_were_started(tmp_path, ending, expected):
    with process(ending, tmp_path, launcher=("-c", TWO)) as starter:
        assert starter.communicate(timeout=60)[0].splitlines() == [expected]


def test_ctrl_c_in_a_terminal_reaches_processes_that_are_one_run_once(tmp_path):
    with process("count_signals", tmp_path, launcher=("-c", TWO)) as starter:
        while len(list(tmp_path.iterdir())) < 2:
            assert starter.poll() is None
            time.sleep(0.1)
        os.killpg(starter.pid, signal.SIGINT)
        assert starter.communicate(timeout=60)[0].splitlines() == ["SIGINT", "SIGINT", "KeyboardInterrupt()"]


def hidden(output: Path) -> list[str]:
    return sorted(path.name for path in output.rglob(".*") if path.name != LOCK)


def test_ctrl_c_saves_the_step_it_is_in(tmp_path, uninterrupted):
    def on_step(step: int, values: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step"):
        train(configuration(tmp_path, every=100), small_lance(), Handful(), on_step)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()
    run(tmp_path)
    assert same(tmp_path, uninterrupted)


def test_a_full_disk_leaves_the_state_before(tmp_path, uninterrupted):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(step: int, values: dict[str, float]) -> None:
        if step == 3:  # states are larger than this from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(LanceError, match=r"step_00000004 cannot be written \(.*step_00000002 is safe"):
            train(configuration(tmp_path), small_lance(), Handful(), on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    run(tmp_path)
    assert same(tmp_path, uninterrupted)


def test_another_run_does_not_go_on(tmp_path):
    stop_after(tmp_path, 1)
    with pytest.raises(LanceError, match=r"train.parts.2 = 'vision' and the configuration says 'absent'.*--fresh"):
        run(tmp_path, parts=("understanding", "generation"))
    run(tmp_path, steps=2, learning_rate=1e-4)
    config = configuration(tmp_path, steps=2, parts=("generation",))
    for name in ("step_by_step.safetensors", "sd15.safetensors"):  # the folder may be one that others use too
        (tmp_path / "checkpoints" / name).write_bytes(b"another's")
    assert train(config, small_lance(), Handful(), fresh=True).step == 2
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_00000002", "step_by_step.safetensors", "sd15.safetensors"}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Samples(every=1, questions=(Question("none.png", "what?"),)), "none.png does not exist"),
        (Samples(every=1, prompts=("x",), width=16, height=2048), "too large"),
        (Samples(every=1, prompts=("word " * 9000,), width=16, height=16), "the text has .* tokens: shorten it"),
        (Samples(every=1, questions=(Question(PHOTO, " "),)), "the question is empty"),
        (Samples(every=1, questions=(Question(PHOTO, "word " * 9000),)), "the text has .* tokens: shorten it"),
        (Samples(every=1, questions=(Question(PHOTO, "what?"),), max_new_tokens=5000), "max_new_tokens is 5000"),
    ],
)
def test_samples_that_cannot_be_made_end_a_run_before_it_begins(tmp_path, samples, message):
    with pytest.raises(LanceError, match=message):
        train(replace(configuration(tmp_path), samples=samples), small_lance(), Handful())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("part", "name"), [("vision", "vision tower"), ("vae", "VAE")])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_lacks_a_part_is_not_trained(tmp_path, method, part, name):
    """Some data would need it, perhaps only after hours."""
    config = configuration(tmp_path, method=method)
    with pytest.raises(LanceError, match=f"the model has no {name}"):
        train(config, replace(small_lance(), **{part: None}), Handful())
    assert not list(tmp_path.iterdir())


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    with alone_in(tmp_path), pytest.raises(LanceError, match=f"another run is writing to {tmp_path}: wait for its end"):
        run(tmp_path, steps=1)
    run(tmp_path, steps=1)


def test_a_state_goes_on_only_beside_the_weights_that_it_was_made_with(tmp_path):
    config = configuration(tmp_path, steps=4, every=2, parts=("generation",))
    train(config, small_lance(), Handful())
    other = small_lance()
    with torch.no_grad():
        other.transformer.language_model.lm_head.weight.mul_(1.1)
    longer = replace(config, train=replace(config.train, steps=6))
    with pytest.raises(LanceError, match="step_00000004 was made beside other weights than those of this model: give"):
        train(longer, other, Handful())
    assert train(longer, small_lance(), Handful()).step == 6


def test_a_result_that_cannot_be_written_ends_a_run_before_it_begins(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").touch()
    with pytest.raises(LanceError, match="more than a Lance checkpoint"):
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_weights_that_come_and_go_are_not_trained(tmp_path):
    lance = small_lance()
    lance = replace(lance, placement=Placement({}, lance.device, budget=1))
    with pytest.raises(LanceError, match="budget of memory"):
        train(configuration(tmp_path), lance, Handful())


def test_only_the_parts_named_change(tmp_path):
    before = small_lance()
    lance = small_lance()
    train(configuration(tmp_path, steps=2, parts=("generation",), every=100), lance, Handful())
    for (name, old), (_, new) in zip(before.transformer.named_parameters(), lance.transformer.named_parameters()):
        of_generation = "_moe_gen" in name or name.startswith(("time_embedder", "vae2llm", "llm2vae"))
        assert of_generation or torch.equal(old, new), name
    assert not torch.equal(before.transformer.llm2vae.weight, lance.transformer.llm2vae.weight)


def gradients(tmp_path: Path, *, recompute: bool) -> dict[str, torch.Tensor]:
    config, lance = configuration(tmp_path, tokens=300), small_lance()
    accelerator = accelerator_of(config, lance.device)
    learner = Learner(config, lance, accelerator)
    batch = batches_of(config, lance, Handful(), accelerator, 0, 0).draw().batch
    if recompute:
        with recomputed(lance):
            learner.module(batch)["loss"].backward()
    else:
        learner.module(batch)["loss"].backward()
    return {name: weight.grad for name, weight in learner.weights.items() if weight.grad is not None}


def test_checkpointing_gives_the_same_gradients(tmp_path):
    kept, again = gradients(tmp_path, recompute=False), gradients(tmp_path, recompute=True)
    assert kept.keys() == again.keys() and len(kept) > 20
    for name in kept:
        torch.testing.assert_close(again[name], kept[name])


def test_bf16_computes_coarsely_and_keeps_weights_fine(tmp_path, uninterrupted):
    lance = small_lance()
    train(configuration(tmp_path, precision="bf16"), lance, Handful())
    assert {weight.dtype for weight in lance.transformer.parameters()} == {torch.float32}
    assert losses(tmp_path) != losses(uninterrupted)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=0.05)


def test_what_python_gets_wrong_is_refused_as_in_a_file():
    for values, message in (({"method": "LoRA"}, "train.method is 'LoRA'"), ({"precision": "fp16"}, "train.precision")):
        with pytest.raises(LanceError, match=f"{message}.*: choose one of"):
            Training(**values)


def test_a_model_with_loras_is_merged_first(tmp_path):
    lance = small_lance()
    add_lora(lance.transformer, LoraConfig(rank=4))
    with pytest.raises(LanceError, match="LoRAs are not saved with a model: merge them"):
        train(configuration(tmp_path), lance, Handful())
    with pytest.raises(LanceError, match="the model has a LoRA beside .*q_proj already: merge it first"):
        train(configuration(tmp_path, method="lora"), lance, Handful())


def test_the_log_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"level": "info"}\n')
    with pytest.raises(LanceError, match="log.jsonl is not the log of a run: name another output"):
        run(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == '{"level": "info"}\n'


def test_weights_too_coarse_to_be_trained_are_refused(tmp_path):
    lance = small_lance()
    lance.transformer.bfloat16()
    with pytest.raises(LanceError, match="is torch.bfloat16, too coarse to be trained"):
        train(configuration(tmp_path), lance, Handful())


@pytest.mark.filterwarnings("ignore")
def test_two_processes_do_what_one_does(tmp_path):
    """With all weights each and with half of them each, one painting, the other answering; and one goes on."""
    names = ("one", "two", "shared", "left", "halves", "lora", "sharded")
    one, two, shared, left, halves, lora, sharded = (tmp_path / name for name in names)
    run(one, accumulate=2)
    run(lora, accumulate=2, method="lora")
    runs = f"{two} , {shared} shard=1 stop=5 , {shared} shard=1 , {left} stop=4 , {halves} shard=1 stop=4"
    runs += f" , {sharded} shard=1 method=lora"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.training_run")
    with process(*runs.split(), launcher=launcher) as running:
        running.communicate()
    assert running.returncode == 0
    for other in (two, shared):
        assert losses(other) == pytest.approx(losses(one), abs=2e-5)
        for name, weight in weights(one).items():
            torch.testing.assert_close(weights(other)[name], weight, atol=5e-4, rtol=0)
    assert losses(sharded) == pytest.approx(losses(lora), abs=2e-5) != losses(one)
    for name, matrix in load_file(lora / LORA).items():
        torch.testing.assert_close(load_file(sharded / LORA)[name], matrix, atol=5e-4, rtol=0)
    for folder, files in ((shared, 2), (halves, 2), (left, 1)):
        assert len(list(newest(folder / "checkpoints").glob("*.safetensors"))) == files
    for alone in (left, halves):
        run(alone)
        assert losses(alone)[:4] == pytest.approx(losses(one)[:4], abs=2e-5) and len(losses(alone)) == STEPS
    assert losses(left) == pytest.approx(losses(halves), abs=2e-5)


@pytest.mark.parametrize("count", (1, 2, 3))
def test_another_number_of_processes_sees_no_example_again(count):
    facts = Facts(3, (7, 5), files=1, essentials={})
    seen = {place * 2 + rank for rank, cursor in enumerate(facts.cursors) for place in range(cursor)}
    coming = {facts.cursor(Share(rank, count)) * count + rank for rank in range(count)}
    assert len(coming) == count and not coming & seen
    assert max(coming) <= max(seen) + 2 * count


def test_every_process_has_its_own_examples():
    class Numbers:
        def __getitem__(self, index: int):
            return None if index % 5 == 4 else index

    def all_of(share: Share) -> list[list[int]]:
        batches = Batches(Numbers(), lambda chosen, generator: chosen, lambda example: 1, 3, 0, share)
        return [batches.draw().batch for _ in range(4)]

    drawn = [number for rank in (0, 1) for batch in all_of(Share(rank, 2)) for number in batch]
    assert len(set(drawn)) == len(drawn) == 24 and not any(number % 5 == 4 for number in drawn)


def test_batches_fill_their_budget_and_go_on_where_they_were():
    class Numbers:
        def __getitem__(self, index: int) -> int:
            return index % 7 + 1

    def batches(cursor: int = 0, number: int = 0) -> Batches:
        def pack(chosen, generator):
            return chosen, torch.rand((), generator=generator).item()

        return Batches(Numbers(), pack, lambda example: example, 8, 0, cursor=cursor, number=number)

    whole = batches()
    drawn = [whole.draw() for _ in range(6)]
    assert all(sum(one.batch[0]) <= 8 for one in drawn) and drawn[0].batch[0] == [1, 2, 3]
    resumed = batches(drawn[2].cursor, 3)
    assert [resumed.draw().batch for _ in range(3)] == [one.batch for one in drawn[3:]]


def test_data_without_one_good_record_is_an_error():
    class Bad:
        def __getitem__(self, index: int) -> None:
            return None

    with pytest.raises(LanceError, match="1000 records in a row"):
        Batches(Bad(), lambda *_: None, lambda _: 1, 8, 0).draw()


def test_schedule():
    training = Training(steps=110, warmup=10, learning_rate=1.0, min_learning_rate=0.2)
    assert learning_rate(training, 5) == 0.5 and learning_rate(training, 10) == 1.0
    assert learning_rate(training, 60) == pytest.approx(0.6) and learning_rate(training, 110) == pytest.approx(0.2)
    assert learning_rate(replace(training, schedule="constant", min_learning_rate=0.0), 110) == 1.0
    assert decay(replace(training, ema=0.9), 1) < 0.2 and decay(replace(training, ema=0.9), 1000) == 0.9


def test_the_average_is_that_of_the_weights(tmp_path):
    config, lance = configuration(tmp_path, ema=0.9), small_lance()
    accelerator = accelerator_of(config, lance.device)
    learner = Learner(config, lance, accelerator)
    batches = batches_of(config, lance, Handful(), accelerator, 0, 0)
    weight = lance.transformer.llm2vae.weight
    expected = weight.detach().clone()
    for step in range(1, 5):
        learner.update(step, batches.draw)
        expected = expected.lerp(weight.detach(), 1 - decay(config.train, step))
    trained = weight.detach().clone()
    with learner.averaged():
        torch.testing.assert_close(weight.detach(), expected)
        assert not torch.equal(weight, trained)
    assert torch.equal(weight, trained)


def test_a_lost_loss_ends_the_run(tmp_path):
    lance = small_lance()
    with torch.no_grad():
        lance.transformer.llm2vae.weight[0, 0] = torch.nan
    with pytest.raises(LanceError, match="not a number any more at step 1: lower train.learning_rate"):
        train(configuration(tmp_path), lance, Handful())
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("rate", [1e15, 1e30])
def test_weights_that_are_lost_are_not_saved(tmp_path, rate):
    """The first step's own loss is good; that of the weights that it makes is not."""
    with pytest.raises(LanceError, match="not a number any more at step 1: lower train.learning_rate"):
        run(tmp_path, learning_rate=rate, warmup=0, every=1)
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path, steps=2, every=1)
    assert len(losses(tmp_path)) == 2


def test_a_lost_weight_that_no_loss_has_shown_is_not_saved(tmp_path):
    lance = small_lance()
    with torch.no_grad():  # the handful has no pictures to look at
        next(lance.vision.parameters()).fill_(torch.nan)
    with pytest.raises(LanceError, match="not a number any more at step 2"):
        train(configuration(tmp_path), lance, Handful())
    assert len(losses(tmp_path)) == 2 and not (tmp_path / "checkpoints").exists()


TOML = """
output = "{folder}/run"
[model]
checkpoint = "{folder}/tiny"
[train]
method = "lora"
steps = 3
tokens = 300
log_every = 1
[lora]
rank = 2
[[data]]
path = "{folder}/data"
resolution = "native"
[samples]
every = 2
prompts = ["a grey square"]
width = 32
height = 32
steps = 2
[save]
every = 2
"""


def test_the_command_trains_what_a_file_says(tmp_path, capsys):
    make_tiny(tmp_path / "tiny")
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        write_png(torch.full((1, 32, 32, 3), number / 4), data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"a grey square, number {number}")
    config = tmp_path / "run.toml"
    config.write_text(TOML.format(folder=tmp_path))
    assert main(["train", str(config)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "lora.safetensors")
    names = load_file(tmp_path / "run" / "lora.safetensors").keys()
    assert any(name.endswith("lora_B.weight") for name in names)
    assert (tmp_path / "run" / "samples" / "step_000002_0.png").is_file()
    assert len(losses(tmp_path / "run")) == 3
    shutil.rmtree(data)
    assert main(["train", str(config)]) == 0  # finished: nothing is read any more


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[train]\nstepz = 3", r"\[train\] has no 'stepz': it knows method, steps, tokens"),
        ("sead = 1", r"the top of the file has no 'sead': it knows output, seed"),
        ("[save]\nvariant = 'video'", r"\[save\] has no 'variant': it knows every, keep, dtype"),
        ("[train]\nsteps = 'many'", "train.steps is 'many': give a whole number"),
        ("[train]\nsteps = true", "train.steps is True: give a whole number"),
        ("[train]\nsteps = 0", "train.steps is 0: give a whole number of at least 1"),
        ("[train]\nmethod = 'half'", "train.method is 'half': choose one of 'full', 'lora'"),
        ("[train]\nbetas = [0.9]", r"train.betas is \[0.9\]: give a list of 2"),
        ("[train]\nparts = ['eyes']", r"train.parts\[0\] is 'eyes': choose one of 'understanding'"),
        ("[train]\nparts = []", "train.parts is empty"),
        ("[train]\nmin_learning_rate = 1", "train.min_learning_rate is above train.learning_rate"),
        (
            "[train]\nschedule = 'constant'\nmin_learning_rate = 1e-5",
            'min_learning_rate is for train.schedule "cosine"',
        ),
        ("small_world = 1.0", r"'small_world' is at the top of the file: write it into .* \[\[data\]\]"),
        ("[samples]\nguidance = 0.5", "samples: guidance is 0.5: give a number of at least 1"),
        ("[train]\nmethod = 'lora'\nparts = ['generation']", "train.parts is for whole models: leave it out"),
        ("[lora]\nrank = 4", r"\[lora\] is given but train.method is \"full\""),
        ("[samples]\nevery = 5", "no samples.prompts or samples.questions"),
        ("[samples]\nprompts = ['x']", "given but no samples.every: say how often"),
        ("[samples]\nwidth = 100", "samples.width is 100: give a multiple of 16"),
        ("[train]\nshard = true\n[samples]\nevery = 5\nprompts = ['x']", "samples cannot be made from sharded weights"),
        ("[[data]]\npath = 'x'\nspeed = 3", r"\[data\[0\]\] has no 'speed'"),
        ("[[data]]\nsmall_world = true\n[[data]]\nweight = 1", r"\[data\[1\]\] lacks 'path'"),
        (
            "[train]\nmethod = 'lora'\n[lora]\nlayers = 5",
            "lora.layers is 5: choose one of 'all', or give a list",
        ),
        ("[data]\npath = 'x'", r"'data' is not a list of tables: begin each with \[\[data\]\]"),
        ("train = 3", r"'train' is not a table: begin it with \[train\]"),
        ("[train", "it is not valid TOML"),
    ],
)
def test_what_a_file_gets_wrong_is_one_sentence(tmp_path, line, message):
    path = tmp_path / "run.toml"
    path.write_text(f'output = "out"\n{line}\n')
    with pytest.raises(LanceError, match=message) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_file_in_the_docs_has_nano_s_size(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (tmp_path / "small.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    config = read_config(tmp_path / "small.toml")
    assert config.model.checkpoint == "nano" and (config.samples.width, config.samples.height) == (SIDE, SIDE)


def test_a_file_without_output_or_that_is_missing(tmp_path):
    with pytest.raises(LanceError, match="nothing.toml: it cannot be read"):
        read_config(tmp_path / "nothing.toml")
    (tmp_path / "empty.toml").write_text("seed = 1")
    with pytest.raises(LanceError, match="there is no 'output'"):
        read_config(tmp_path / "empty.toml")


def test_saving_needs_sense():
    with pytest.raises(LanceError, match="save.keep is 0"):
        Saving(keep=0)
