"""From rows that share a key to pairs that are near, and from pairs to groups of which one row stays."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from rayemb.curate.base import runs, verdicts

PAIRS = 1 << 20  # candidate pairs that are compared at once
FAN_IN = 16  # forests that one task merges
EDGE = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("similarity", pa.float32())])

Compare = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]


def candidates(keys: NDArray[Any], sides: NDArray[Any] | None = None) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Places (i, j) of all pairs with an equal key in a sorted array, i < j, some at a time; a pair may come twice.

    With `sides` (bool), only pairs of a row of side False (i) with one of side True (j).
    """
    pending: list[tuple[NDArray[Any], NDArray[Any]]] = []
    count = 0
    bounds = runs(keys)
    several = np.flatnonzero(np.diff(bounds) > 1)
    for start, stop in zip(bounds[several], bounds[several + 1], strict=True):
        places = np.arange(start, stop)
        left = places if sides is None else places[~sides[start:stop]]
        right = places if sides is None else places[sides[start:stop]]
        step = max(1, PAIRS // max(len(right), 1))
        for at in range(0, len(left), step):
            i = np.repeat(left[at : at + step], len(right))
            j = np.tile(right, len(left[at : at + step]))
            if sides is None:
                i, j = i[i < j], j[i < j]
            if len(i):
                pending.append((i, j))
                count += len(i)
            if count >= PAIRS:
                yield _joined(pending)
                pending, count = [], 0
    if pending:
        yield _joined(pending)


def near_edges(table: pa.Table, compare: Compare, threshold: float) -> pa.Table:
    """Edges among rows (columns `key`, `row`, `content`, sorted by key) whose similarity reaches the threshold.

    Rows of one content are equal by definition and are compared once. All pairs of a key are compared, so the time is
    quadratic in the distinct contents of the largest key. Gives a spanning forest of the near pairs.
    """
    keys, rows, contents = (np.asarray(table[name]) for name in ("key", "row", "content"))
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    a, b = [rows[first][inverse]], [rows]
    similarity = [np.ones(len(rows))]
    # The first of each content within each key.
    order = np.lexsort((rows, inverse, keys))
    fresh = np.ones(len(order), bool)
    fresh[1:] = (keys[order][1:] != keys[order][:-1]) | (inverse[order][1:] != inverse[order][:-1])
    some = order[fresh]
    for i, j in candidates(keys[some]):
        one, other = distinct(first[inverse[some[i]]], first[inverse[some[j]]], len(rows))
        found = compare(one, other)
        near = found >= threshold
        a.append(rows[one[near]])
        b.append(rows[other[near]])
        similarity.append(found[near])
    return forest(np.concatenate(a), np.concatenate(b), np.concatenate(similarity))


def distinct(i: NDArray[np.int64], j: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of places below `size`, each once."""
    pairs = np.unique(i * size + j)
    return pairs // max(size, 1), pairs % max(size, 1)


def forest(a: NDArray[np.int64], b: NDArray[np.int64], similarity: NDArray[Any]) -> pa.Table:
    """The fewest of the edges that keep together what they connect, the most similar first. O(edges log edges)."""
    real = a != b
    nodes, ends = np.unique(np.concatenate([a[real], b[real]]), return_inverse=True)
    low, high = np.sort(ends.reshape(2, -1), axis=0)
    pairs, at = np.unique(low * len(nodes) + high, return_inverse=True)
    best = np.zeros(len(pairs))
    np.maximum.at(best, at, similarity[real])
    # Costs must not be 0, which a sparse matrix takes for no edge.
    graph = coo_array((2.0 - best, (pairs // max(len(nodes), 1), pairs % max(len(nodes), 1))), (len(nodes),) * 2)
    tree = minimum_spanning_tree(csr_array(graph)).tocoo() if len(nodes) else graph
    return pa.table([nodes[tree.row], nodes[tree.col], (2.0 - tree.data).astype(np.float32)], schema=EDGE)


def group_verdicts(edges: ray.data.Dataset, reason: str, describe: Callable[[float], str]) -> ray.data.Dataset:
    """Verdicts that leave the first row of every connected group of rows, and drop the others as its repeats.

    Forests are merged in a tree of tasks; the last holds 20 bytes for each row that has a near one (not for each row
    of the corpus). The score is a row's similarity to the nearest other of its group.
    """

    merging = ray.remote(_merged)
    parts = edges.to_arrow_refs() or [ray.put(EDGE.empty_table())]
    merged = False
    while len(parts) > 1 or not merged:
        parts = [merging.remote(*parts[at : at + FAN_IN]) for at in range(0, len(parts), FAN_IN)]
        merged = True
    return ray.data.from_arrow_refs([ray.remote(_groups).remote(parts[0], reason, describe)])


def _merged(*tables: pa.Table) -> pa.Table:
    # A block without rows has no columns either.
    table = pa.concat_tables([EDGE.empty_table(), *(part.select(EDGE.names) for part in tables if part.num_rows)])
    return forest(*(np.asarray(table[name]) for name in EDGE.names))


def _groups(edges: pa.Table, reason: str, describe: Callable[[float], str]) -> pa.Table:
    a, b, similarity = (np.asarray(edges[name]) for name in EDGE.names)
    nodes, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    graph = coo_array((np.ones(len(a)), tuple(ends.reshape(2, -1))), (len(nodes),) * 2)
    _, labels = connected_components(graph, directed=False)
    roots = np.full(labels.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(roots, labels, nodes)
    nearest = np.zeros(len(nodes))
    np.maximum.at(nearest, ends, np.tile(similarity, 2))
    repeats = roots[labels] != nodes
    return verdicts(
        row=nodes[repeats],
        reason=reason,
        what=[describe(value) for value in nearest[repeats].tolist()],
        score=nearest[repeats].astype(np.float32),
        partner=roots[labels][repeats],
    )


def _joined(parts: list[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.concatenate([i for i, _ in parts]), np.concatenate([j for _, j in parts])
