"""Pairs, forests and groups against loops over all pairs."""

import numpy as np
import pyarrow as pa
import pytest
import ray.data
from hypothesis import given
from hypothesis import strategies as st

from rayemb.curate import neighbours
from rayemb.curate.neighbours import EDGE, _groups, candidates, distinct, forest, group_verdicts, near_edges

EDGES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([0.5, 0.75, 1.0])), max_size=25)


@given(st.lists(st.integers(0, 4), max_size=20), st.lists(st.booleans(), min_size=20, max_size=20), st.integers(1, 9))
def test_candidates_are_all_pairs_of_a_key(keys: list[int], sides: list[bool], at_once: int) -> None:
    array, side = np.sort(np.array(keys, np.int64)), np.array(sides[: len(keys)], bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "PAIRS", at_once)
        pairs = [pair for i, j in candidates(array) for pair in zip(i.tolist(), j.tolist(), strict=True)]
        across = [pair for i, j in candidates(array, side) for pair in zip(i.tolist(), j.tolist(), strict=True)]
    places = range(len(keys))
    assert sorted(pairs) == [(i, j) for i in places for j in places if i < j and array[i] == array[j]]
    assert sorted(across) == [
        (i, j) for i in places for j in places if array[i] == array[j] and not side[i] and side[j]
    ]


def groups_of(edges: list[tuple[int, int, float]]) -> dict[int, int]:
    """The smallest row that each row is connected to, by relaxation."""
    first = {row: row for a, b, _ in edges for row in (a, b) if a != b}
    for _ in first:
        for a, b, _ in edges:
            if a != b:
                first[a] = first[b] = min(first[a], first[b])
    return first


@given(EDGES)
def test_a_forest_keeps_groups_and_nearest_neighbours_with_the_fewest_edges(
    edges: list[tuple[int, int, float]],
) -> None:
    a, b, s = (np.array(column) for column in zip(*edges, strict=True)) if edges else (np.zeros(0, int),) * 3
    kept = forest(a, b, s.astype(float))
    rows = [(row["a"], row["b"], row["similarity"]) for row in kept.to_pylist()]
    groups = groups_of(edges)
    assert groups_of(rows) == groups
    assert len(rows) == len(groups) - len(set(groups.values()))
    for row in groups:
        near = [similarity for x, y, similarity in edges if row in (x, y) and x != y]
        assert max(s for x, y, s in rows if row in (x, y)) == max(near)


@given(EDGES)
def test_all_but_the_first_of_a_group_go(edges: list[tuple[int, int, float]]) -> None:
    table = pa.table([list(column) for column in zip(*edges, strict=True)] or [[], [], []], schema=EDGE)
    table = forest(*(np.asarray(table[name]) for name in EDGE.names))
    verdicts = _groups(table, "near", "{:.2f}".format).to_pylist()
    groups = groups_of(edges)
    assert {v["row"]: v["partner"] for v in verdicts} == {row: first for row, first in groups.items() if row != first}


def test_near_edges_compare_every_pair_once_and_equal_ones_never() -> None:
    # Rows 0 and 9 are equal, 4 is near to both, 5 shares a key and is far.
    contents = {0: 10, 9: 10, 4: 11, 5: 30}
    keys = [1, 1, 1, 1, 2, 2]
    rows = [0, 4, 5, 9, 0, 4]
    seen: list[tuple[int, int]] = []

    def compare(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        seen.extend(zip(i.tolist(), j.tolist(), strict=True))
        return np.array([1 - abs(contents[rows[x]] - contents[rows[y]]) / 10 for x, y in zip(i, j, strict=True)])

    table = pa.table({"key": keys, "row": rows, "content": [contents[row] for row in rows]})
    edges = near_edges(table, compare, 0.8).to_pylist()
    assert len(seen) == len(set(seen)) == 3
    assert sorted((min(e["a"], e["b"]), max(e["a"], e["b"])) for e in edges) == [(0, 4), (0, 9)]
    assert sorted(e["similarity"] for e in edges) == pytest.approx([0.9, 1.0])
    i, j = distinct(np.array([1, 1, 0]), np.array([2, 2, 3]), 4)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 3), (1, 2)]


@pytest.mark.usefixtures("ray_cluster")
def test_groups_that_cross_every_block_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "FAN_IN", 3)
    # A chain of 40 rows, one edge a block, and a pair of its own; one block is empty.
    tables = [pa.table([[n], [n + 1], [0.9]], schema=EDGE) for n in [*range(39), 50]]
    found = group_verdicts(ray.data.from_arrow([*tables, EDGE.empty_table()]), "near", "{:.1f}".format)
    rows = found.take_all()
    assert {row["row"]: row["partner"] for row in rows} == {**dict.fromkeys(range(1, 40), 0), 51: 50}
    assert {row["what"] for row in rows} == {"0.9"}
    assert group_verdicts(ray.data.from_arrow(EDGE.empty_table()), "near", str).count() == 0
