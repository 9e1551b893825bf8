"""The contract of parallel/: W processes give the loss and the gradients of one with the whole batch."""

import pytest
import torch
from torch import Tensor, nn

from rayemb.losses import InfoNCE, InfoNCEConfig, pair_by_group
from rayemb.parallel import gather_rows, mean_over_ranks
from rayemb.train.objective import symmetric_loss
from tests.parallel.processes import run_processes

DIM_IN, DIM = 12, 8
CONFIGS = [
    InfoNCEConfig(temperature=0.1, margin=0.15, duplicates=duplicates)
    for duplicates in ("positive", "ignore", "negative")
]


class Towers(nn.Module):
    """Two small towers with a temperature, as the trainer has them."""

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(DIM_IN, 16), nn.Tanh(), nn.Linear(16, DIM))
        self.text = nn.Linear(DIM_IN, DIM)
        self.loss = InfoNCE(config)
        self.double()

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.normalize(self.image(x), dim=-1), nn.functional.normalize(self.text(y), dim=-1)


def batch(total: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(total, DIM_IN, generator=generator, dtype=torch.float64)
    y = torch.randn(total, DIM_IN, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, max(2, total // 2), (total,), generator=generator)
    return x, y, groups


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


Outcome = tuple[float, dict[str, Tensor]]


def on_rank(rank: int, world: int, sizes: list[int]) -> list[Outcome]:
    return [share_of_rank(rank, world, sizes, config) for config in CONFIGS]


def share_of_rank(rank: int, world: int, sizes: list[int], config: InfoNCEConfig) -> Outcome:
    towers = Towers(config)
    start = sum(sizes[:rank])
    x, y, groups = (part[start : start + sizes[rank]] for part in batch(sum(sizes)))
    loss = symmetric_loss(*towers.encode(x, y), groups, towers.loss)
    loss.backward()
    reported = float(mean_over_ranks(loss))
    for parameter in towers.parameters():  # what DDP and DeepSpeed do: average over ranks
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world
    return reported, gradients(towers)


def in_one_process(total: int, config: InfoNCEConfig) -> Outcome:
    """The oracle: no gathering, cross-entropy written out with loops over explicit pairs."""
    towers = Towers(config)
    x, y, groups = batch(total)
    image, text = towers.encode(x, y)
    scale = towers.loss.log_scale.exp()
    losses = []
    for anchors, candidates in ((image, text), (text, image)):
        for i in range(total):
            same = [j for j in range(total) if groups[j] == groups[i]]
            positives = same if config.duplicates == "positive" else [i]
            ignored = set(same) - {i} if config.duplicates == "ignore" else set()
            logits = {
                j: scale * (anchors[i] @ candidates[j] - (config.margin if j in positives else 0.0))
                for j in range(total)
                if j not in ignored
            }
            norm = torch.logsumexp(torch.cat(list(logits.values())), 0)
            losses.append(sum(norm - logits[j].squeeze() for j in positives) / len(positives))
    loss = torch.stack(losses).sum() / (2 * total)
    loss.backward()
    return loss.item(), gradients(towers)


@pytest.mark.parametrize("sizes", [[6, 6], [5, 2], [4, 1, 3]], ids=str)
def test_loss_and_gradients_equal_one_process(sizes: list[int]) -> None:
    expected = [in_one_process(sum(sizes), config) for config in CONFIGS]
    for outcomes in run_processes(len(sizes), on_rank, sizes):
        for outcome, oracle in zip(outcomes, expected, strict=True):
            check(*outcome, *oracle)


def check(loss: float, grads: dict[str, Tensor], expected_loss: float, expected: dict[str, Tensor]) -> None:
    assert abs(loss / expected_loss - 1) < 1e-10
    assert grads.keys() == expected.keys()
    assert "loss.log_scale" in grads
    for name, grad in grads.items():
        ratio = (grad * expected[name]).sum() / (expected[name] ** 2).sum()
        cosine = (grad * expected[name]).sum() / (grad.norm() * expected[name].norm())
        assert abs(float(ratio) - 1) < 1e-10, name
        assert abs(float(cosine) - 1) < 1e-10, name


def rows_of(rank: int, world: int, sizes: list[int]) -> tuple[Tensor, int, int]:
    local = torch.full((sizes[rank], 3), rank, dtype=torch.int64)
    gathered = gather_rows(local)
    return gathered.rows, gathered.start, gathered.count


def test_rows_come_in_rank_order_and_an_empty_rank_is_no_trouble() -> None:
    sizes = [2, 0, 3]
    expected = torch.tensor([0, 0, 2, 2, 2])[:, None].expand(5, 3)
    for rank, (rows, start, count) in enumerate(run_processes(3, rows_of, sizes)):
        assert torch.equal(rows, expected)
        assert (start, count) == (sum(sizes[:rank]), sizes[rank])


def test_without_a_group_the_rows_are_their_own() -> None:
    local = torch.randn(4, 2, requires_grad=True)
    gathered = gather_rows(local)
    assert gathered.rows is local
    assert (gathered.start, gathered.count, gathered.world_size, gathered.weight) == (0, 4, 1, 0.25)


def test_the_pairs_of_a_rank_start_at_its_rows() -> None:
    pairs = pair_by_group(torch.tensor([7, 8]), torch.tensor([8, 9, 7, 8]), 2, "positive")
    assert pairs.positives.tolist() == [[0, 0, 1, 0], [1, 0, 0, 1]]
