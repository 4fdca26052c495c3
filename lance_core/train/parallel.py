"""Several processes, each with all weights (accelerate's DDP) or a share of them (torch's FSDP2).

A process learns from torchrun's or `accelerate launch`'s environment that it is one of several.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from ..errors import LanceError
from ..transformer import Run
from .config import TrainConfig
from .needed import needed

if TYPE_CHECKING:
    from accelerate import Accelerator


PATIENCE = timedelta(hours=2)  # of processes that wait for one which writes samples or a checkpoint


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: str = "auto") -> str:
    """The device of this process: each of several on one machine has a GPU of its own."""
    if device in ("auto", "cuda") and processes() > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def together(count: int, function: Callable[..., Any], *args: Any) -> None:
    """Calls function(*args) in so many new processes of this machine, which are one run, as torchrun would start them.

    The cores are shared among them: a small model's layers gain little from several threads. Raises LanceError where
    one of them failed, and KeyboardInterrupt where they were stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid4().hex}
    config = LaunchConfig(1, 1, count, max_restarts=0, monitor_interval=0.5, **where)
    try:
        ends = elastic_launch(config, _alone)(os.getpid(), max(1, (os.cpu_count() or 1) // count), function, *args)
    except ChildFailedError:
        raise LanceError("one of the processes failed, and with it the run: what it said is above.") from None
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped
    for end in ends.values():
        if end is not None:
            raise end


def _alone(
    parent: int, threads: int, function: Callable[..., Any], *args: Any
) -> LanceError | KeyboardInterrupt | None:
    """Calls function(*args) and returns what ended it early: torch would show a traceback of the one, and wait for ever
    after the other."""
    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C comes by way of the process that started this one, and not a second time
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    torch.set_num_threads(threads)
    try:
        function(*args)
    except (LanceError, KeyboardInterrupt) as end:
        return end


def _end_with(parent: int) -> None:
    """Ends this process where its parent does: left alone, it would write into the folder of the next run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def accelerator_of(config: TrainConfig, device: torch.device) -> Accelerator:
    """The engine for a model on that device, with this process joined to the others."""
    with needed():
        import accelerate
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise LanceError(
            "accelerate is set up for FSDP itself: choose no FSDP in `accelerate config`, and train.shard."
        )
    if config.train.shard and processes() == 1:
        raise LanceError("train.shard needs several processes: start them with torchrun, or set it to false.")
    accelerate.state.AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return accelerate.Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=config.train.accumulate,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            accelerate.DistributedDataParallelKwargs(find_unused_parameters=True),
            accelerate.InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def sharded(trainee: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> nn.Module:
    """The trainee with its weights dealt out to all processes, which come together a layer at a time when needed.

    By torch's own `fully_shard`, for accelerate has it on GPUs alone. Weights and gradients stay float32.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise LanceError("train.shard needs torch 2.6 or newer: update torch, or set it to false.") from None
    from torch.distributed.device_mesh import init_device_mesh

    register_run()
    inside = {module for layer in layers for module in layer.modules()}
    for layer in layers:
        layer.register_forward_hook(partial(use_in_layer, places_of(layer)))
    trainee.register_forward_hook(partial(use_in_loss, places_of(trainee, inside)))
    mesh = init_device_mesh(device.type, (processes(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(trainee, mesh=mesh)


def places_of(module: nn.Module, without: Container[nn.Module] = ()) -> list[tuple[nn.Module, str]]:
    """Where a module's trained weights are, but for those of some of its modules."""
    owners = [owner for owner in module.modules() if owner not in without]
    return [
        (owner, name)
        for owner in owners
        for name, weight in owner.named_parameters(recurse=False)
        if weight.requires_grad
    ]


def nothing_of(places: list[tuple[nn.Module, str]]) -> Tensor | float:
    """0, which depends on each of these weights.

    Processes add up the gradients of a group of weights together. Where one process's batch had no use for some of
    them, as pictures for a question about none, the others would wait for it for ever.
    """
    return 0 * sum(getattr(owner, name).flatten()[0] for owner, name in places)


def use_in_layer(places: list[tuple[nn.Module, str]], layer: nn.Module, args: Any, runs: list[Run]) -> list[Run]:
    nothing = nothing_of(places)  # to every stream: of the last layer's a loss may use any one
    return [replace(run, streams=tuple(x + nothing for x in run.streams)) for run in runs]


def use_in_loss(places: list[tuple[nn.Module, str]], trainee: nn.Module, args: Any, losses: dict[str, Tensor]) -> dict:
    return {**losses, "loss": losses["loss"] + nothing_of(places)}


def register_run() -> None:
    """Lets FSDP2 find the tensors in what the layers take and give, to know when their weights are needed."""
    from torch.utils import _pytree

    if Run not in _pytree.SUPPORTED_NODES:
        _pytree.register_pytree_node(
            Run,
            lambda run: ([run.streams, run.cos, run.sin], run.attend),
            lambda values, attend: Run(*values, attend),
        )


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, which is all of it where nothing is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like(weight: Tensor, share: Tensor) -> Tensor:
    """A share as a tensor that is distributed as that weight is, on its device."""
    share = share.to(weight.device)
    if not hasattr(weight, "to_local"):
        return share
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        share, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
