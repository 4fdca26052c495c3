"""The command line: `python -m lance_core` and understand, generate, edit, decode, inspect, quantize, ... or run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from . import stages
from .adapters import apply_loras, parse_lora
from .bars import Bars
from .checkpoint import Lance, empty_parts, resolve_dtype
from .checks import check_whole
from .config import TEMPORAL_COMPRESSION, VIDEO_FPS
from .errors import LanceError, warnings_shown
from .flow import RENORMS, Sampling
from .inspection import inspect
from .layout import BUILT_IN, BUILT_IN_FOLDER, find_checkpoint
from .media import read_image, read_media, replacing, write_mp4, write_png
from .merging import merge_checkpoint
from .needs import Job, report
from .placement import resolve_memory
from .quantized import FORMATS, STORED_FORMATS
from .quantizing import quantize_checkpoint
from .resize import RESOLUTION_CHOICES, resolution_of
from .storage import save_tensors
from .tiny import make_tiny
from .workflow import Result, read_workflow, run_workflow

LATENT_SUFFIXES = (".safetensors", ".latent")
SUFFIXES = (".png", ".mp4", *LATENT_SUFFIXES)
MAX_FPS = 240
FULL = "error: the memory is full; choose a smaller size, fewer frames or --tile 16."
FULL_TRAINING = (
    "error: the memory is full; give fewer train.tokens, or train.checkpointing = true (--plan says what helps)."
)


class Typewriter:
    """Shows a growing text on stdout."""

    def __init__(self):
        self.shown = ""

    def __call__(self, text: str) -> None:
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def load(args: argparse.Namespace) -> Lance:
    options = {name: getattr(args, name) for name in ("device", "dtype", "weights", "memory", "compiled")}
    return apply_loras(stages.load_lance(args.model, **options), getattr(args, "lora", ()))


def load_for(output: Path, args: argparse.Namespace) -> Lance:
    """The model for a result of that kind; LanceError, before any work, where it cannot make one."""
    lance = load(args)
    if output.suffix.lower() not in LATENT_SUFFIXES:
        stages.vae_of(lance)
    return lance


def resolution(args: argparse.Namespace) -> str | None:
    return resolution_of(args.resolution)


def understand(args: argparse.Namespace, bars: Bars) -> None:
    lance = load(args)
    media = [read_media(path) for path in args.media]
    semantics = [
        stages.encode_semantic(lance, pixels, resolution=resolution(args), kind=kind) for pixels, kind in media
    ]
    subject = stages.read(lance, semantics, system=args.system) if semantics else None
    for question in args.questions:
        answer(lance, subject, question, args, bars)


def answer(lance: Lance, subject: stages.Reading | None, question: str, args: argparse.Namespace, bars: Bars) -> None:
    """Prints the answer to one question, on a terminal while it is written."""
    typewriter = Typewriter()
    counted = 0

    def count(text: str) -> None:
        nonlocal counted
        counted += 1
        bars("answer", counted, args.max_new_tokens)

    written = stages.understand(
        lance,
        subject,
        question,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        on_token=typewriter if sys.stdout.isatty() else count,
    )
    bars.close()
    typewriter(written)
    print()


def sampling(args: argparse.Namespace, bars: Bars) -> dict:
    """What `generate` and `edit` have in common."""
    return {
        "steps": args.steps,
        "guidance": args.guidance,
        "shift": args.shift,
        "guidance_interval": tuple(args.guidance_interval),
        "renorm": args.renorm,
        "renorm_min": args.renorm_min,
        "guidance_every": args.guidance_every,
        "cache_threshold": args.cache_threshold,
        "seed": args.seed,
        "on_step": lambda step, steps, estimate: bars(args.name, step, steps),
    }


def generate(args: argparse.Namespace, bars: Bars) -> None:
    is_clip = args.first_frame is not None or (args.output is not None and args.output.suffix.lower() == ".mp4")
    given = args.frames if args.frames is not None else None if is_clip else 1
    output = output_path(args.output, Path(f"lance_{args.seed}"), given, args.fps, args.tile)
    lance, first = load_for(output, args), None
    frames = lance.config.resolutions.video.frames if given is None else given
    if args.first_frame is not None:
        bucket = lance.config.resolutions.video if args.resolution == "auto" else resolution(args)
        first = stages.encode_latent(lance, read_image(args.first_frame), resolution=bucket)
    latent = stages.generate(
        lance,
        args.prompt,
        width=args.width,
        height=args.height,
        frames=frames,
        first_frame=first,
        **sampling(args, bars),
    )
    save(lance, latent, output, args, bars)


def edit(args: argparse.Namespace, bars: Bars) -> None:
    media = [read_media(path) for path in args.media]
    frames = args.frames if args.frames is not None else media[-1][0].shape[0]
    output = output_path(args.output, Path(f"lance_{args.seed}"), frames, args.fps, args.tile)
    lance = load_for(output, args)
    bucket = resolution(args)
    latent = stages.edit(
        lance,
        [stages.encode_semantic(lance, pixels, resolution=bucket, kind=kind) for pixels, kind in media],
        [stages.encode_latent(lance, pixels, resolution=bucket) for pixels, _ in media],
        args.instruction,
        task=args.task,
        width=args.width,
        height=args.height,
        frames=args.frames,
        **sampling(args, bars),
    )
    save(lance, latent, output, args, bars)


def decode(args: argparse.Namespace, bars: Bars) -> None:
    latent = read_latent(args.latent)
    batch, _, t = latent.shape[:3] if latent.ndim == 5 else (1, 0, 1)
    frames = batch * (TEMPORAL_COMPRESSION * (t - 1) + 1)
    output = output_path(args.output, args.latent.with_suffix(""), frames, args.fps, args.tile)
    if output.suffix.lower() in LATENT_SUFFIXES:
        raise LanceError(f"the output {output} is a latent, as the input is; end it in .png or .mp4.")
    save(load(args), latent, output, args, bars)


def show_contents(args: argparse.Namespace, bars: Bars) -> None:
    print(inspect(args.path))


def show_needs(args: argparse.Namespace, bars: Bars) -> None:
    dtype = resolve_dtype("bf16" if args.dtype == "auto" else args.dtype, torch.device("cpu"))
    lance, *_ = empty_parts(find_checkpoint(args.model), dtype=dtype, weights=args.weights)
    references = int(args.task != "generate") if args.references is None else args.references
    budget = None if args.memory == "auto" else resolve_memory(args.memory, torch.device("cpu"))
    print(report(lance, Job(args.task, args.width, args.height, args.frames, references, args.tile), budget))


def write_tiny(args: argparse.Namespace, bars: Bars) -> None:
    print(make_tiny(args.folder, seed=args.seed, overwrite=args.overwrite))


def write_quantized(args: argparse.Namespace, bars: Bars) -> None:
    done = quantize_checkpoint(args.source, args.folder, args.format, overwrite=args.overwrite)
    print(f"{done.folder}: {args.format}, {done.after / 1e6:,.1f} MB instead of {done.before / 1e6:,.1f} MB")


def write_merged(args: argparse.Namespace, bars: Bars) -> None:
    print(merge_checkpoint(args.source, args.folder, args.lora, overwrite=args.overwrite).folder)


def write_converted(args: argparse.Namespace, bars: Bars) -> None:
    from .train.convert import convert_data

    done = convert_data(args.source, args.folder)
    left_out = f", {len(done.skipped)} left out" if done.skipped else ""
    print(f"{done.folder}: {counted(done.counts)}{left_out}")


def write_world(args: argparse.Namespace, bars: Bars) -> None:
    from .world.files import make_world
    from .world.scene import Vocabulary, with_new

    vocabulary = with_new(args.new) if args.new else Vocabulary()
    options = {"count": args.count, "split": args.split, "format": args.format, "seed": args.seed}
    counts = make_world(args.folder, vocabulary=vocabulary, **options)
    print(f"{args.folder}: {counted(counts)}")


def counted(records: dict[str, int]) -> str:
    return ", ".join(f"{name} with {count:,} records" for name, count in sorted(records.items()))


def train(args: argparse.Namespace, bars: Bars) -> None:
    from .train.command import first, plan_of, train_from

    if args.plan:
        print(plan_of(args.config))
        return

    def show(step: int, steps: int, values: dict[str, float]) -> None:
        bars("train", step, steps)
        if bars.bar is not None:
            bars.bar.set_postfix(loss=f"{values['loss']:.4g}")

    try:
        done = train_from(args.config, show, fresh=args.fresh, device=args.device)
        if first():
            print(done.path)
    except KeyboardInterrupt as stop:
        bars.close()
        if stop.args and first():
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
        raise


def make_nano(args: argparse.Namespace, bars: Bars) -> None:
    from .world.nano import Recipe, make_nano

    print(make_nano(args.folder, args.work, Recipe(seed=args.seed), args.device, bars))


def run(args: argparse.Namespace, bars: Bars) -> None:
    folder = args.workflow.resolve().parent

    def show(result: Result) -> None:
        bars.close()
        for line in (*((result.text,) if result.text is not None else ()), *result.files):
            print(line, flush=True)

    run_workflow(
        read_workflow(args.workflow),
        output=args.output,
        inputs=args.input or (Path.cwd(), folder),
        models=args.models or default_models(),
        overrides=args.set,
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        progress=bars,
        on_result=show,
    )


def default_models() -> tuple[Path, ...]:
    listed = os.environ.get("LANCE_MODELS", "").split(os.pathsep)
    return (*(Path(folder) for folder in listed if folder), Path("models"))


def output_path(given: Path | None, default: Path, frames: int | None, fps: float, tile: int | None) -> Path:
    """Where a result of so many frames goes; LanceError, before any work, where that kind of file cannot hold it.

    frames: None for a clip of whatever length.

    default: the path without its suffix where none is given; nothing that exists is overwritten then.
    """
    if not 0 < fps <= MAX_FPS:
        raise LanceError(f"--fps is {fps}: give a number above 0 and up to {MAX_FPS}.")
    if tile is not None:
        check_whole("--tile", tile, 2)
    if given is None:
        return unused(default.with_name(f"{default.name}{'.png' if frames == 1 else '.mp4'}"))
    if given.suffix.lower() not in SUFFIXES:
        raise LanceError(f"the output {given} is of no kind that can be written; end it in {', '.join(SUFFIXES)}.")
    if given.suffix.lower() == ".png" and frames != 1:
        several = f"there are {frames} frames" if frames else "this is a clip"
        raise LanceError(f"the output {given} is one picture, but {several}; end it in .mp4.")
    folder = next(parent for parent in given.absolute().parents if parent.exists())
    if given.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise LanceError(f"{given} cannot be written; choose another name or folder.")
    return given


def unused(path: Path) -> Path:
    """That path, or the first of `name_2`, `name_3`... that does not exist yet."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}_{number}")
    return candidate


def save(lance: Lance, latent: Tensor, output: Path, args: argparse.Namespace, bars: Bars) -> None:
    """Writes a latent, or the picture or clip it decodes to, as the output's suffix says, and prints the path."""
    suffix = output.suffix.lower()
    if suffix in LATENT_SUFFIXES:
        write_latent(latent, output)
    else:
        frames = stages.decode_video(lance, latent, tile=args.tile, on_chunk=partial(bars, "decode"))
        if suffix == ".png":
            write_png(frames, output)
        else:
            write_mp4(frames, output, fps=args.fps)
    print(output)


def write_latent(latent: Tensor, path: Path) -> None:
    """Writes a raw latent `[B, 48, T, h, w]` as ComfyUI's SaveLatent does; the file appears complete or not at all."""
    # An empty tensor of this name tells LoadLatent that the values are not scaled.
    tensors = {"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([])}
    with replacing(path) as partial:
        save_tensors(tensors, partial)


def read_latent(path: Path) -> Tensor:
    """The latent in a file of `write_latent` or of ComfyUI's SaveLatent."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise LanceError(f"{path} does not exist; check the name and the folder.") from None
    except (OSError, SafetensorError) as error:
        raise LanceError(f"{path} is not a latent that can be read ({error}); save it again.") from None
    for name in ("latent_tensor", "samples"):
        if name in tensors:
            return tensors[name].float()
    raise LanceError(f"{path} holds no 'latent_tensor'; give a file saved by generate, edit or ComfyUI's SaveLatent.")


def memory_size(text: str) -> str | float:
    """The `memory` of `load_lance`, which says what else it may be."""
    try:
        return float(text)
    except ValueError:
        return text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lance", description="Understand, generate and edit images and videos.")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")

    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    device.add_argument("--dtype", default="auto", help="auto (default: bf16, on the CPU fp32), bf16 or fp32")
    model = argparse.ArgumentParser(add_help=False, parents=[device])
    model.add_argument(
        "--model",
        type=Path,
        default=BUILT_IN_FOLDER,
        metavar="PATH",
        help=f"checkpoint, such as models/Lance_3B (default: {BUILT_IN}, the built-in toy)",
    )
    model.add_argument(
        "--weights",
        choices=("auto", *FORMATS),
        default="auto",
        help="quantise the decoder's projections while loading; auto (default): as they are stored",
    )
    model.add_argument(
        "--memory",
        type=memory_size,
        default="auto",
        metavar="GIB",
        help="device memory to make do with; what does not fit waits in the host's (auto, default: all that is free)",
    )
    model.add_argument(
        "--compile", action="store_true", dest="compiled", help="compile the layers: slow to start, then faster"
    )

    adapted = argparse.ArgumentParser(add_help=False)
    adapted.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="change the model by a LoRA, such as style.safetensors:0.8 (default: 1); may be repeated",
    )

    buckets = argparse.ArgumentParser(add_help=False)
    buckets.add_argument(
        "--resolution",
        choices=RESOLUTION_CHOICES,
        default="auto",
        help="size at which the model sees the media; native: as they are (multiples of 16, or 28 for questions)",
    )
    painting = painting_options()
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--output", type=Path, metavar="FILE", help=f"file to write, ending in {', '.join(SUFFIXES)}")
    writing.add_argument("--fps", type=float, default=VIDEO_FPS, help="frames per second of an MP4 (default: 12)")
    writing.add_argument("--tile", type=int, metavar="ROWS", help="decode in tiles of so many latent rows: less memory")

    one = commands.add_parser(
        "understand", parents=[model, adapted, buckets], help="answer a question about pictures or clips"
    )
    one.add_argument("questions", nargs="+", metavar="QUESTION", help="several are answered one by one, each by itself")
    one.add_argument("--media", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    one.add_argument("--system", help="system prompt instead of the official one")
    one.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    one.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    one.add_argument("--top-p", type=float, default=1.0)
    one.add_argument("--top-k", type=int, default=0)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(command=understand)

    one = commands.add_parser(
        "generate", parents=[model, adapted, painting, buckets, writing], help="paint a picture or a clip"
    )
    one.add_argument("prompt", metavar="PROMPT")
    one.add_argument("--first-frame", type=Path, metavar="IMAGE", help="picture with which the clip begins")
    one.set_defaults(command=generate)

    one = commands.add_parser(
        "edit", parents=[model, adapted, painting, buckets, writing], help="change a picture or a clip"
    )
    one.add_argument("instruction", metavar="INSTRUCTION")
    one.add_argument("--media", type=Path, action="append", required=True, metavar="FILE", help="may be repeated")
    one.add_argument("--task", choices=("edit", "idip"), default="edit", help="idip: paint the same subject anew")
    one.set_defaults(command=edit)

    one = commands.add_parser("decode", parents=[model, writing], help="turn a saved latent into a picture or a clip")
    one.add_argument("latent", type=Path, metavar="LATENT.safetensors")
    one.set_defaults(command=decode)

    one = commands.add_parser("inspect", help="say what a checkpoint holds and lacks, without loading it")
    one.add_argument("path", type=Path, metavar="PATH")
    one.set_defaults(command=show_contents)

    one = commands.add_parser("memory", parents=[model], help="say what a request needs, without loading the model")
    one.add_argument("task", choices=("generate", "edit", "understand"))
    one.add_argument("--width", type=int, help="pixels (default: what the checkpoint knows best)")
    one.add_argument("--height", type=int)
    one.add_argument("--frames", type=int, default=1)
    one.add_argument("--references", type=int, metavar="N", help="of that size (default: 1 where the task takes any)")
    one.add_argument("--tile", type=int, metavar="ROWS")
    one.set_defaults(command=show_needs)

    one = commands.add_parser("make-tiny", help="write a small random checkpoint, to try things with")
    one.add_argument("folder", type=Path, metavar="DIR")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    one.set_defaults(command=write_tiny)

    one = commands.add_parser("quantize", help="write a checkpoint again with quantised weights")
    one.add_argument("source", type=Path, metavar="SRC", help="checkpoint, such as models/Lance_3B, or a GGUF file")
    one.add_argument("folder", type=Path, metavar="DST", help="a new folder")
    one.add_argument("--format", choices=STORED_FORMATS, required=True, help="int8 is for int8-dynamic too")
    one.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    one.set_defaults(command=write_quantized)

    one = commands.add_parser("merge", parents=[adapted], help="write a checkpoint again with LoRAs in its weights")
    one.add_argument("source", type=Path, metavar="SRC", help="checkpoint, such as models/Lance_3B")
    one.add_argument("folder", type=Path, metavar="DST", help="a new folder")
    one.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    one.set_defaults(command=write_merged)

    one = commands.add_parser("convert-data", help="write a data set of media and JSONL as Parquet, or the other way")
    one.add_argument("source", type=Path, metavar="SRC", help="a .jsonl or .parquet file, or a folder")
    one.add_argument("folder", type=Path, metavar="DST", help="a new folder")
    one.set_defaults(command=write_converted)

    one = commands.add_parser("make-world", help="write a data set of small coloured shapes, to try training with")
    one.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    one.add_argument("--count", type=int, default=1000, metavar="N", help="records (default: 1000)")
    one.add_argument("--split", choices=("train", "test"), default="train", help="test: what train never shows")
    one.add_argument("--new", metavar="NAME", help="with what nano has never seen in most of them: orange, heart")
    one.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(command=write_world)

    one = commands.add_parser("train", help="train a model or a LoRA, or go on with it, as a TOML file says")
    one.add_argument("config", type=Path, metavar="CONFIG.toml")
    one.add_argument("--plan", action="store_true", help="only say what memory it needs; nothing is loaded")
    one.add_argument("--fresh", action="store_true", help="begin anew where the run would go on from its last state")
    one.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    one.set_defaults(command=train)

    one = commands.add_parser("make-nano", help="train the built-in model again, from nothing; stopped, it goes on")
    one.add_argument("folder", type=Path, metavar="DIR", help="where the model goes; a checkpoint there is replaced")
    one.add_argument("--work", type=Path, default=Path("nano-work"), metavar="DIR", help="states (default: nano-work)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    one.set_defaults(command=make_nano)

    one = commands.add_parser("run", parents=[device], help="run a ComfyUI workflow in its API format")
    one.add_argument("workflow", type=Path, metavar="WORKFLOW.json")
    one.add_argument("--model", metavar="NAME", help="checkpoint instead of the workflow's: a name or a path")
    one.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="NODE: id, title or class")
    one.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="default: output")
    one.add_argument(
        "--input",
        type=Path,
        action="append",
        metavar="DIR",
        help="where LoadImage and LoadVideo look; default: here, and the workflow's folder",
    )
    one.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="default: those of $LANCE_MODELS, and models"
    )
    one.set_defaults(command=run)
    return top


def painting_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: what the checkpoint knows best)")
    options.add_argument("--height", type=int, help="pixels, a multiple of 16")
    options.add_argument("--frames", type=int, help="4k+1, up to 121; 12 are one second (default: 1, for a clip 49)")
    options.add_argument("--steps", type=int, default=Sampling.steps)
    options.add_argument("--guidance", type=float, default=Sampling.guidance)
    options.add_argument("--shift", type=float, default=Sampling.shift)
    options.add_argument("--guidance-interval", type=float, nargs=2, default=Sampling.interval, metavar=("LOW", "HIGH"))
    options.add_argument("--renorm", choices=RENORMS, default=Sampling.renorm)
    options.add_argument("--renorm-min", type=float, default=Sampling.renorm_min)
    options.add_argument(
        "--guidance-every",
        type=int,
        default=Sampling.guidance_every,
        metavar="N",
        help="compute guidance on every N-th guided step alone: faster, not quite exact (default: 1, exact)",
    )
    options.add_argument(
        "--cache-threshold",
        type=float,
        default=Sampling.cache_threshold,
        metavar="X",
        help="predict steps while the picture's way changes by no more than X, such as 0.1: faster, not quite exact"
        " (default: 0, exact)",
    )
    options.add_argument("--seed", type=int, default=stages.SEED)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after an error that was told on stderr, or 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    full = FULL_TRAINING if args.command is train else FULL
    try:
        with warnings_shown(lambda sentence: tqdm.write(f"warning: {sentence}", file=sys.stderr)), Bars() as bars:
            args.command(args, bars)
    except LanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError):
        print(full, file=sys.stderr)
        return 2
    except RuntimeError as error:  # what torch raises where the host's own memory is full
        if "DefaultCPUAllocator" not in str(error):
            raise
        print(full, file=sys.stderr)
        return 2
    except OSError as error:  # of the terminal or a full disk: files of ours are LanceErrors
        print(f"error: {error.strerror}; nothing more could be written.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
