"""Steps of an optimizer on a matrix, a vector that is not adapted, and a zero matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from rayemb.train.optimizers import OptimizerConfig

STEPS, RATES = 4, (0.1, 0.05, 0.2, 0.01)
Values = dict[str, Tensor]


def start() -> Values:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "vector": torch.randn(4, generator=generator, dtype=torch.float64),
        "zero": torch.zeros(2, 2, dtype=torch.float64),
    }


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + len(name))
    return torch.randn(start()[name].shape, generator=generator, dtype=torch.float64)


def stepped(config: OptimizerConfig, *, save_after: int | None = None) -> Values:
    """The parameters after all steps; the state is saved and loaded into a new optimizer after `save_after`."""
    weights = {name: torch.nn.Parameter(value) for name, value in start().items()}

    def build() -> torch.optim.Optimizer:
        matrices = [weights["matrix"], weights["zero"]]
        return config.build(
            [
                {"params": matrices, "weight_decay": config.weight_decay, "matrices": True, "hidden": True},
                {"params": [weights["vector"]], "weight_decay": 0.0, "matrices": False, "hidden": False},
            ]
        )

    optimizer = build()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for name, weight in weights.items():
            weight.grad = gradient(name, step)
        optimizer.step()
        if step == save_after:
            state, optimizer = optimizer.state_dict(), build()
            optimizer.load_state_dict(state)
    return {name: weight.detach() for name, weight in weights.items()}


def by_loops(move: Callable[[str, int, list[float], list[float], dict], list[float]]) -> Values:
    """The same by `move(name, step, weight, gradient, memory)` over plain lists of numbers."""
    found = {}
    for name, value in start().items():
        weight, memory = value.flatten().tolist(), {}
        for step in range(STEPS):
            weight = move(name, step, weight, gradient(name, step).flatten().tolist(), memory)
        found[name] = torch.tensor(weight, dtype=torch.float64).reshape(value.shape)
    return found


def norm(values: list[float]) -> float:
    return sum(value * value for value in values) ** 0.5


def assert_equal(found: Values, expected: Values) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
