"""What Lance costs on a CPU, with random weights in float32: `python benchmarks/cpu.py [--repeats 5] [--threads 2]`.

Two sizes, each in a process of its own, so that their memory peaks do not mix. README.md says how each figure is
measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from operations import Operations, count, count_per_call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lance_core import flow, stages, text
from lance_core.checkpoint import Lance
from lance_core.config import LanceConfig, TextConfig
from lance_core.sequence import Sequence, build, context_blocks
from lance_core.tiny import TINY_TEXT, TINY_VISION, random_lance

PROMPT = "A red fox sleeps on a mossy stone while snow falls slowly through the birch trees behind it."
SEEN = (1, 9, 9)  # tokens of a reference in the vision tower: 252x252
ANSWER = 64  # tokens written when decoding is timed


@dataclass(frozen=True)
class Size:
    """A model and a picture. The MLP is 5.375 times as wide as the model, as in the release."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    sections: tuple[int, int, int]
    side: int  # of the picture, in latent rows
    steps: int = 8

    @property
    def text(self) -> TextConfig:
        return TextConfig(
            vocab_size=TINY_TEXT.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11008 // 2048,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            mrope_section=self.sections,
        )

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.hidden}, {16 * self.side}x{16 * self.side}, {self.side**2:,} tokens"


SIZES = {
    "a": Size(hidden=512, layers=8, heads=16, kv_heads=2, sections=(4, 6, 6), side=16),
    "b": Size(hidden=64, layers=4, heads=4, kv_heads=2, sections=(2, 3, 3), side=48),
}


def model(size: Size) -> Lance:
    """A random Lance of this size; the vision tower and the VAE are not measured, and tiny."""
    return random_lance(LanceConfig(size.text, replace(TINY_VISION, out_hidden_size=size.hidden)))


@dataclass(frozen=True)
class Request:
    """A text-to-image or an edit request, from what comes before the decoder to a latent."""

    lance: Lance
    size: Size
    task: str  # "generate" or "edit"

    @property
    def grid(self) -> tuple[int, int, int]:
        return 1, self.size.side, self.size.side

    @property
    def request(self) -> stages.Request:
        """The request as `stages` takes it; references are drawn at random."""
        if self.task == "generate":
            return stages.Request("generate", PROMPT)
        _, h, w = SEEN
        seen = stages.Semantic(drawn(h * w, self.size.hidden), (1, 2 * h, 2 * w), "image")
        return stages.Request("edit", PROMPT, (seen,), (drawn(1, 48, *self.grid),))

    @property
    def sequence(self) -> Sequence:
        """The tokens, as `stages` lays them out."""
        return self.request.sequence(self.lance.tokenizer, self.lance.config.text, self.grid)

    def run(
        self, steps: int, on_step: stages.OnStep | None = None, guidance: float = 4.0, noise: Tensor | None = None
    ) -> Tensor:
        """The latent `[1, 48, 1, h, w]` after some steps, the same every time."""
        sampling = stages.Sampling(steps, guidance, 3.5, (0.4, 1.0), "global", 0.0)
        noise = drawn(1, 48, *self.grid) if noise is None else noise
        with torch.inference_mode():
            return stages.paint(self.lance, self.request, sampling, noise, None, on_step)

    def prefill(self) -> list[stages.Branch]:
        """The contexts of both branches."""
        with torch.inference_mode():
            return stages.branches(self.lance, self.request, self.grid, guided=True)

    def step_seconds(self) -> tuple[list[float], list[float]]:
        """Of one run: guided and plain steps, but for the first, which also computes the context."""
        marks = []
        self.run(self.size.steps, lambda step, steps, estimate: marks.append(time.perf_counter()))
        guided = flow.guided_steps(flow.schedule(self.size.steps, 3.5), (0.4, 1.0))
        steps = [(b - a, flag) for a, b, flag in zip(marks, marks[1:], guided[1:])]
        return [s for s, flag in steps if flag], [s for s, flag in steps if not flag]

    def one_step(self) -> Operations:
        """The operations of one guided step, the whole loop included."""
        return count(lambda: self.run(3)) - count(lambda: self.run(2))

    def layers(self, guidance: float = 4.0) -> list[Operations]:
        """The operations of every layer in one step, branch by branch."""
        layers = self.lance.transformer.language_model.model.layers
        branches = 1 if guidance == 1 else 2
        return count_per_call(layers, lambda: self.run(1, guidance=guidance))[-branches * len(layers) :]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def answer(lance: Lance, length: int) -> list[int]:
    """Greedy tokens of an answer about a picture, read back one by one as `understand` does to know when to stop."""
    sequence = build(lance.tokenizer, "understand", "image", PROMPT, semantics=[SEEN])
    known = len(lance.tokenizer)

    def pick(logits: Tensor) -> Tensor:
        return logits[:known].argmax(keepdim=True)

    with torch.inference_mode():
        *blocks, last = context_blocks(sequence, [drawn(SEEN[1] * SEEN[2], lance.config.text.hidden_size)], [])
        context = lance.transformer.prefill([*blocks, last.without_last()])
        position = int(sequence.positions[0, -1])
        tokens = text.tokens(lance.transformer, context, last.ids[-1:], position, pick, length)
        return [int(token) for token in tokens]


def tokens_per_second(answer: Callable[[int], object], repeats: int) -> float:
    """Of the tokens behind the first, so that the prompt does not count."""
    spans = [seconds(lambda: answer(ANSWER)) - seconds(lambda: answer(1)) for _ in range(repeats)]
    return (ANSWER - 1) / min(spans)


class Products(TorchDispatchMode):
    """Collects the matrix products of what runs under it, as calls that repeat them into memory of their own."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::linear":
            x, weight = args[0].reshape(-1, args[0].shape[-1]).clone(), args[1].T
            self.add(torch.mm, x, weight)
        elif name == "aten::scaled_dot_product_attention":
            q, k, v = args[:3]
            groups = q.shape[1] // k.shape[1]
            q = q.flatten(0, 1).contiguous()
            k, v = (x.repeat_interleave(groups, 1).flatten(0, 1).contiguous() for x in (k, v))
            self.add(torch.bmm, q, k.mT)
            self.add(torch.bmm, torch.rand(len(q), q.shape[1], k.shape[1]), v)
        return func(*args, **(kwargs or {}))

    def add(self, product: Callable[..., Tensor], a: Tensor, b: Tensor) -> None:
        out = product(a, b)
        self.flops += 2 * out.numel() * a.shape[-1]
        self.calls.append(lambda: product(a, b, out=out))


def products(request: Request) -> Products:
    """The matrix products of one guided step: both branches, all layers."""
    cond, uncond = request.prefill()
    rows = drawn(1, request.size.side**2, 48)
    recorder = Products()
    with torch.inference_mode(), recorder:
        for branch in (cond, uncond):
            request.lance.transformer.denoise(rows, torch.ones(1, 1), branch.block, branch.context)
    return recorder


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(size: Size, repeats: int) -> dict[str, float]:
    """All figures of one size. Times are the least that was seen: other programs can only add."""
    lance = model(size)
    peaks = {"peak memory with the weights alone, GB": peak_gigabytes()}
    figures: dict[str, float] = {}
    for label, task in (("text to image", "generate"), ("image edit", "edit")):
        request = Request(lance, size, task)
        request.run(2)
        guided, plain = zip(*(request.step_seconds() for _ in range(repeats)))
        figures[f"{label}: guided step, s"] = least(guided)
        figures[f"{label}: plain step, s"] = least(plain)
        figures[f"{label}: prefill of both branches, s"] = min(seconds(request.prefill) for _ in range(repeats))
    figures["decode, tokens/s"] = tokens_per_second(partial(answer, lance), repeats)
    peaks["peak memory, GB"] = peak_gigabytes()
    for label, task in (("text to image", "generate"), ("image edit", "edit")):
        figures |= operation_figures(Request(lance, size, task), label)
    smaller = Request(lance, replace(size, side=size.side // 2), "generate")
    figures["operations per layer and branch, a quarter of the tokens"] = most(smaller.layers())
    return figures | product_figures(Request(lance, size, "generate"), repeats) | peaks


def least(runs: Iterable[list[float]]) -> float:
    return min(chain.from_iterable(runs))


def operation_figures(request: Request, label: str) -> dict[str, float]:
    layers, step = request.layers(), request.one_step()
    return {
        f"{label}: operations per layer and branch": most(layers),
        f"{label}: the same with views": max(o.computed.total() + o.views.total() for o in layers),
        f"{label}: operations per guided step": step.computed.total(),
        f"{label}: waits for the host per guided step": step.waits.total(),
    }


def most(layers: list[Operations]) -> int:
    return max(operations.computed.total() for operations in layers)


def product_figures(request: Request, repeats: int) -> dict[str, float]:
    """Guided steps and their bare matrix products in turn, so that both meet the machine in the same state."""
    recorded = products(request)
    bare, ours = [], []
    with torch.inference_mode():
        for _ in range(repeats):
            ours += request.step_seconds()[0]
            bare += [seconds(lambda: [call() for call in recorded.calls]) for _ in range(5)]
    return {
        "matrix products of a guided step, GFLOP": recorded.flops / 1e9,
        "the products alone, s": min(bare),
        "the products alone, GFLOP/s": recorded.flops / 1e9 / min(bare),
        "share of their rate that a guided step reaches, %": 100 * min(bare) / min(ours),
    }


def peak_gigabytes() -> float:
    """The most memory this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def table(columns: dict[str, dict[str, float]]) -> str:
    """Rows of figures, one column per size; '-' where a size lacks one."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{title:>14}" for title in columns)]
    for name in names:
        cells = (f"{column[name]:.4g}" if name in column else "-" for column in columns.values())
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5, help="how often every time is taken (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--size", choices=SIZES, help="measure this size only, and print JSON")
    return parser


def in_own_processes(script: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What `script --size NAME` prints for every size, under the same options."""
    columns = {}
    for name in SIZES:
        given = {key: value for key, value in vars(options).items() if key != "size"}
        command = [sys.executable, script, "--size", name, *(f"--{key}={value}" for key, value in given.items())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        columns[f"size ({name})"] = json.loads(done.stdout.splitlines()[-1])
    return columns


def report(script: str, options: argparse.Namespace, measure: Callable[[Size], dict]) -> None:
    """Prints what a script measures: of one size as JSON, or of all as a table."""
    torch.set_num_threads(options.threads)
    if options.size:
        print(json.dumps(measure(SIZES[options.size])))
        return
    print(f"torch {torch.__version__}, {options.threads} threads, float32")
    print("\n".join(f"size ({name}): {size}" for name, size in SIZES.items()))
    print(table(in_own_processes(script, options)))


def main() -> None:
    options = arguments().parse_args()
    report(__file__, options, lambda size: measure(size, options.repeats))


if __name__ == "__main__":
    main()
