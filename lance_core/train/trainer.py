"""The loop: batches in, better weights out, on HuggingFace's accelerate."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint import Lance
from ..errors import LanceError
from ..media import remove_partials
from ..saving import recover_folder
from .alone import alone_in
from .batches import Batches, Share, ahead
from .config import TrainConfig
from .examples import Example, Examples
from .learner import Learner, recomputed
from .logs import LOG, Log, lost
from .objective import Batch, pack, tokens_of
from .parallel import accelerator_of
from .result import LORA, MODEL, check_savable, write_result
from .samples import check_samples, write_samples
from .schedule import learning_rate
from .state import (
    Facts,
    anywhere,
    check_essentials,
    newest,
    read_facts,
    read_tensors,
    remove_all,
    remove_leftovers,
    save_state,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS, SAMPLES, CACHE = "checkpoints", "samples", "latents"  # in the run's folder

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Result:
    """A finished run. path: the checkpoint's folder, or the LoRA's file.

    values: the last line of the log; empty where nothing was left to do.
    """

    step: int
    values: dict[str, float]
    path: Path


def train(
    config: TrainConfig, lance: Lance, examples: Examples, on_step: OnStep | None = None, *, fresh: bool = False
) -> Result:
    """Trains a model in place and writes it to `config.output`; afterwards the model has the averaged weights.

    lance: with the weights to begin with, float32 where they are trained; its device is used. The run goes on from the
    newest state in the output folder, with the same results as if it had never stopped; fresh: what is there is removed
    and it begins anew. on_step(step, values) after every line of the log. Ctrl-C, SIGTERM, or a KeyboardInterrupt from
    on_step saves the state after the step and raises KeyboardInterrupt; anything else that on_step raises just ends
    the run. Raises LanceError for a state of another run, a full disk, or a loss that is not a number any more.
    """
    check(config, lance)
    accelerator = accelerator_of(config, lance.device)
    folder = config.output / CHECKPOINTS
    with ExitStack() as stack:
        keep_others_out(config.output, stack, accelerator)
        if config.train.checkpointing:
            stack.enter_context(recomputed(lance))
        learner = Learner(config, lance, accelerator)
        stack.callback(learner.release)
        accelerator.wait_for_everyone()  # one may be keeping a latent yet
        if accelerator.is_main_process:
            clean_up(config.output)
            if fresh:
                remove_all(folder)
        accelerator.wait_for_everyone()
        step, cursor = resume(config, learner, folder)
        log = stack.enter_context(closing(Log(config.output, accelerator, step)))
        stopped = stack.enter_context(interrupts())
        values: dict[str, float] = {}
        if step < config.train.steps:
            batches = batches_of(config, lance, examples, accelerator, step, cursor)
            draw = stack.enter_context(ahead(batches))
        while step < config.train.steps:
            step += 1
            for drawn, losses in learner.update(step, draw):
                log.add(losses, drawn.tokens)
            done, ending = step == config.train.steps, False
            due = done or step % config.save.every == 0 or accelerator.num_processes == 1 and stopped()
            if due or step % config.train.log_every == 0:
                values = log.write(step, learning_rate(config.train, step))
                ending = anywhere(told(on_step, step, values) or stopped(), accelerator)
            if due or ending:
                # The logged loss is that of the weights before this step: from those after it the run must go on.
                if anywhere(learner.is_lost(drawn.batch), accelerator):
                    raise lost(step)
                save(config, learner, folder, step, drawn.cursor)
            if ending and not done:
                raise KeyboardInterrupt(f"stopped after step {step} of {config.train.steps}")
            if config.samples.every and step % config.samples.every == 0 and accelerator.is_main_process:
                with learner.averaged(), accelerator.autocast():
                    write_samples(config.samples, lance, config.output / SAMPLES, step)
        learner.take_average()
        return Result(step, values, write_result(config, lance, accelerator))


def finished(config: TrainConfig) -> bool:
    """Whether the run in `config.output` has done all its steps."""
    path = newest(config.output / CHECKPOINTS)
    return path is not None and read_facts(path).step >= config.train.steps


def check(config: TrainConfig, lance: Lance) -> None:
    """Raises LanceError, before a long run, for what would end it later."""
    if lance.placement.budget is not None:  # making latents would move weights away in the middle of a step
        raise LanceError("the model keeps to a budget of memory, in which none is trained: load it with memory=None.")
    if lance.vision is None or lance.vae is None:
        lacking = "vision tower" if lance.vision is None else "VAE"
        raise LanceError(f"the model has no {lacking}, and some data would need it: train a whole one.")
    check_savable(config, lance)
    if config.samples.every:
        check_samples(config.samples, lance)


def keep_others_out(output: Path, stack: ExitStack, accelerator: Accelerator) -> None:
    """Raises LanceError, in every process, where another run writes to the folder."""
    problem = None
    if accelerator.is_main_process:
        try:
            stack.enter_context(alone_in(output))
        except LanceError as error:
            problem = error
    if anywhere(problem is not None, accelerator):
        raise problem or LanceError(f"{output} is not free, as another process says.")


def clean_up(output: Path) -> None:
    """Removes what a killed run was writing, and puts back the model that it was about to replace.

    Nothing else, for others may write into the same folder.
    """
    remove_leftovers(output / CHECKPOINTS)
    for names in (LOG, LORA):
        remove_partials(output, names)
    remove_partials(output / SAMPLES, "step_*")
    for folder in (output / CACHE).glob("??"):
        remove_partials(folder, "*")
    recover_folder(output / MODEL)


def batches_of(
    config: TrainConfig, lance: Lance, examples: Examples, accelerator: Accelerator, step: int, cursor: int
) -> Batches[Batch]:
    """This process's batches after that step."""

    def packed(chosen: list[Example], generator: torch.Generator) -> Batch:
        return pack(chosen, lance.tokenizer, lance.config, config.objective, generator, lance.device)

    share = Share(accelerator.process_index, accelerator.num_processes)
    number = step * config.train.accumulate
    measure = partial(tokens_of, draws=config.objective.draws)
    return Batches(examples, packed, measure, config.train.tokens, config.seed, share, cursor, number)


def resume(config: TrainConfig, learner: Learner, folder: Path) -> tuple[int, int]:
    """Takes up the newest state, if there is one; returns its step, and this process's place in the data."""
    path = newest(folder)
    if path is None:
        return 0, 0
    facts = read_facts(path)
    check_essentials(path, facts, learner.essentials)
    share = Share(learner.accelerator.process_index, learner.accelerator.num_processes)
    tensors = read_tensors(path, facts, share, config.train.shard)
    try:
        learner.load(tensors)
    except LanceError as error:
        raise LanceError(f"{path} is another model's, {error}: name another output, or use --fresh.") from None
    return facts.step, facts.cursor(share)


def save(config: TrainConfig, learner: Learner, folder: Path, step: int, cursor: int) -> None:
    from accelerate.utils import gather_object

    accelerator = learner.accelerator
    files = accelerator.num_processes if config.train.shard else 1
    facts = Facts(step, tuple(gather_object([cursor])), files, learner.essentials)
    save_state(folder, facts, learner.tensors(), accelerator, config.save.keep)


def told(on_step: OnStep | None, step: int, values: dict[str, float]) -> bool:
    """Tells how far the run is; returns whether it is to end there."""
    try:
        if on_step is not None:
            on_step(step, values)
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came, to be asked between steps; a second Ctrl-C ends the step as well.

    A step that is cut off in the middle would leave weights of which some have changed and some have not. torchrun
    sends SIGTERM after every Ctrl-C, which is no second wish.
    """
    came = threading.Event()

    def note(number: int, frame) -> None:
        if came.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.set()

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be had
        yield came.is_set
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
