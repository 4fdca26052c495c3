"""What a training run needs in device memory, before it is begun: nothing is loaded but the files' headers.

Weights and what the optimiser keeps are added up. A step is counted (`counting`): the decoder's own code runs forward
and backward without data, for a batch of which half the tokens are painted.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import memory
from ..attention import attention
from ..checkpoint import Lance, empty_parts
from ..config import LATENT_CHANNELS, SPATIAL_COMPRESSION
from ..counting import LiveTensors, on_meta
from ..layout import find_checkpoint
from ..needs import WORDS
from ..placement import GIB, SLACK, weight_bytes
from ..vit import FRAMES_PER_STEP
from .config import TrainConfig
from .examples import Example
from .learner import recomputed, trainee_of
from .objective import Batch, Trainee, pack, tokens_of

NETWORKS = ("transformer", "vision")
ANSWER = " ".join([WORDS] * 4)  # a detailed description


@dataclass(frozen=True)
class TrainingNeeds:
    """Bytes. frozen, trained: weights. kept: their average, and what AdamW remembers of them, which is more than Muon.

    step: what a step holds at most beside all that, gradients included. encoding: what the VAE holds while the next
    batch is made, where a picture's latent is not in the cache.
    """

    frozen: int
    trained: int
    kept: int
    step: int
    encoding: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.kept + int(SLACK * (self.step + self.encoding))


def training_plan(config: TrainConfig) -> str:
    """A table of what a run needs, in GiB. Raises LanceError as loading the model does."""
    full = config.train.method == "full"
    dtype = torch.float32 if full or config.train.precision == "fp32" else torch.bfloat16
    lance, *_ = empty_parts(find_checkpoint(config.model.checkpoint), dtype=dtype)
    return table(training_needs(config, lance), config)


def table(needs: TrainingNeeds, config: TrainConfig) -> str:
    rows = {
        "frozen weights": needs.frozen,
        "trained weights": needs.trained,
        "optimizer, average": needs.kept,
        "step": int(SLACK * needs.step),
        "encoding": int(SLACK * needs.encoding),
        "in all": needs.total,
    }
    lines = [f"{'GiB':20}{'':>8}", *(f"{name:20}{size / GIB:8.2f}" for name, size in rows.items())]
    again = "computed again in the backward pass" if config.train.checkpointing else "kept for the backward pass"
    return "\n".join(
        [
            *lines,
            "",
            f"step: of {config.train.tokens} tokens or one example; activations are {again}",
            "encoding: of a picture, beside the step; nothing where all latents are in the cache",
        ]
    )


def training_needs(config: TrainConfig, lance: Lance) -> TrainingNeeds:
    """What a run on one device needs.

    lance: without data, in the dtype that it would be loaded in; its modules are changed.
    """
    trainee = trainee_of(config, lance)
    trained = [weight for weight in trainee.parameters() if weight.requires_grad]
    size = sum(weight.nbytes for weight in trained)
    side = lance.config.resolutions.image.vae
    return TrainingNeeds(
        frozen=weight_bytes(lance.transformer, lance.vision, lance.vae) - size,
        trained=size,
        kept=(3 if config.train.ema else 2) * size,
        step=step_memory(config, lance),
        encoding=memory.encoding(lance.vae, (1, 3, 1, side, side), lance.dtype) if lance.vae else 0,
    )


def step_memory(config: TrainConfig, lance: Lance) -> int:
    """Bytes that a step holds at most beside the weights: batch, activations and gradients.

    lance: without data, of which what is to be trained has `requires_grad`. Autocast to bf16 keeps a copy in two bytes
    of every weight that is trained: such a model is counted in bf16, with those copies, and with what gradients in
    float32 have more.
    """
    extra = 0
    networks = {name: on_meta(getattr(lance, name), attention=fused) for name in NETWORKS if getattr(lance, name)}
    for name, network in networks.items():
        for copy, weight in zip(network.parameters(), getattr(lance, name).parameters()):
            copy.requires_grad_(weight.requires_grad)
            if autocasts(config):
                copy.data = copy.data.bfloat16()
                extra += 2 * copy.nbytes if weight.requires_grad else 0
    if autocasts(config):
        networks["transformer"].dtype = torch.bfloat16
    counted = replace(lance, **networks)
    batch = typical_batch(config, lance)
    step = Trainee(counted.transformer, counted.vision, config.objective)
    with LiveTensors() as count, recomputed(counted) if config.train.checkpointing else nullcontext():
        step(batch.to("meta"))["loss"].backward()
    return count.peak + extra


def autocasts(config: TrainConfig) -> bool:
    """Whether weights in float32 are computed with in bf16."""
    return config.train.method == "full" and config.train.precision != "fp32"


def typical_batch(config: TrainConfig, lance: Lance) -> Batch:
    """As many examples as a batch has room for, on the CPU."""
    chosen, room = [], config.train.tokens
    sizes = [(example, tokens_of(example, config.objective.draws)) for example in typical_examples(lance)]
    while fitting := [each for each in sizes if each[1] <= room] if chosen else sizes:
        example, size = fitting[len(chosen) % len(fitting)]
        chosen.append(example)
        room -= size
    return pack(chosen, lance.tokenizer, lance.config, config.objective, torch.Generator().manual_seed(0))


def typical_examples(lance: Lance) -> list[Example]:
    """A picture to be painted, one that is asked about, and one to be edited, of the size that the model knows best."""
    size = lance.config.resolutions.image
    latent = torch.zeros(LATENT_CHANNELS, 1, size.vae // SPATIAL_COMPRESSION, size.vae // SPATIAL_COMPRESSION)
    painted = Example("generate", WORDS, target=latent)
    if lance.vision is None:
        return [painted]
    seen = (torch.zeros(3, FRAMES_PER_STEP, size.vit, size.vit),)
    asked = Example("understand", "What is this?", answer=ANSWER, pixels=seen)
    return [painted, asked, Example("edit", WORDS, pixels=seen, latents=(latent,), target=latent)]


class FusedAttention(torch.autograd.Function):
    """The memory of attention that keeps no matrix of scores: with a mask it keeps that, as numbers to add."""

    @staticmethod
    def forward(context, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        context.save_for_backward(q, k, v, out, *([] if mask is None else [mask.to(q.dtype)]))
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in context.saved_tensors[:3]), None


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` without data."""
    return attention(q, k, v, mask, kernel=lambda q, k, v, attn_mask: FusedAttention.apply(q, k, v, attn_mask))
