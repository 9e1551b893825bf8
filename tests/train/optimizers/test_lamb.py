"""LAMB against Algorithm 2 of its paper, in plain loops."""

from rayemb.train.optimizers import LAMBConfig
from tests.train.optimizers.common import RATES, assert_equal, by_loops, norm, stepped

CONFIG = LAMBConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)


def move(name: str, step: int, weight: list[float], gradient: list[float], memory: dict) -> list[float]:
    (beta, square), decay = CONFIG.betas, 0.0 if name == "vector" else 0.2
    update = []
    for index, (w, g) in enumerate(zip(weight, gradient, strict=True)):
        m, v = memory.get(index, (0.0, 0.0))
        m, v = beta * m + (1 - beta) * g, square * v + (1 - square) * g * g
        memory[index] = m, v
        mean, root = m / (1 - beta ** (step + 1)), (v / (1 - square ** (step + 1))) ** 0.5
        update.append(mean / (root + 1e-3) + decay * w)
    trust = norm(weight) / norm(update) if name != "vector" and norm(weight) else 1.0
    return [w - RATES[step] * trust * u for w, u in zip(weight, update, strict=True)]


def test_steps_are_the_papers_and_vectors_are_not_adapted() -> None:
    assert_equal(stepped(CONFIG), by_loops(move))


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    assert_equal(stepped(CONFIG, save_after=1), stepped(CONFIG))
