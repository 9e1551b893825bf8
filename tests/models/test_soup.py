"""Means of weights against naive sums; greedy choices against a search written out; models that cannot be mixed."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayemb.models import Model, ModelError, TextTokenizer
from rayemb.models.soup import WeightMean, greedy, require_alike, shared_info
from tests.models.tiny import CONFIG, tiny_model


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a.weight": torch.randn(3, 4, generator=generator).to(dtype),
            "steps": torch.tensor([n, n + 1]),
            "used": torch.tensor(n % 2 == 0),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 7.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mean_is_the_sum_of_each_number_over_the_weights(weights: list[float], dtype: torch.dtype) -> None:
    given = states(3, dtype)
    mean = WeightMean.of(given[0], weights[0])
    for state, weight in zip(given[1:], weights[1:], strict=True):
        mean = mean.plus(state, weight)
    expected = np.zeros((3, 4))
    for row, column in itertools.product(range(3), range(4)):
        for state, weight in zip(given, weights, strict=True):
            expected[row, column] += weight * float(state["a.weight"][row, column]) / sum(weights)
    found = mean.state
    assert found["a.weight"].dtype == dtype
    # Rounded once, at the end: the nearest number of the dtype.
    assert torch.equal(found["a.weight"], torch.from_numpy(expected).to(dtype))
    assert torch.equal(found["steps"], given[0]["steps"])
    assert torch.equal(found["used"], given[0]["used"])


def test_adding_one_leaves_the_mean_before_as_it_was() -> None:
    one, two = states(2)
    mean = WeightMean.of(one)
    mean.plus(two)
    assert torch.equal(mean.state["a.weight"], one["a.weight"])


def written_out(values: Sequence[float], higher: bool) -> list[int]:
    """The greedy choice where an ingredient is a number and the metric is that of the numbers' mean."""
    metric = [value if higher else -value for value in values]
    order = sorted(range(len(values)), key=lambda place: (-metric[place], place))
    taken = [order[0]]
    for place in order[1:]:
        if np.mean([metric[n] for n in (*taken, place)]) >= np.mean([metric[n] for n in taken]):
            taken.append(place)
    return taken


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6), st.booleans())
def test_greedy_takes_what_the_search_written_out_takes(values: list[float], higher: bool) -> None:
    asked: list[tuple[int, ...]] = []

    def score(places: Sequence[int]) -> float:
        asked.append(tuple(places))
        return float(np.mean([values[place] for place in places]))

    found = greedy(len(values), score, higher=higher)
    assert found.taken == written_out(values, higher)
    assert found.alone == values
    assert found.score == np.mean([values[place] for place in found.taken])
    assert len(asked) == 2 * len(values) - 1


def test_greedy_leaves_out_the_one_that_hurts_and_not_the_one_that_is_weak() -> None:
    # Two models on opposite sides of the optimum, one far off: the weak one mends the best one's error.
    places = {0: np.array([0.4]), 1: np.array([9.0]), 2: np.array([-0.6])}

    def score(taken: Sequence[int]) -> float:
        return -float(np.abs(np.mean([places[n] for n in taken], axis=0))[0])

    found = greedy(3, score)
    assert found.taken == [0, 2]
    assert found.score == pytest.approx(-0.1)


def test_models_of_another_kind_are_refused_with_what_differs() -> None:
    first = tiny_model(0)
    require_alike(first, tiny_model(1), "b")

    def other(**changes: object) -> Model:
        config = CONFIG.model_validate({**CONFIG.model_dump(), **changes})
        return Model.create(config, first.tokenizer, 0)

    with pytest.raises(ModelError, match=r"text\.\S+ is of shape \(\d+, 24\) here and of shape \(\d+, 16\)") as caught:
        require_alike(first, other(text={"name": "transformer", "width": 24, "depth": 1, "heads": 2}), "b")
    names = list(first.network.state_dict())
    named = str(caught.value).split("parameter ")[1].split(" ")[0]
    # The first of them: those before it are alike.
    theirs = other(text={"name": "transformer", "width": 24, "depth": 1, "heads": 2}).network.state_dict()
    before = names[: names.index(named)]
    assert all(theirs[name].shape == first.network.state_dict()[name].shape for name in before)
    deeper = other(text={"name": "transformer", "width": 16, "depth": 2, "heads": 2})
    with pytest.raises(ModelError, match=r"parameter text\.\S+ is of shape \S+ here and missing in the first model"):
        require_alike(first, deeper, "b")
    with pytest.raises(ModelError, match=r"is missing here and of shape"):
        require_alike(deeper, first, "b")
    with pytest.raises(ModelError, match=r"^b: prompts\.query of its towers is not the first model's"):
        require_alike(first, other(prompts={"query": "ask: "}), "b")
    words = TextTokenizer.train(["other words altogether"] * 3, CONFIG.tokenizer)
    while words.vocab_size != first.tokenizer.vocab_size:
        words = TextTokenizer.train(
            [f"{n} {n * 7} abc" for n in range(400)],
            CONFIG.tokenizer.model_copy(update={"vocab_size": first.tokenizer.vocab_size}),
        )
    with pytest.raises(ModelError, match="another tokenizer"):
        require_alike(first, Model.create(CONFIG, words, 0), "b")


def test_what_all_ingredients_record_is_kept() -> None:
    one = {"seed": 1, "loss": {"a": 1}, "training": [1], "config": {"seed": 1, "steps": 5}, "init": {"digest": "x"}}
    two = {"seed": 2, "loss": {"a": 1}, "training": [1], "config": {"seed": 2, "steps": 5}, "init": {"digest": "x"}}
    expected = {"seed": 1, "loss": {"a": 1}, "config": {"steps": 5}, "init": {"digest": "x"}}
    assert shared_info([one, two]) == expected
    assert shared_info([one, {"seed": 2}]) == {"seed": 1}
