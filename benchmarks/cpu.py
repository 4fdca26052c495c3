"""What Lance costs on a CPU, with random weights: `python benchmarks/cpu.py [--repeats 5] [--threads 2]`.

Every column is a size and a form in a process of its own, so that memory peaks do not mix. bf16 is measured where the
processor computes in it, compiled layers where there is a C++ compiler. README.md says how each figure is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from limits import products, read_rate
from measuring import in_own_process, least, peak_gigabytes, seconds, table
from operations import Operations
from workload import SIZES, TITLES, Request, Size, answer, drawn, model, seconds_per_token

from lance_core import LanceError
from lance_core.checkpoint import Lance

OPERATIONS = "operations per layer and branch"
FORMS = {"fp32": torch.float32, "bf16": torch.bfloat16, "compiled": torch.float32}
COLUMNS = (
    *(("a", form) for form in FORMS),
    *(("b", form) for form in FORMS),
    ("clip", "fp32"),
)


def measure(size: Size, repeats: int, form: str) -> dict[str, float]:
    """All figures of one size. Times are the least that was seen: other programs can only add."""
    lance = model(size, FORMS[form])
    peaks = {"peak memory with the weights alone, GB": peak_gigabytes()}
    requests = [Request(lance, size, task) for task in size.tasks]
    if form == "compiled":
        return compiled_figures(lance, requests, repeats)
    figures: dict[str, float] = {}
    for request in requests:
        figures |= request_figures(request, repeats)
    if size == SIZES["clip"]:
        peaks["peak memory, GB"] = peak_gigabytes()
        return figures | {f"{TITLES['generate']}: {OPERATIONS}": per_branch(requests[0].layers())} | peaks
    figures |= decode_figures(lance, repeats) | vae_figures(lance, repeats)
    peaks["peak memory, GB"] = peak_gigabytes()
    figures |= decode_limits(lance, figures["decode, tokens/s"], repeats)
    for request in requests:
        figures |= operation_figures(request)
    quarter = Request(lance, size.smaller, "generate")
    figures[f"{OPERATIONS}, a quarter of the tokens"] = per_branch(quarter.layers())
    return figures | product_figures(requests[0], repeats) | peaks


def compiled_figures(lance: Lance, requests: list[Request], repeats: int) -> dict[str, float]:
    """Compiled layers: how long the first of everything takes, and then what eager ones are measured by."""
    lance.transformer.compile_layers(lance.device)
    compiling = sum(seconds(lambda: request.run(2)) for request in requests) + seconds(lambda: answer(lance, 2))
    figures = {"first requests, compiling included, s": compiling}
    for request in requests:
        figures |= request_figures(request, repeats)
    return figures | decode_figures(lance, repeats) | {"peak memory, GB": peak_gigabytes()}


def request_figures(request: Request, repeats: int) -> dict[str, float]:
    """Steps and prefill of a request."""
    title, figures = TITLES[request.task], {}
    request.run(1)
    repeats = repeats if len(request.size.tasks) > 1 else 1  # a clip's step takes seconds
    guided, plain = zip(*(request.step_seconds() for _ in range(repeats)))
    figures[f"{title}: guided step, ms"] = 1e3 * least(guided)
    if any(plain):
        figures[f"{title}: plain step, ms"] = 1e3 * least(plain)
    figures[f"{title}: prefill of both branches, ms"] = 1e3 * min(seconds(request.prefill) for _ in range(repeats))
    return figures


def decode_figures(lance: Lance, repeats: int) -> dict[str, float]:
    return {"decode, tokens/s": 1 / seconds_per_token(partial(answer, lance), repeats)}


def decode_limits(lance: Lance, tokens_per_second: float, repeats: int) -> dict[str, float]:
    """What bounds the writing of text: the products of one token alone, and reading the weights."""
    token = products(lambda: answer(lance, 2), after=lambda: answer(lance, 1))
    alone = 1 / min(seconds(token.repeat) for _ in range(20 * repeats))
    rate, own = read_rate(repeats), token.read * tokens_per_second
    return {
        "weights read for a token, MB": token.read / 1e6,
        "decode: weights read, GB/s": own / 1e9,
        "reading memory alone, GB/s": rate / 1e9,
        "share of that rate, %": 100 * own / rate,
        "the products of a token alone, tokens/s": alone,
        "share of their rate that decode reaches, %": 100 * tokens_per_second / alone,
    }


def vae_figures(lance: Lance, repeats: int) -> dict[str, float]:
    """A picture of 256x256."""
    pixels, latent = (x.to(lance.dtype) for x in (drawn(1, 3, 1, 256, 256), drawn(1, 48, 1, 16, 16)))
    encode = inference(partial(lance.vae.encode, pixels.clamp(-1, 1)))
    decode = inference(partial(lance.vae.decode, latent))
    return {
        "VAE encode of 256x256, ms": 1e3 * min(seconds(encode) for _ in range(1 + repeats)),
        "VAE decode of 256x256, ms": 1e3 * min(seconds(decode) for _ in range(1 + repeats)),
    }


def inference(call: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(call)


def operation_figures(request: Request) -> dict[str, float]:
    title, step, layers = TITLES[request.task], request.one_step(), request.layers()
    return {
        f"{title}: {OPERATIONS}": per_branch(layers),
        f"{title}: the same with views": max(o.computed.total() + o.views.total() for o in layers) / 2,
        f"{title}: operations per guided step": step.computed.total(),
        f"{title}: waits for the host per guided step": step.waits.total(),
    }


def per_branch(layers: list[Operations]) -> float:
    """Operations of the busiest layer in a guided step, for one of the two branches."""
    return max(operations.computed.total() for operations in layers) / 2


def product_figures(request: Request, repeats: int) -> dict[str, float]:
    """Guided steps and their bare matrix products in turn, so that both meet the machine in the same state."""
    recorded = products(lambda: request.run(2), after=lambda: request.run(1))
    bare, ours = [], []
    for _ in range(repeats):
        ours += request.step_seconds()[0]
        bare += [seconds(recorded.repeat) for _ in range(5)]
    return {
        "matrix products of a guided step, GFLOP": recorded.flops / 1e9,
        "the products alone, ms": 1e3 * min(bare),
        "the products alone, GFLOP/s": recorded.flops / 1e9 / min(bare),
        "share of their rate that a guided step reaches, %": 100 * min(bare) / min(ours),
    }


def forms() -> list[str]:
    """What this machine can measure."""
    found = ["fp32"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.append("bf16")
    if compiler():
        found.append("compiled")
    return found


def compiler() -> bool:
    try:
        model(SIZES["tiny"]).transformer.compile_layers(torch.device("cpu"))
    except LanceError:
        return False
    return True


def chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Columns of the table: all, or those of one size, in all forms that there are, or in those asked for."""
    columns = COLUMNS if options.size in (None, *dict(COLUMNS)) else [(options.size, form) for form in FORMS]
    usable = options.forms or forms()
    return [(size, form) for size, form in columns if options.size in (None, size) and form in usable]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5, help="how often every time is taken (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--size", choices=SIZES, help="measure this size only")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="measure these only (default: what the machine can)")
    parser.add_argument("--here", action="store_true", help="one size and form in this process, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(measure(SIZES[options.size], options.repeats, options.forms[0])))
        return
    columns = chosen(options)
    print(f"torch {torch.__version__}, {options.threads} threads, random weights; compiled is fp32")
    print("\n".join(f"({name}): {SIZES[name]}" for name in dict(columns)))
    given = ("--here", f"--repeats={options.repeats}", f"--threads={options.threads}")
    measured = {
        f"({size}) {form}": in_own_process(__file__, *given, f"--size={size}", f"--forms={form}")
        for size, form in columns
    }
    print(table(measured))


if __name__ == "__main__":
    main()
