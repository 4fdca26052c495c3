"""What is trained, and the step that changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint import Lance
from ..errors import LanceError
from .batches import Drawn
from .config import TrainConfig
from .objective import Batch, Trainee
from .optimizers import MOMENTS, optimizers_of
from .parallel import like, local, places_of, sharded, use_in_loss
from .schedule import decay, learning_rate
from .state import FROZEN, fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

GENERATION = ("time_embedder.", "vae2llm.", "llm2vae.")  # besides everything that has `_moe_gen` in its name


class Learner:
    """A model in training: its weights, their average, and what the optimizers remember of their gradients.

    The model's own modules are trained, in place. Frozen weights stay as they are, in their own dtype.
    """

    def __init__(self, config: TrainConfig, lance: Lance, accelerator: Accelerator):
        self.training, self.accelerator = config.train, accelerator
        trainee = trainee_of(config, lance)
        check_dtypes(trainee)
        frozen = {name: weight for name, weight in trainee.named_parameters() if not weight.requires_grad}
        self.essentials = {**config.essentials(), FROZEN: fingerprint(frozen)}
        if config.train.shard:
            self.module = sharded(trainee, lance.transformer.language_model.model.layers, lance.device)
        else:  # a batch may have nothing for the parts that are trained
            trainee.register_forward_hook(partial(use_in_loss, places_of(trainee)[:1]))
            self.module = accelerator.prepare_model(trainee)
        optimizers = optimizers_of(trainee, config.train)
        self.optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
        self.weights = {name: weight for name, weight in trainee.named_parameters() if weight.requires_grad}
        self.locals = [local(weight.detach()) for weight in self.weights.values()]
        self.averages = [weight.clone() for weight in self.locals] if config.train.ema else []

    def update(self, step: int, draw: Callable[[], Drawn]) -> list[tuple[Drawn, dict[str, Tensor]]]:
        """One step, on `accumulate` batches: these with their losses."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(self.training, step)
        done = []
        for _ in range(self.training.accumulate):
            drawn = draw()
            with self.accelerator.accumulate(self.module):
                with self.accelerator.autocast():
                    losses = self.module(drawn.batch)
                self.accelerator.backward(losses["loss"])
                done.append((drawn, {name: value.detach() for name, value in losses.items()}))
                if self.accelerator.sync_gradients and self.training.clip:
                    self.accelerator.clip_grad_norm_(self.weights.values(), self.training.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        if self.averages:
            torch._foreach_lerp_(self.averages, self.locals, 1 - decay(self.training, step))
        return done

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, to be used as they are used afterwards."""
        kept = [weight.clone() for weight in self.locals]
        self.take_average()
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()
            torch._foreach_copy_(self.locals, kept)

    def take_average(self) -> None:
        """Puts the averaged weights where the trained ones were, for good."""
        if self.averages:
            torch._foreach_copy_(self.locals, self.averages)

    def release(self) -> None:
        """Leaves the model as one that is used, not trained."""
        self.module.eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, this process's share of it."""
        found = {}
        for index, (name, weight) in enumerate(self.weights.items()):
            found[f"weight/{name}"] = self.locals[index]
            if self.averages:
                found[f"average/{name}"] = self.averages[index]
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(weight, {}).items():
                    found[f"{key}/{name}"] = local(value)
        return found

    @torch.no_grad()
    def is_lost(self, batch: Batch) -> bool:
        """Whether any of these, or the loss of a batch with them, is not a number any more, in this process."""
        with self.accelerator.autocast():
            loss = self.module(batch)["loss"]
        if self.training.shard:
            self.module.reshard()  # the backward pass would have done it
        return not all(tensor.isfinite().all() for tensor in (loss, *self.tensors().values()))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave; raises LanceError where it is another model's."""
        expected = {name: weight.shape for name, weight in zip(self.weights, self.locals)}
        given = {name.removeprefix("weight/"): t.shape for name, t in tensors.items() if name.startswith("weight/")}
        for name in sorted(expected.keys() | given.keys()):
            if expected.get(name) != given.get(name):
                raise LanceError(
                    f"its '{name}' is {_shape(given.get(name))} and the model's {_shape(expected.get(name))}"
                )
        for index, (name, weight) in enumerate(self.weights.items()):
            self.locals[index].copy_(tensors[f"weight/{name}"])
            if self.averages:
                self.averages[index].copy_(tensors[f"average/{name}"])
            self.remember(weight, {key: tensors[f"{key}/{name}"] for key in MOMENTS if f"{key}/{name}" in tensors})

    def remember(self, weight: Tensor, values: dict[str, Tensor]) -> None:
        """Gives the optimizer of a weight what it knew of it."""
        (optimizer,) = (o for o in self.optimizers if any(weight is w for g in o.param_groups for w in g["params"]))
        state = {key: like(weight, value) for key, value in values.items() if key != "step"}
        if "step" in values:
            state["step"] = values["step"].to(weight.device if optimizer.defaults["fused"] else "cpu")
        if state:
            optimizer.state[weight] = state


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def trainee_of(config: TrainConfig, lance: Lance) -> Trainee:
    """The trainee, in which exactly what is to be trained has `requires_grad`."""
    trainee = Trainee(lance.transformer, lance.vision, config.objective, len(lance.tokenizer))
    trainee.requires_grad_(False).train()
    if config.train.method == "lora":
        from .lora import add_lora

        for weight in add_lora(lance.transformer, config.lora, torch.Generator().manual_seed(config.seed)):
            weight.requires_grad_(True)
    else:
        for name, weight in trainee.named_parameters():
            weight.requires_grad_(part_of(name) in config.train.parts)
    return trainee


def part_of(name: str) -> str:
    """The part of the model that a trainee's parameter belongs to: "understanding", "generation" or "vision"."""
    network, _, name = name.partition(".")
    if network == "vision":
        return "vision"
    return "generation" if "_moe_gen" in name or name.startswith(GENERATION) else "understanding"


def check_dtypes(trainee: nn.Module) -> None:
    for name, weight in trainee.named_parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            raise LanceError(f"'{name}' is {weight.dtype}, too coarse to be trained: load the model with dtype fp32.")


@contextmanager
def recomputed(lance: Lance) -> Iterator[None]:
    """The layers' activations are computed again in the backward pass instead of being kept."""
    layers = [*lance.transformer.language_model.model.layers, *(lance.vision.blocks if lance.vision else ())]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
