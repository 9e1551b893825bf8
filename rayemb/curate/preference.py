"""A small judge of pairs, trained on which of two captions of an item is the better. Plain torch; knows no Ray."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

Floats = NDArray[np.float32]

# Shapes: B batch, N items, K candidates of an item, best first, D dimensions of the encoder, H hidden width.
LEVELS = ("own", "shuffled", "dropped", "other")


def weak_captions(text: str, other: str, rng: np.random.Generator) -> list[str | None]:
    """Captions from good to bad, as `LEVELS`: the own one, its words shuffled, half of them gone, another item's.

    None where a level would not differ from a better one: a single word can be neither shuffled nor thinned.
    """
    words = text.split()
    shuffled = [words[i] for i in rng.permutation(len(words))]
    kept = sorted(rng.permutation(len(words))[: len(words) // 2].tolist())
    found: list[str | None] = [text]
    for candidate in (" ".join(shuffled), " ".join(words[i] for i in kept), other):
        found.append(candidate if candidate and candidate not in found else None)
    return found


class Scorer(nn.Module):
    """How well a text goes with a query, one number a pair: an MLP over [x, c, x*c, |x - c|] of a frozen encoder."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim = dim
        self.inner, self.outer = nn.Linear(4 * dim, hidden), nn.Linear(hidden, 1)

    def forward(self, x_BD: Tensor, c_BD: Tensor) -> Tensor:
        """Rewards `(B,)` of unit vectors of queries and texts."""
        # Entries of unit vectors are about 1/sqrt(D), of their product 1/D: all made about 1.
        root = self.dim**0.5
        features = torch.cat([x_BD * root, c_BD * root, x_BD * c_BD * self.dim, (x_BD - c_BD).abs() * root], dim=-1)
        rewards: Tensor = self.outer(F.gelu(self.inner(features))).squeeze(-1)
        return rewards


def preference_loss(better: Tensor, worse: Tensor) -> Tensor:
    """`-log sigmoid(better - worse)` of each pair, in fp32: ln 2 where both are equal."""
    return F.softplus(worse.float() - better.float())


@dataclass
class Judge:
    """A trained scorer with what its scores owe to the length of the text taken out."""

    scorer: Scorer
    slope: float = 0.0
    centre: float = 0.0

    def scores(self, x_ND: Floats, c_ND: Floats, words_N: NDArray[np.int64], batch: int = 4096) -> Floats:
        """Scores `(N,)` float32 of pairs; `words_N`: the words of each text."""
        parts = []
        with torch.inference_mode():
            for at in range(0, len(x_ND), batch):
                x, c = (torch.from_numpy(np.array(v[at : at + batch], np.float32)) for v in (x_ND, c_ND))
                parts.append(self.scorer(x, c).numpy())
        rewards: Floats = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return (rewards - self.slope * (np.log1p(words_N) - self.centre)).astype(np.float32)

    def to_bytes(self, **about: Any) -> bytes:
        """A safetensors file; `about` goes to its metadata."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.scorer.state_dict().items()}
        shape = {"dim": self.scorer.dim, "hidden": self.scorer.inner.out_features}
        facts = {**about, **shape, "slope": self.slope, "centre": self.centre}
        data: bytes = save_tensors(tensors, {"judge": json.dumps(facts)})
        return data

    @classmethod
    def from_file(cls, path: str) -> "Judge":
        """The judge of a local file that `to_bytes` made."""
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["judge"])
        scorer = Scorer(facts["dim"], facts["hidden"])
        with open(path, "rb") as data:
            scorer.load_state_dict(load_tensors(data.read()))
        return cls(scorer.eval(), facts["slope"], facts["centre"])


def fit_judge(
    x_ND: Floats,
    captions_NKD: Floats,
    valid_NK: NDArray[np.bool_],
    words_NK: NDArray[np.int64],
    *,
    hidden: int,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    length_control: bool,
) -> Judge:
    """A judge trained on every ordered pair of each item's valid captions (best first). The same seed, the same judge.

    With `length_control` the part of the own captions' scores that is linear in log(1 + words) is taken off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = Scorer(x_ND.shape[1], hidden)
    draw = torch.Generator().manual_seed(seed)
    x_all, c_all = torch.from_numpy(np.array(x_ND)), torch.from_numpy(np.array(captions_NKD))
    valid = torch.from_numpy(valid_NK)
    better, worse = np.triu_indices(captions_NKD.shape[1], 1)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.01)
    for _ in range(epochs):
        order = torch.randperm(len(x_all), generator=draw)
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            x, c = x_all[rows], c_all[rows]
            rewards_BK = scorer(x[:, None].expand_as(c), c)
            real = (valid[rows][:, better] & valid[rows][:, worse]).float()
            loss = (preference_loss(rewards_BK[:, better], rewards_BK[:, worse]) * real).sum() / real.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    judge = Judge(scorer.eval())
    if length_control and len(x_ND):
        lengths = np.log1p(words_NK[:, 0].astype(np.float64))
        judge.centre, spread = float(lengths.mean()), float(lengths.var())
        if spread > 0:
            rewards = judge.scores(x_ND, captions_NKD[:, 0], words_NK[:, 0])
            judge.slope = float(((lengths - judge.centre) * rewards).mean() / spread)
    return judge


def ranked_right(
    judge: Judge, x_ND: Floats, captions_NKD: Floats, valid_NK: NDArray[np.bool_], words_NK: NDArray[np.int64]
) -> dict[str, float]:
    """The share of preferences that the judge orders rightly, over all pairs of levels and by pair; ties count half."""
    scores = [judge.scores(x_ND, captions_NKD[:, k], words_NK[:, k]) for k in range(valid_NK.shape[1])]
    shares: dict[str, float] = {}
    hits = total = 0.0
    for better, worse in zip(*np.triu_indices(valid_NK.shape[1], 1), strict=True):
        real = valid_NK[:, better] & valid_NK[:, worse]
        gap = scores[better][real] - scores[worse][real]
        right = float((gap > 0).sum() + 0.5 * (gap == 0).sum())
        hits, total = hits + right, total + len(gap)
        if len(gap):
            shares[f"{LEVELS[better]} over {LEVELS[worse]}"] = right / len(gap)
    return {"all": hits / total if total else float("nan"), **shares}
