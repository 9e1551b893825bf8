"""A labelled set of vectors in few: gradient matching makes new ones, herding chooses among them. Plain torch."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Gradients = list[Tensor]
Method = Literal["class_wise", "summed"]
NEGLIGIBLE = 1e-4  # a row's gradient beside its layer's largest


def row_distance(one: Gradients, other: Gradients) -> Tensor:
    """D of two gradients: the sum over the rows of every weight matrix of 1 - cosine. Biases are skipped.

    So are rows that are next to nothing on both sides: the released code adds 1e-6 to the norms instead, by which
    such a row is far from its equal.
    """
    total = one[0].new_zeros(())
    for a, b in zip(one, other, strict=True):
        if a.dim() < 2:
            continue
        a, b = a.flatten(1), b.flatten(1)
        norm_a, norm_b = a.norm(dim=1), b.norm(dim=1)
        counts = (norm_a > NEGLIGIBLE * norm_a.max()) | (norm_b > NEGLIGIBLE * norm_b.max())
        cosine = (a * b).sum(1) / (norm_a * norm_b).clamp(min=1e-30)
        total = total + (1 - cosine)[counts].sum()
    return total


def class_gradients(
    network: nn.Module, vectors_ND: Tensor, labels_N: Tensor, classes: list[int], *, differentiable: bool = False
) -> list[Gradients]:
    """The gradient of the mean cross-entropy over each class's rows, for every class."""
    weights = [p for p in network.parameters() if p.requires_grad]
    found = []
    for label in classes:
        rows = labels_N == label
        loss = F.cross_entropy(network(vectors_ND[rows]), labels_N[rows])
        found.append(list(torch.autograd.grad(loss, weights, create_graph=differentiable)))
    return found


def matching_loss(synthetic: list[Gradients], real: list[Gradients], method: Method) -> Tensor:
    """How far the gradients by class are apart.

    `class_wise` (DC, Zhao et al., 2021): `sum_c D(g_syn^c, g_real^c)`. `summed` (DCC):
    `D(sum_c g_syn^c, (1/C) sum_c g_real^c)`, which sees what tells classes apart and not what they share.
    """
    if method == "class_wise":
        distances = [row_distance(a, b) for a, b in zip(synthetic, real, strict=True)]
        return torch.stack(distances).sum()
    layers = range(len(real[0]))
    summed = [torch.stack([gradients[i] for gradients in synthetic]).sum(0) for i in layers]
    mean = [torch.stack([gradients[i] for gradients in real]).mean(0) for i in layers]
    return row_distance(summed, mean)


def condense(
    vectors_ND: Floats,
    labels_N: Ints,
    per_class: int,
    *,
    method: Method = "summed",
    start: Literal["random", "herding"] = "random",
    networks: int = 60,
    matches: int = 5,
    network_steps: int = 5,
    warm_networks: int = 15,
    warm_matches: int = 3,
    real_batch: int = 256,
    hidden: int = 64,
    rate: float = 0.02,
    network_rate: float = 0.05,
    seed: int = 0,
) -> tuple[Floats, Ints]:
    """`per_class` synthetic vectors of each class `(C * per_class, D)` and their labels: one gradient as the many give.

    Each of `networks` new two-layer classifiers is matched `matches` times; between, it trains on the synthetic
    vectors for `network_steps`. `summed` begins with class-wise matching: it sums from network `warm_networks` on, or
    from match `warm_matches` of any network on (the paper's 250 and 10, of 1000 networks on images; scaled here, as is
    its rate of 0.1). Vectors are standardised within. The same seed gives the same vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, scale = vectors_ND.mean(0), float(vectors_ND.std()) or 1.0
    real_ND = torch.from_numpy(((vectors_ND - mean) / scale).astype(np.float32))
    classes, numbers = np.unique(labels_N, return_inverse=True)
    label_N = torch.from_numpy(numbers.astype(np.int64))
    every = list(range(len(classes)))
    members = [torch.from_numpy(np.flatnonzero(numbers == c)) for c in every]
    chosen = [_start(real_ND[rows], per_class, start, generator) for rows in members]
    made_MD = torch.cat([real_ND[rows][at] for rows, at in zip(members, chosen, strict=True)]).requires_grad_()
    made_M = torch.tensor(every).repeat_interleave(torch.tensor([len(at) for at in chosen]))
    optimizer = torch.optim.SGD([made_MD], lr=rate, momentum=0.5)
    for outer in range(networks):
        network = _network(real_ND.shape[1], hidden, len(every), generator)
        learner = torch.optim.SGD(network.parameters(), lr=network_rate)
        for inner in range(matches):
            rows = torch.cat([part[torch.randperm(len(part), generator=generator)[:real_batch]] for part in members])
            target = class_gradients(network, real_ND[rows], label_N[rows], every)
            ours = class_gradients(network, made_MD, made_M, every, differentiable=True)
            summing = method == "summed" and (outer >= warm_networks or inner >= warm_matches)
            optimizer.zero_grad()
            matching_loss(ours, target, "summed" if summing else "class_wise").backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for _ in range(network_steps if inner + 1 < matches else 0):
                learner.zero_grad()
                F.cross_entropy(network(made_MD.detach()), made_M).backward()  # type: ignore[no-untyped-call]
                learner.step()
    made: Floats = (made_MD.detach().numpy() * scale + mean).astype(np.float32)
    return made, classes[made_M.numpy()].astype(np.int64)


def herding(vectors_ND: Floats, count: int) -> Ints:
    """`count` row numbers, chosen one by one so that the mean of the chosen stays nearest to the mean of all.

    Welling (2009), as in iCaRL (Rebuffi et al., 2017); the first of equals; no row twice.
    """
    rows = np.asarray(vectors_ND, np.float64)
    mean, total = rows.mean(0), np.zeros(rows.shape[1])
    squares, to_mean = (rows**2).sum(1), rows @ mean
    chosen: list[int] = []
    free = np.ones(len(rows), bool)
    for size in range(1, min(count, len(rows)) + 1):
        # |mu - (total + x) / k|^2 without what is the same for every x.
        cost = (squares + 2 * rows @ total) / size**2 - 2 * to_mean / size
        best = int(np.where(free, cost, np.inf).argmin())
        chosen.append(best)
        free[best] = False
        total += rows[best]
    return np.array(chosen, np.int64)


def _start(rows_ND: Tensor, count: int, start: str, generator: torch.Generator) -> Tensor:
    if start == "herding":
        return torch.from_numpy(herding(rows_ND.numpy(), count))
    return torch.randperm(len(rows_ND), generator=generator)[:count]


def _network(dim: int, hidden: int, classes: int, generator: torch.Generator) -> nn.Module:
    network = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    for weight in network.parameters():
        if weight.dim() == 2:
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(weight)
    return network
