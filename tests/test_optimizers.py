"""Which optimizer changes which weights, and runs with Muon."""

from __future__ import annotations

import pytest
import torch

from lance_core.errors import LanceError
from lance_core.train.config import Training
from lance_core.train.learner import trainee_of
from lance_core.train.optimizers import inner_matrices, optimizers_of
from lance_core.train.trainer import train
from tests.training_run import Handful, configuration, small_lance

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than Muon")


def run(output, stop=0, **options):
    """The decoder's weights after a run."""

    def on_step(step, values):
        if step == stop:
            raise KeyboardInterrupt

    lance = small_lance()
    train(configuration(output, optimizer="muon", steps=6, **options), lance, Handful(), on_step)
    return list(lance.transformer.parameters())


@muon
def test_every_weight_has_one_optimizer(tmp_path):
    trainee = trainee_of(configuration(tmp_path), small_lance())
    optimizers = optimizers_of(trainee, Training(optimizer="muon"))
    given = [id(weight) for o in optimizers for group in o.param_groups for weight in group["params"]]
    assert sorted(given) == sorted(id(weight) for weight in trainee.parameters())
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.Muon, torch.optim.AdamW]


def test_muon_takes_what_the_layers_multiply_with(tmp_path):
    named = dict(trainee_of(configuration(tmp_path), small_lance()).named_parameters())
    inner = inner_matrices(named)
    assert all(named[name].ndim == 2 for name in inner)
    assert sum("_moe_gen" in name for name in inner) == 2 * 7 and sum("merger" in name for name in inner) == 2
    for outside in ("embed_tokens", "lm_head", "llm2vae", "vae2llm", "time_embedder", "patch_embed"):
        assert any(outside in name for name in named) and not any(outside in name for name in inner)


@muon
def test_a_run_with_muon_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=3)
    again = run(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_muon_does_not_shard():
    with pytest.raises(LanceError, match='"muon" needs whole matrices'):
        Training(optimizer="muon", shard=True)
