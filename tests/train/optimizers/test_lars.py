"""LARS against Algorithm 1 of its paper, in plain loops."""

from rayemb.train.optimizers import LARSConfig
from tests.train.optimizers.common import RATES, assert_equal, by_loops, norm, stepped

CONFIG = LARSConfig(momentum=0.7, trust=0.01, weight_decay=0.2)


def move(name: str, step: int, weight: list[float], gradient: list[float], memory: dict) -> list[float]:
    decay = 0.0 if name == "vector" else 0.2
    adapted = name != "vector" and norm(weight) > 0
    rate = RATES[step] * (0.01 * norm(weight) / (norm(gradient) + decay * norm(weight)) if adapted else 1.0)
    out = []
    for index, (w, g) in enumerate(zip(weight, gradient, strict=True)):
        memory[index] = 0.7 * memory.get(index, 0.0) + rate * (g + decay * w)
        out.append(w - memory[index])
    return out


def test_steps_are_the_papers_and_vectors_are_not_adapted() -> None:
    assert_equal(stepped(CONFIG), by_loops(move))


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    assert_equal(stepped(CONFIG, save_after=1), stepped(CONFIG))
