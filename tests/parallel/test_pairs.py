"""Pairs that make no sense are refused with the argument's name; the rest is found tile by tile as by loops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayemb.parallel import NO_KEY, Alone, Duplicates, ExchangeError, Pairs, Tiling, Veto, contrast
from rayemb.parallel.pairs import PairFinder

ANCHORS, CANDIDATES, COLUMNS = 3, 4, 2
OWN = torch.arange(ANCHORS)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def table(*entries: tuple[int, int], value: float = 1.0, rows: int = ANCHORS, columns: int = CANDIDATES) -> Tensor:
    out = torch.zeros(rows, columns)
    for i, j in entries:
        out[i, j] = value
    return out


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


WRONG: list[tuple[Pairs, str]] = [
    (Pairs(own=ids(0, 1)), r"pairs\.own has shape \(2,\), the anchors are 3"),
    (Pairs(own=ids(0, 4, 1)), r"pairs\.own\[1\] is 4: outside the 4 candidates"),
    (Pairs(own=ids(0, 1, -2)), r"pairs\.own\[2\] is -2: outside"),
    (Pairs(itself=ids(0, 1, 2, 3)), r"pairs\.itself has shape \(4,\)"),
    (Pairs(itself=ids(9, 1, 2)), r"pairs\.itself\[0\] is 9: outside"),
    (Pairs(weights=ones(3, 5)), r"pairs\.weights has shape \(3, 5\), not \(3, 4\)"),
    (Pairs(weights=ones(3)), r"pairs\.weights has shape \(3,\)"),
    (Pairs(weights=table((1, 2), value=-0.1)), r"pairs\.weights has a negative or non-finite weight"),
    (Pairs(weights=table((1, 2), value=float("nan"))), r"pairs\.weights has a negative or non-finite"),
    (Pairs(weights=table((1, 2), value=float("inf"))), r"pairs\.weights has a negative or non-finite"),
    (Pairs(ignore=ones(4, 3).bool()), r"pairs\.ignore has shape \(4, 3\)"),
    (Pairs(own=OWN, ignore=table((0, 3), (1, 1)).bool()), r"pairs\.ignore takes out candidate 1 of anchor 1"),
    (
        Pairs(weights=table((2, 3), value=0.5), ignore=table((2, 3)).bool()),
        r"candidate 3 of anchor 2, which is its pos",
    ),
    (Pairs(own=OWN, itself=ids(-1, 0, 2)), r"takes out candidate 2 of anchor 2"),
    (Pairs(keys=(ids(1, 2), ids(1, 2, 3, 4))), r"pairs\.keys have shapes"),
    (Pairs(keys=(ids(1, 2, 3), ids(1, 2, 3))), r"pairs\.keys have shapes"),
    (Pairs(keys=(ids(1, 2, 3), torch.zeros(4, 2, dtype=torch.int64))), r"pairs\.keys have shapes .* as many keys"),
    (Pairs(keys=(ones(3), ones(4))), r"pairs\.keys are torch\.float32"),
    (Pairs(vetoes=(Veto(ones(4)),)), r"pairs\.vetoes\[0\]\.above has shape \(4,\), not \(3,\)"),
    (
        Pairs(vetoes=(Veto(ones(3)), Veto(ones(3), ones(3)))),
        r"pairs\.vetoes\[1\]\.column_above has shape \(3,\), not \(2",
    ),
    (Pairs(vetoes=(Veto(ones(3), anchors=ones(3, 2)),)), r"vetoes\[0\]\.anchors and candidates must be given together"),
    (Pairs(vetoes=(Veto(ones(3), anchors=ones(3, 2), candidates=ones(3, 2)),)), r"vetoes\[0\]\.candidates have shape"),
    (Pairs(vetoes=(Veto(ones(3), anchors=ones(3, 2), candidates=ones(4, 3)),)), r"anchors have 2 dimensions, cand"),
]


@pytest.mark.parametrize(("pairs", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_makes_no_sense_is_named(pairs: Pairs, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        contrast(ones(ANCHORS, 2), ones(CANDIDATES, 2), pairs, columns=COLUMNS)
    sparse = {n: t.to_sparse() for n in ("weights", "ignore") if (t := getattr(pairs, n)) is not None}
    with pytest.raises(ExchangeError, match=message):
        contrast(ones(ANCHORS, 2), ones(CANDIDATES, 2), replace(pairs, **sparse), columns=COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors_BD": ones(3)}, r"anchors are torch\.float32 of shape \(3,\)"),
        ({"anchors_BD": ones(3, 2).long()}, r"anchors are torch\.int64 of shape \(3, 2\), not floating-point"),
        ({"candidates_CD": ones(4, 3)}, r"anchors have 2 dimensions, candidates 3"),
        ({"columns": 5}, r"columns \(5\) is more than the 4 candidates"),
        ({"bias_C": ones(3)}, r"bias has shape \(3,\), not \(4,\)"),
        ({"boost_B": ones(1)}, r"boost has shape \(1,\), not \(3,\)"),
        ({"reduction": "sigmoid", "columns": 2}, r"columns: a sigmoid loss"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"anchors_BD": ones(3, 2), "candidates_CD": ones(4, 2), "pairs": Pairs(), **arguments}
    with pytest.raises(ExchangeError, match=f"the batch: {message}"):
        contrast(**given)


def test_nothing_is_wrong_with_what_makes_sense() -> None:
    assert Pairs().problem(0, 0) is None
    assert Pairs(own=ids(-1, 3, 0), itself=ids(0, 0, -1)).problem(3, 4) is None
    assert Pairs(own=OWN, ignore=table((0, 1)).bool().to_sparse()).problem(3, 4) is None
    assert Pairs(keys=(torch.zeros(0, dtype=torch.int64), ids(1))).problem(0, 1) is None
    # An explicit zero is no positive: it may be ignored.
    zero = torch.sparse_coo_tensor(torch.tensor([[1], [2]]), torch.tensor([0.0]), (3, 4), check_invariants=True)
    assert Pairs(weights=zero, ignore=table((1, 2)).bool()).problem(3, 4) is None


def test_a_weight_given_for_the_own_positive_stands_instead_of_1() -> None:
    pairs = Pairs(own=OWN, weights=table((1, 1), (1, 2), value=0.5))
    rows, _ = contrast(ones(3, 2), ones(4, 2), pairs, exchange=Alone(Tiling(2, 2)))
    assert rows.weight.tolist() == [1.0, 1.0, 1.0]
    assert rows.count.tolist() == [3.0, 2.0, 3.0]


def test_one_text_given_twice_as_left_out_is_left_out_once() -> None:
    pairs = Pairs(itself=OWN, ignore=table((0, 0), (0, 1)).bool(), keys=(ids(1, 2, 3), ids(1, 1, 3, 4)))
    rows, _ = contrast(ones(3, 2), ones(4, 2), pairs)
    assert rows.count.tolist() == [2.0, 3.0, 3.0]


# -- the finder: each exceptional pair once, in its tile -----------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9),
    st.sampled_from(["positive", "ignore", "negative"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_equal_keys_are_found_in_whatever_tiles(
    left: list[tuple[int, int]],
    right: list[tuple[int, int]],
    duplicates: Duplicates,
    height: int,
    width: int,
    offset: int,
) -> None:
    """Zero stands for `NO_KEY`; the candidates lie behind `offset` others, whose keys would all match."""
    keys = tuple(torch.tensor(side).masked_fill(torch.tensor(side) == 0, NO_KEY) for side in (left, right))
    everyone = torch.cat([keys[0][:1].expand(offset, 2), keys[1]])
    finder = PairFinder(Pairs(keys=keys, duplicates=duplicates), everyone, torch.float64)
    found = []
    for top in range(0, len(left), height):
        for start in range(0, len(right), width):
            rows, columns = slice(top, min(top + height, len(left))), slice(start, min(start + width, len(right)))
            tile = finder.find(rows, columns, offset, mine=False)
            if tile is None:
                continue
            found += [(top + i, start + j) for i, j in zip(*map(Tensor.tolist, tile[:2]), strict=True)]
            if duplicates == "positive":
                assert tile.rows.tolist() == tile.out_rows.tolist()
                assert tile.weights.tolist() == [1.0] * len(tile.rows)
            else:
                assert not tile.rows.numel()
    same = [
        (i, j)
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if any(x == y != 0 for x, y in zip(a, b, strict=True))
    ]
    assert sorted(found) == (same if duplicates != "negative" else [])


def test_what_is_said_of_own_candidates_does_not_touch_other_ranks() -> None:
    pairs = Pairs(own=OWN, itself=ids(3, 3, 3), weights=table((0, 3)), ignore=table((2, 0)).bool())
    finder = PairFinder(replace(pairs, itself=None), None, torch.float32)
    assert finder.find(slice(0, 3), slice(0, 4), 0, mine=False) is None
    mine = finder.find(slice(0, 3), slice(0, 4), 0, mine=True)
    assert mine is not None
    assert sorted(zip(mine.rows.tolist(), mine.columns.tolist(), strict=True)) == [(0, 0), (0, 3), (1, 1), (2, 2)]
    assert finder.find(slice(0, 1), slice(1, 3), 0, mine=True) is None
