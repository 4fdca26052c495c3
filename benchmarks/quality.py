"""What quantised weights cost: `python benchmarks/quality.py [--checkpoint PATH] [--accuracy COUNT] [--dtype fp32]`.

Every row is the same model with its weights in another format, compared with the dense one. Errors are relative L2
errors: of the velocity of one step from noise, of the latent after a whole sampling, and of the logits for the words of
a given text, of which the last column says how often the likeliest token is the same.

Without a checkpoint the weights are random, with the statistics that make real ones hard to quantise: numbers of
Student's t with 4 degrees of freedom, rows whose sizes differ as exp(N(0, 0.5)), norm gains as exp(N(0, 0.3)) of which
in layers 1 % are ten times as large, and k biases of size 5, as Qwen2 has them; what a layer adds to the stream is
small, as after training. Such a model paints and writes nothing that means anything, and its likeliest tokens are
barely likelier than the next: a trained model keeps more of them.

--accuracy also counts what is right, of so many pictures, edits and answers of the small world (`nano.py`) that are the
same in every row, with the 95 % interval. Only a model that was trained on that world has any right: the built-in one,
`--checkpoint nano`.

"min-max" is what a rival did: 8 bits between the smallest and the largest number of every tensor, norms, embeddings and
lm_head included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import table, told
from torch import Tensor, nn
from workload import PROMPT, SIZES, drawn, model

from lance_core import stages, text
from lance_core.checkpoint import COMPUTE_TYPES, Lance, load_lance
from lance_core.quantized import FORMATS, quantizable, quantize_model
from lance_core.sequence import build, context_blocks
from lance_core.vae import normalize
from lance_core.world import accuracy
from lance_core.world.accuracy import Cases
from lance_core.world.shares import Share

SIDE = 256  # pixels of the picture, or fewer where the model was trained on smaller ones
WORDS = 128  # of the text that is given


@dataclass(frozen=True)
class Results:
    """What a model makes of the same inputs as all others."""

    velocity: Tensor  # [1, 48, 1, h, w]
    latent: Tensor  # the same
    logits: Tensor  # [WORDS, V]
    size: int  # bytes of the decoder


def results(lance: Lance, steps: int) -> Results:
    side = usual_side(lance)
    noise = drawn(1, 48, 1, side // 16, side // 16)
    picture = {"width": side, "height": side, "noise": noise}
    one_step = stages.generate(lance, PROMPT, steps=1, guidance=1.0, **picture)
    return Results(
        velocity=noise - normalize(one_step),
        latent=normalize(stages.generate(lance, PROMPT, steps=steps, **picture)),
        logits=logits(lance),
        size=sum(parameter.nbytes for parameter in lance.transformer.parameters()),
    )


def usual_side(lance: Lance) -> int:
    """Of a picture, in pixels."""
    return min(SIDE, lance.config.resolutions.image.vae)


def logits(lance: Lance) -> Tensor:
    """`[WORDS, V]` float32: those of each word of a text, given the words before it."""
    sequence = build(lance.tokenizer, "understand", None, PROMPT)
    known = len(lance.tokenizer)
    words = torch.randint(known, (WORDS, 1), generator=torch.Generator().manual_seed(1)).to(lance.device)
    seen: list[Tensor] = []

    def pick(logits: Tensor) -> Tensor:
        seen.append(logits[:known].float().cpu())
        return words[len(seen) - 1]

    with torch.inference_mode():
        *blocks, last = context_blocks(sequence, [], [], lance.device)
        context = lance.transformer.prefill([*blocks, last.without_last()], dtype=lance.dtype)
        position = int(sequence.positions[0, -1])
        list(text.tokens(lance.transformer, context, last.ids[-1:], position, pick, WORDS))
    return torch.stack(seen)


def realistic(transformer: nn.Module) -> None:
    """Gives random weights the statistics of trained ones."""
    generator = torch.Generator().manual_seed(0)
    layers = len(transformer.language_model.model.layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, parameter in transformer.named_parameters():
        if quantizable(name):
            degrees = 4
            chi = sum(normal(*parameter.shape) ** 2 for _ in range(degrees))
            rows = torch.exp(0.5 * normal(len(parameter), 1) - 0.25)
            size = (2 * layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
            parameter.copy_(parameter * rows * size * (chi / (degrees - 2)).rsqrt())
        elif "norm" in name:
            gains = torch.exp(0.3 * normal(len(parameter)))
            if "layernorm" in name:
                gains[::100] *= 10
            parameter.copy_(gains)
        elif "k_proj" in name and name.endswith("bias"):
            parameter.copy_(5 * normal(len(parameter)))
    # As a checkpoint of the release is stored.
    for parameter in transformer.parameters():
        parameter.copy_(parameter.bfloat16())


def min_max(transformer: nn.Module) -> None:
    """Rounds every tensor to 8 bits between its smallest and its largest number."""
    for parameter in transformer.parameters():
        low, high = parameter.aminmax()
        step = ((high - low) / 255).clamp_min(1e-30)
        parameter.copy_(((parameter - low) / step).round() * step + low)


def compared(own: Results, reference: Results) -> dict[str, object]:
    same = own.logits.argmax(1) == reference.logits.argmax(1)
    return {
        "one step": error(own.velocity, reference.velocity),
        "sampling": error(own.latent, reference.latent),
        "logits": error(own.logits, reference.logits),
        "same token": f"{same.float().mean():.0%}",
        "MB": own.size / 1e6,
    }


def error(own: Tensor, reference: Tensor) -> float:
    return float((own - reference).norm() / reference.norm())


def right(lance: Lance, count: int, **sampling: object) -> dict[str, Share]:
    """Shares of the small world's pictures and edits that are right; nothing where the count is 0."""
    if not count:
        return {}
    pictures = accuracy.generation(lance, Cases(count), **sampling)["shape, colour and position"]
    edits = accuracy.edits(lance, Cases(count), **sampling)["right, and the rest unchanged"]
    return {"pictures right": pictures, "edits right": edits}


def answered(lance: Lance, count: int) -> dict[str, Share]:
    """The share of the small world's questions that are answered right; nothing where the count is 0."""
    return {"answers right": accuracy.questions(lance, Cases(count))["answers"]} if count else {}


def random_model(weights: str, dtype: str) -> Lance:
    source, lance = model(SIZES["a"]), model(SIZES["a"], COMPUTE_TYPES[dtype])
    realistic(source.transformer)
    lance.transformer.load_state_dict(source.transformer.state_dict())
    if weights != "auto":
        quantize_model(lance.transformer, weights)
    return lance


def rows(load: Callable[[str, str], Lance], dtype: str, steps: int, count: int) -> dict[str, dict[str, object]]:
    """load: a model of weights ("auto" or a format) that computes in a dtype. count: cases of the small world."""

    def found(lance: Lance, own: Results, **corrected: object) -> dict[str, object]:
        rightness = right(lance, count, steps=steps) | answered(lance, count)
        return compared(own, reference) | corrected | rightness

    dense = load("auto", dtype)
    reference = results(dense, steps)
    ways = {dtype: found(dense, reference)}
    if dtype != "bf16":
        half = load("auto", "bf16")
        ways["bf16"] = found(half, results(half, steps))
    for format in FORMATS:
        lance = load(format, dtype)
        ways[format] = found(lance, results(lance, steps))
    min_max(dense.transformer)
    counted = sum(parameter.numel() for parameter in dense.transformer.parameters())
    return ways | {"min-max": found(dense, results(dense, steps), MB=counted / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a real one instead of random weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of computation and reference")
    parser.add_argument("--device", default="cpu", help="of a checkpoint; random weights are on the CPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accuracy", type=int, default=0, metavar="COUNT", help="also count what is right, of so many")
    args = parser.parse_args()

    def load(weights: str, dtype: str) -> Lance:
        if args.checkpoint:
            return load_lance(args.checkpoint, device=args.device, dtype=dtype, weights=weights)
        return random_model(weights, dtype)

    with torch.no_grad():
        print(table(rows(load, args.dtype, args.steps, args.accuracy)))


if __name__ == "__main__":
    told(main)
