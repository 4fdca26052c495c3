"""What the released model costs on a GPU, with random weights: `python benchmarks/gpu.py [--weights fp8] [--memory 8]`.

Every task is a process of its own: a request that warms up, then `--repeats` whose times are medians. Steps are timed
one by one, so that a few of them say what 30 take: a request's time is prefill, 26 guided steps and 4 plain ones.
`--fraction-gib 8 12 16 24` asks instead which tasks complete where the allocator may hold no more; `--parity` compares
results with the official recordings and between the ways of running. `--device cpu --tiny` tries the same on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

import torch
from branches import GRIDS, together_or_in_turn
from device import GIB, Reading, Watch, Watched, dense_rate, peak_rate
from measuring import in_own_process, seconds, table
from released import TASKS, TINY_TASKS, Form, Task, official_steps, random_model, sampling_flops
from workload import ANSWER, PROMPT

from lance_core import LanceError, flow, stages
from lance_core.checkpoint import COMPUTE_TYPES, Lance, resolve_device
from lance_core.flow import Sampling
from lance_core.placement import resolve_memory
from lance_core.quantized import FORMATS

CONTEXT = 1.0  # GiB of a card that are not the allocator's to give: the CUDA context, and what the desktop shows


def form_of(options: argparse.Namespace) -> Form:
    device = resolve_device(options.device)
    memory = options.memory
    if memory is None and options.fraction_gib:
        memory = options.fraction_gib[0] - CONTEXT
    return Form(
        device,
        COMPUTE_TYPES[options.dtype],
        options.weights,
        resolve_memory("auto" if memory is None else memory, device),
        options.tiny,
        options.compile,
    )


def interval(steps: int) -> tuple[float, float]:
    """The official interval of guidance; of fewer than 30 steps one under which only the last is plain."""
    if steps >= Sampling.steps:
        return Sampling.interval
    *_, before, last, _ = flow.schedule(steps, Sampling.shift).tolist()
    return (before + last) / 2, 1.0


def picture(width: int, height: int) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))


def paint(lance: Lance, task: Task, steps: int, watch: Watch) -> dict[str, list[float]]:
    """Seconds of a request's steps: the first with the prefill, the other guided ones, the plain ones."""
    options = dict(steps=steps, guidance_interval=interval(steps), seed=1)
    if task.kind == "edit":
        small, large = picture(task.seen, task.seen), picture(task.width, task.height)
        with watch.phase("look"):
            seen = stages.encode_semantic(lance, small, resolution=None)
        with watch.phase("encode"):
            latent = stages.encode_latent(lance, large, resolution=None)
        with watch.phase("sample") as clock:
            result = stages.edit(lance, seen, latent, PROMPT, on_step=clock.mark, **options)
    else:
        size = dict(width=task.width, height=task.height, frames=task.frames)
        with watch.phase("sample") as clock:
            result = stages.generate(lance, PROMPT, on_step=clock.mark, **size, **options)
    with watch.phase("decode"):
        frames = stages.decode_video(lance, result)
    if not result.isfinite().all() or not frames.isfinite().all():
        raise SystemExit("the result is not finite: the figures would mean nothing")
    first, *spans, _ = clock.spans()
    guided = flow.guided_steps(flow.schedule(steps, Sampling.shift), interval(steps))[1:]
    kinds = {True: "guided", False: "plain"}
    found = {"first": [first], "guided": [], "plain": []}
    for span, flag in zip(spans, guided):
        found[kinds[flag]].append(span)
    return found


def ask(lance: Lance, task: Task, watch: Watch) -> dict[str, list[float]]:
    """Seconds to the first token behind the look at the picture, and of every further one."""
    media = picture(task.seen, task.seen)
    with watch.phase("look"):
        seen = stages.encode_semantic(lance, media, resolution=None)
    with watch.phase("answer") as clock:
        stages.understand(lance, seen, PROMPT, max_new_tokens=ANSWER, on_token=clock.mark)
    first, *tokens, _ = clock.spans()
    return {"first": [first], "token": tokens}


def request(lance: Lance, task: Task, steps: int, watch: Watch) -> dict[str, list[float]]:
    return ask(lance, task, watch) if task.kind == "question" else paint(lance, task, steps, watch)


def measure(task: Task, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Times of a task and memory of its phases; compiling and other first times apart."""
    form = form_of(options)
    lance = random_model(form, Watched)
    first, watch, spans = Watch(lance), Watch(lance), {}
    lance.placement.noting = True
    warm_up = seconds(lambda: request(lance, task, options.steps, first))
    lance.placement.noting = False
    for _ in range(options.repeats):
        for name, found in request(lance, task, options.steps, watch).items():
            spans.setdefault(name, []).extend(found)
    typical = {name: median(found) for name, found in spans.items()}
    phases = {name: median(r.seconds for r in readings) for name, readings in watch.readings.items()}
    times = {"first request, compiling and estimates included, s": warm_up}
    if task.kind == "question":
        times |= answer_times(phases, typical)
    else:
        times |= painting_times(phases, typical) | limits(lance, task, typical, form.tiny)
    estimates = {name: reading.estimated for name, (reading,) in first.readings.items()}
    return {"times": times, "memory": memory_figures(watch.readings, estimates)}


def answer_times(phases: dict[str, float], typical: dict[str, float]) -> dict[str, float]:
    return {
        "look, s": phases["look"],
        "first token, look and prefill included, ms": 1e3 * (phases["look"] + typical["first"]),
        "tokens/s": 1 / typical["token"],
    }


def sampling_seconds(typical: dict[str, float]) -> float:
    """Of the official schedule: prefill, guided steps, plain steps."""
    guided, plain = official_steps()
    return typical["first"] + (guided - 1) * typical["guided"] + plain * typical["plain"]


def painting_times(phases: dict[str, float], typical: dict[str, float]) -> dict[str, float]:
    others = {f"{name}, s": phases[name] for name in ("look", "encode", "decode") if name in phases}
    return {
        "before the first step, ms": 1e3 * max(0.0, typical["first"] - typical["guided"]),
        "guided step, ms": 1e3 * typical["guided"],
        "plain step, ms": 1e3 * typical["plain"],
        "sampling, 26 guided and 4 plain steps, s": sampling_seconds(typical),
        **others,
        "whole request, s": sampling_seconds(typical) + sum(others.values()),
    }


def limits(lance: Lance, task: Task, typical: dict[str, float], tiny: bool) -> dict[str, float]:
    """How long the layers' matrix products would take at the device's rate, and how many times that sampling takes."""
    flops = sampling_flops(lance.config.text, task.tokens, context_lengths(lance, task), Sampling())
    rate = dense_rate(lance.device, 256 if tiny else 8192)
    ours = sampling_seconds(typical)
    figures = {
        "products of the layers, TFLOP": flops / 1e12,
        "dense bf16 rate measured here, TFLOP/s": rate / 1e12,
        "the products at that rate, s": flops / rate,
        "sampling / that": ours * rate / flops,
    }
    peak = peak_rate(torch.cuda.get_device_name(lance.device)) if lance.device.type == "cuda" else None
    if peak:
        figures |= {"data sheet's rate, TFLOP/s": peak / 1e12, "sampling / the products at it": ours * peak / flops}
    return figures


def context_lengths(lance: Lance, task: Task) -> tuple[int, int]:
    """Tokens before the noise block in both branches."""
    references = {}
    if task.kind == "edit":
        h = task.seen // 14
        seen = stages.Semantic(torch.zeros(h * h // 4, lance.config.text.hidden_size), (1, h, h), "image")
        references = {"semantics": (seen,), "latents": (torch.zeros(1, 48, *task.grid),)}
    cond = stages.Request(task.kind, PROMPT, **references)
    sequences = [r.sequence(lance.tokenizer, lance.config.text, task.grid) for r in (cond, cond.against())]
    lengths = [sequence.find("noise")[0].start for sequence in sequences]
    return lengths[0], lengths[1]


def memory_figures(readings: dict[str, list[Reading]], estimates: dict[str, int]) -> dict[str, dict[str, float]]:
    """GiB by phase, the most of all requests; the estimate's deviation from what was allocated, %."""
    figures = {}
    for name, found in readings.items():
        most = {"estimated": estimates[name] / GIB}
        for field in ("allocated", "reserved", "used", "host", "pinned"):
            values = [getattr(reading, field) for reading in found]
            if None not in values:
                most[field] = max(values) / GIB
        if "allocated" in most:
            most["deviation of the estimate, %"] = 100 * (most["estimated"] / most["allocated"] - 1)
        figures[name] = most
    return figures


def attempt(task: Task, options: argparse.Namespace) -> dict[str, object]:
    """Whether a request completes where the allocator may hold no more than `fraction_gib`; a CPU has no such limit."""
    form = form_of(options)
    if form.device.type == "cuda":
        total = torch.cuda.get_device_properties(form.device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, options.fraction_gib[0] * GIB / total), form.device.index or 0
        )
    try:
        request(lance := random_model(form, Watched), task, options.steps, watch := Watch(lance))
    except torch.OutOfMemoryError:
        return {"outcome": "out of memory"}
    except LanceError as error:
        return {"outcome": f"refused: {error}"}
    reserved = [r.reserved for readings in watch.readings.values() for r in readings if r.reserved is not None]
    return {"outcome": f"completed, {max(reserved) / GIB:.2f} GiB" if reserved else "completed, not limited"}


def child(name: str, options: argparse.Namespace, fraction: float | None = None) -> dict:
    """What one task gives in a process of its own."""
    given = [f"--tasks={name}", "--here", f"--device={options.device}", f"--dtype={options.dtype}"]
    given += [f"--steps={options.steps}", f"--repeats={options.repeats}"]
    given += [f"--{flag}" for flag in ("tiny", "compile") if getattr(options, flag)]
    given += [f"--{key}={value}" for key in ("weights", "memory") if (value := getattr(options, key)) is not None]
    given += [f"--fraction-gib={fraction}"] if fraction else []
    return in_own_process(__file__, *given)


def small_cards(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Outcomes by card and task; a process that the system ended is one, too."""
    columns = {}
    for fraction in options.fraction_gib:
        column = columns[f"{fraction:g} GiB"] = {}
        for name in options.tasks:
            try:
                column[tasks(options)[name].title] = child(name, options, fraction)["outcome"]
            except subprocess.CalledProcessError as error:
                if error.returncode > 0:
                    raise
                column[tasks(options)[name].title] = f"ended by {error.returncode}"
    return columns


def tasks(options: argparse.Namespace) -> dict[str, Task]:
    return TINY_TASKS if options.tiny else TASKS


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    made.add_argument("--steps", type=int, default=6, help="of every request, 3 or more; 30 measures all (default: 6)")
    made.add_argument("--repeats", type=int, default=5, help="requests that are timed (default: 5)")
    made.add_argument("--weights", choices=FORMATS, help="quantise (default: as --dtype)")
    made.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    made.add_argument("--memory", type=float, metavar="GIB", help="of the device (default: what is free)")
    made.add_argument("--compile", action="store_true", help="compile the layers")
    made.add_argument("--fraction-gib", type=float, nargs="+", metavar="GIB", help="say what completes on such cards")
    made.add_argument("--branches", action="store_true", help="time both branches together and in turn")
    made.add_argument("--parity", action="store_true", help="relative errors of results")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--device", default="cuda")
    made.add_argument("--tiny", action="store_true", help="a tiny model and tiny sizes, to try this program")
    made.add_argument("--here", action="store_true", help="one task in this process, as JSON")
    return made


def results(options: argparse.Namespace) -> dict[str, dict]:
    """The tables that were asked for, by their titles."""
    if options.parity:
        from agreement import figures

        return {"relative errors": figures(resolve_device(options.device))}
    if options.branches:
        lance = random_model(replace(form_of(options), compiled=False), Watched)
        grids = GRIDS[:2] if options.tiny else GRIDS
        columns = {f"{h * w:,} tokens": together_or_in_turn(lance, (1, h, w), options.repeats) for _, h, w in grids}
        return {"a guided step, branches together and in turn": columns}
    if options.fraction_gib:
        return {"what completes, and torch's largest reservation": small_cards(options)}
    found = {}
    for name in options.tasks:
        try:
            found[tasks(options)[name].title] = child(name, options)
        except subprocess.CalledProcessError as error:  # which has said what is wrong
            print(f"{tasks(options)[name].title}: ended by {error.returncode}", file=sys.stderr)
    memory = {f"memory, GiB: {title}": each["memory"] for title, each in found.items()}
    return {f"times, steps measured in requests of {options.steps}": {t: e["times"] for t, e in found.items()}} | memory


def heading(options: argparse.Namespace) -> Iterable[str]:
    device = resolve_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield f"torch {torch.__version__}, {name}, {options.weights or options.dtype}, random weights"
    if options.tiny:
        yield "a tiny model: these figures say nothing about the released one"


def main() -> None:
    options = parser().parse_args()
    if options.steps < 3:
        raise SystemExit("--steps is below 3: the first step is left out, one is guided and one plain.")
    if options.here:
        task = tasks(options)[options.tasks[0]]
        print(json.dumps(attempt(task, options) if options.fraction_gib else measure(task, options)))
        return
    found = results(options)
    if options.json:
        print(json.dumps(found))
        return
    print("\n".join(heading(options)))
    for title, columns in found.items():
        print(f"\n{title}\n{table(columns)}")


if __name__ == "__main__":
    main()
