"""Which candidates become hard negatives: against naive loops, and the rules one by one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.config import ConfigError, from_mapping
from rayemb.mining import ChoiceConfig, MarginConfig, Veto, choose
from rayemb.mining.select import ranked


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(n) for n in range(count)]


def naive(scores, positive, known, config, veto):  # type: ignore[no-untyped-def]
    """The candidates that are left, row by row."""
    left = []
    for q in range(len(scores)):
        rank, mine = 0, []
        for k in range(scores.shape[1]):
            if known[q, k]:
                continue
            rank += 1
            limits = [math.inf]
            if config.margin.absolute is not None:
                limits.append(positive[q] - config.margin.absolute)
            if config.margin.relative is not None:
                limits.append(positive[q] - config.margin.relative * abs(positive[q]))
            inside = config.first_rank <= rank <= config.last_rank
            if inside and scores[q, k] <= min(limits) and veto.scores[q, k] <= veto.positive[q] - 0.1:
                mine.append(k)
        left.append(mine)
    return left


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(0, 15),
    st.integers(1, 5),
    st.sampled_from([None, 0.0, 0.2]),
    st.sampled_from([None, 0.0, 0.3]),
)
def test_as_a_loop_says(
    seed: int, first: int, width: int, negatives: int, absolute: float | None, relative: float | None
) -> None:
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.uniform(-1, 1, (4, 12)), axis=1)
    positive, known = rng.uniform(-1, 1, 4), rng.random((4, 12)) < 0.2
    veto = Veto("guide", rng.uniform(-1, 1, (4, 12)), rng.uniform(-1, 1, 4), MarginConfig(absolute=0.1))
    margin = MarginConfig(absolute=absolute, relative=relative)
    config = ChoiceConfig(first_rank=first, last_rank=first + width, negatives=negatives, margin=margin)
    left = naive(scores, positive, known, config, veto)
    found = choose(scores, positive, known, config, generators(4), [veto])
    assert [[k for k in row if k >= 0] for row in found.places.tolist()] == [row[:negatives] for row in left]
    assert sum(found.left_out.values()) + sum(map(len, left)) == scores.size
    drawn = choose(scores, positive, known, config.model_copy(update={"take": "random"}), generators(4), [veto])
    for row, there in zip(drawn.places.tolist(), left, strict=True):
        taken = [k for k in row if k >= 0]
        assert len(set(taken)) == len(taken) == min(negatives, len(there))
        assert set(taken) <= set(there)


def test_a_rank_does_not_count_known_positives() -> None:
    known = np.array([[True, False, True, False]])
    assert ranked(known).tolist() == [[0, 1, 0, 2]]


def test_spread_goes_over_the_whole_list() -> None:
    scores = np.linspace(1, 0, 20)[None]
    config = ChoiceConfig(negatives=4, take="spread")
    places = choose(scores, np.ones(1), np.zeros((1, 20), bool), config, generators(1)).places
    assert places.tolist() == [[0, 5, 10, 15]]


@pytest.mark.parametrize("positive", [0.8, -0.4])
def test_margins_are_below_the_positive_whatever_its_sign(positive: float) -> None:
    for margin in (MarginConfig(absolute=0.1), MarginConfig(relative=0.05), MarginConfig(absolute=0.1, relative=0.05)):
        limit = margin.limit(np.array([positive]))[0]
        assert limit < positive
    assert MarginConfig(absolute=0.0, relative=0.0).limit(np.array([positive]))[0] == positive
    assert MarginConfig().limit(np.array([positive]))[0] == math.inf


def test_a_score_that_is_not_there_vetoes() -> None:
    veto = Veto("guide", np.array([[math.nan, 0.1]]), np.array([0.5]), MarginConfig(absolute=0.0))
    found = choose(np.array([[0.9, 0.8]]), np.ones(1), np.zeros((1, 2), bool), ChoiceConfig(), generators(1), [veto])
    assert found.places[0, :2].tolist() == [1, -1]
    assert found.left_out["guide"] == 1


def test_a_window_that_is_inside_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"last_rank \(3\) is before first_rank \(5\)"):
        from_mapping(ChoiceConfig, {"first_rank": 5, "last_rank": 3})
