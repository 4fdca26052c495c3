"""The losses of a batch: flow matching on what is to be painted, cross-entropy on what is to be answered.

Source: modeling/lance/lance.py (Lance.forward) of bytedance/Lance: velocities from data to noise with mean squared
error, timesteps logit-normal and shifted; captions and answers with cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_number, check_whole
from ..errors import LanceError
from ..transformer import LanceTransformer, Run
from ..vit import VisionTower
from .packing import Batch, Noising, pack, tokens_of

__all__ = ["Batch", "Objective", "Trainee", "pack", "tokens_of"]


@dataclass(frozen=True)
class Objective(Noising):
    """What is minimised: mse_weight · flow matching + ce_weight · cross-entropy. Defaults are the official script's."""

    mse_weight: float = 1.0
    ce_weight: float = 0.25

    def __post_init__(self):
        for name in ("text_dropout", "reference_dropout", "vit_dropout", "vae_dropout"):
            check_number(f"objective.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("timestep_std", "timestep_shift", "mse_weight", "ce_weight"):
            check_number(f"objective.{name}", getattr(self, name), 0.0)
        check_number("objective.timestep_mean", self.timestep_mean, -20.0, 20.0)
        check_whole("objective.draws", self.draws, 1)
        if self.timestep_shift == 0:
            raise LanceError("objective.timestep_shift is 0: give a positive number, 1 for none.")


class Trainee(nn.Module):
    """The networks that learn, as one module whose forward gives the losses of a batch.

    words: how many of the vocabulary's rows the tokenizer has, as in inference; those behind them are never written.
    """

    def __init__(
        self,
        transformer: LanceTransformer,
        vision: VisionTower | None,
        objective: Objective = Objective(),
        words: int | None = None,
    ):
        super().__init__()
        self.transformer = transformer
        self.vision = vision
        self.objective = objective
        self.words = words

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and its parts `mse` (per element of a velocity) and `ce` (nats per token; 0 where there are none)."""
        und, gen = self.hidden(batch)
        model = self.transformer
        mse = ce = und.new_zeros((), dtype=torch.float32)
        if len(batch.targets):
            painted = gen[0].index_select(0, batch.target_index)
            velocity = model.llm2vae(model.language_model.model.norm_moe_gen(painted))
            mse = F.mse_loss(velocity.float(), batch.targets)
        if len(batch.answers):
            written = und[0].index_select(0, batch.answer_index)
            logits = model.language_model.lm_head(model.language_model.model.norm(written))
            ce = F.cross_entropy(logits[:, : self.words].float(), batch.answers)
        loss = self.objective.mse_weight * mse + self.objective.ce_weight * ce
        return {"loss": loss, "mse": mse, "ce": ce}

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The last layer's streams, `[1, u, D]` and `[1, g, D]`, without the final norms."""
        model = self.transformer
        dtype = compute_dtype(model, batch.ids.device)
        und = model.embed_text(batch.ids, model.dtype)
        if batch.seen:
            if self.vision is None:
                raise LanceError("the data show pictures, and this model has no vision tower: leave them out.")
            seen = torch.cat([self.vision(pixels.to(model.dtype), model.dtype) for pixels in batch.seen])
            und = torch.cat((und, seen.index_select(0, batch.seen_order)[None].to(und.dtype)), dim=1)
        streams = (und,)
        if len(batch.rows):
            time = model.time_embedder(batch.times[None], model.dtype).index_select(1, batch.time_index)
            streams += (model.vae2llm(batch.rows[None].to(model.dtype)) + time + batch.position_rows.to(model.dtype),)
        cos, sin = model.rotary(batch.positions, dtype)
        streams = model.language_model.model([Run(streams, cos, sin, self.attend(batch))])[0]
        return streams if len(streams) > 1 else (*streams, None)

    def attend(self, batch: Batch) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """Attention of a packed sequence: every example by itself."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = []
            for group in batch.groups:
                taken = (x[0].index_select(0, group.index.flatten()).unflatten(0, group.index.shape) for x in (q, k, v))
                out.append(self.transformer.attend(*taken, group.mask).flatten(0, 1))
            joined = out[0] if len(out) == 1 else torch.cat(out)
            return joined.index_select(0, batch.to_streams)[None]

        return attend


def compute_dtype(model: LanceTransformer, device: torch.device) -> torch.dtype:
    """The dtype in which layers compute: autocast's where it is on."""
    casting = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if casting else model.dtype
