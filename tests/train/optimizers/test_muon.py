"""Muon: hidden matrices move along the orthogonal factor of their momentum, the rest as under AdamW."""

import torch

from rayemb.train.optimizers import AdamWConfig, MuonConfig
from tests.train.optimizers.common import RATES, gradient, start, stepped

CONFIG = MuonConfig(momentum=0.6, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3)


def test_a_hidden_matrix_moves_along_the_orthogonal_factor() -> None:
    momentum, weight = torch.zeros(3, 5, dtype=torch.float64), start()["matrix"]
    found = stepped(CONFIG)["matrix"] - weight
    for step, rate in enumerate(RATES):
        slope = gradient("matrix", step)
        momentum = 0.6 * momentum + 0.4 * slope
        u, _, v = torch.linalg.svd(0.4 * slope + 0.6 * momentum, full_matrices=False)
        weight = weight * (1 - rate * 0.2) - rate * 0.2 * 5**0.5 * u @ v
    wanted = weight - start()["matrix"]
    # Newton and Schulz's singular values lie between 0.7 and 1.2, not at 1, and in bf16.
    assert float((found * wanted).sum() / found.norm() / wanted.norm()) > 0.98
    assert 0.7 < float(found.norm() / wanted.norm()) < 1.3


def test_the_rest_is_adamw() -> None:
    adamw = stepped(AdamWConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2))
    assert torch.equal(stepped(CONFIG)["vector"], adamw["vector"])


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    for name, value in stepped(CONFIG).items():
        assert torch.equal(stepped(CONFIG, save_after=1)[name], value), name
