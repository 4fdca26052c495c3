"""Saved states of a run: folders that are complete or not there, from the newest of which the run goes on.

Each holds one safetensors file, or one per process where weights are sharded, and `state.json` with the rest. A folder
gets its name when all is written, so that an end at any moment, or a full disk, leaves the state before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import read_json
from ..errors import LanceError
from ..storage import brief, save_tensors
from .batches import Share

if TYPE_CHECKING:
    from accelerate import Accelerator

PREFIX, DIGITS, FACTS, PART = "step_", 8, "state.json", ".part"
FROZEN = "frozen weights"  # among the essentials
SAMPLED = 1024  # numbers of a weight that its fingerprint is of, about


@dataclass(frozen=True)
class Facts:
    """What a state knows beside its tensors. cursors: of every process, how many examples it has been through.

    files: of tensors: one, or one per process. essentials: of the run's configuration, and a fingerprint of the weights
    that are not trained.
    """

    step: int
    cursors: tuple[int, ...]
    files: int
    essentials: dict[str, Any]

    def cursor(self, share: Share) -> int:
        """Where a process goes on in the data; with another number of processes a few examples may be left out."""
        if len(self.cursors) == share.count:
            return self.cursors[share.rank]
        return -(-max(self.cursors) * len(self.cursors) // share.count)


def newest(folder: Path) -> Path | None:
    """The newest complete state in a run's folder of them."""
    return max(states(folder), default=None)


def states(folder: Path) -> list[Path]:
    return sorted(folder.glob(PREFIX + "[0-9]" * DIGITS))


def save_state(folder: Path, facts: Facts, tensors: dict[str, Tensor], accelerator: Accelerator, keep: int) -> Path:
    """Writes a state, by all processes together, then removes all but the newest `keep`; returns its folder.

    Raises LanceError on every process where one could not write its share.
    """
    path = folder / f"{PREFIX}{facts.step:0{DIGITS}d}"
    part = folder / f".{path.name}{PART}"
    problem, rank = None, accelerator.process_index
    if accelerator.is_main_process:
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    if rank < facts.files:
        problem = attempt(write_share, part, rank, tensors)
    if not anywhere(problem is not None, accelerator) and accelerator.is_main_process:
        problem = attempt(complete, part, path, facts)
    if anywhere(problem is not None, accelerator):  # all end together: none waits for one that failed
        shutil.rmtree(part, ignore_errors=True)
        raise _unwritten(path, problem or "another process failed", newest(folder))
    if accelerator.is_main_process:
        for old in states(folder)[:-keep]:
            remove(old)
    accelerator.wait_for_everyone()
    return path


def attempt(write: Callable[..., None], *args: Any) -> str | None:
    """Calls write(*args) and returns why nothing could be written, or None."""
    try:
        write(*args)
    except OSError as error:
        return error.strerror or brief(error)
    return None


def write_share(part: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    part.mkdir(parents=True, exist_ok=True)
    save_tensors(on_cpu(tensors), part / shard_name(rank))


def complete(part: Path, path: Path, facts: Facts) -> None:
    (part / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)


def _unwritten(path: Path, reason: str, last: Path | None) -> LanceError:
    safe = f"{last.name} is safe and the run goes on from it" if last else "the run begins anew"
    return LanceError(f"{path} cannot be written ({reason}): make room and start again, {safe}.")


def shard_name(rank: int) -> str:
    return f"tensors_{rank:05d}.safetensors"


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def anywhere(value: bool, accelerator: Accelerator) -> bool:
    """Whether that is so in any process."""
    if accelerator.num_processes == 1:
        return value
    flag = torch.tensor(float(value), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def remove_leftovers(folder: Path) -> None:
    """What an end in the middle of writing or removing a state has left."""
    for part in folder.glob(f".{PREFIX}*{PART}"):
        shutil.rmtree(part, ignore_errors=True)


def remove_all(folder: Path) -> None:
    """Removes all states, and nothing else that the folder may hold."""
    for path in states(folder):
        remove(path)
    remove_leftovers(folder)


def remove(path: Path) -> None:
    """Removes a state; it stops being one at once."""
    doomed = path.with_name(f".{path.name}{PART}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_facts(path: Path) -> Facts:
    values = read_json(path / FACTS, f"remove {path}, so that the run goes on from the state before it")
    return Facts(values["step"], tuple(values["cursors"]), values["files"], values["essentials"])


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """The same for equal weights alone, whatever dtype they are computed with; only some numbers of each are read."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + some.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_essentials(path: Path, facts: Facts, essentials: dict[str, Any]) -> None:
    """Raises LanceError where a state was made by a run of something else."""
    for name in [*essentials, *facts.essentials]:
        then, now = (values.get(name, "absent") for values in (facts.essentials, essentials))
        if then != now and name != FROZEN:
            raise LanceError(
                f"{path} was made with {name} = {then!r} and the configuration says {now!r}: change it back, name"
                " another output, or begin anew with --fresh."
            )
    if facts.essentials.get(FROZEN) != essentials.get(FROZEN):
        raise LanceError(
            f"{path} was made beside other weights than those of this model: give that one, name another output, or"
            " begin anew with --fresh."
        )


def read_tensors(path: Path, facts: Facts, share: Share, sharded: bool) -> dict[str, Tensor]:
    """A state's tensors, or this process's share of them, by however many processes they were written."""
    cure = f"remove {path}, so that the run goes on from the state before it"
    if sharded and facts.files == share.count > 1:
        return _load(path / shard_name(share.rank), cure)
    files = [_load(path / shard_name(rank), cure) for rank in range(facts.files)]
    whole = {
        name: torch.cat([file[name] for file in files]) if tensor.ndim and len(files) > 1 else tensor
        for name, tensor in files[0].items()
    }
    return {name: chunk(tensor, share) for name, tensor in whole.items()} if sharded else whole


def chunk(tensor: Tensor, share: Share) -> Tensor:
    """This process's rows, as FSDP2 deals them out."""
    if not tensor.ndim:
        return tensor
    chunks = tensor.chunk(share.count)
    return chunks[share.rank] if share.rank < len(chunks) else tensor[:0]


def _load(path: Path, cure: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LanceError(f"{path} cannot be read ({brief(error)}); {cure}.") from None
