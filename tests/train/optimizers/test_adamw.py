"""AdamW against its formulas, entry by entry."""

from rayemb.train.optimizers import AdamWConfig
from tests.train.optimizers.common import RATES, assert_equal, by_loops, stepped

CONFIG = AdamWConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)


def move(name: str, step: int, weight: list[float], gradient: list[float], memory: dict) -> list[float]:
    (beta, square), rate, decay = CONFIG.betas, RATES[step], 0.0 if name == "vector" else 0.2
    out = []
    for index, (w, g) in enumerate(zip(weight, gradient, strict=True)):
        m, v = memory.get(index, (0.0, 0.0))
        m, v = beta * m + (1 - beta) * g, square * v + (1 - square) * g * g
        memory[index] = m, v
        mean, root = m / (1 - beta ** (step + 1)), (v / (1 - square ** (step + 1))) ** 0.5
        out.append(w * (1 - rate * decay) - rate * mean / (root + 1e-3))
    return out


def test_steps_are_the_papers() -> None:
    assert_equal(stepped(CONFIG), by_loops(move))
