"""What the page shows of a task: a map of a sample, histograms, curves, confusions, and the worst queries."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayemb.data.projection import layout_by
from rayemb.errors import RayembError
from rayemb.evaluate.exact import exact_search
from rayemb.evaluate.report import Confusion, Example, Hit, Similarities, Space

BINS = 40
POINTS = 600
CLASSES = 16
SAMPLE = 2000
ASKED = 10_000
TEXT = 300
"""Characters of a text that the page shows."""
WORST = 6
HITS = 8
KS = (1, 2, 3, 5, 10, 20, 50, 100)


def space(
    vectors: NDArray[np.float32],
    method: Literal["umap", "pca"] | None,
    seed: int,
    *,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    images: Sequence[bytes | None] = (),
) -> Space | None:
    """A sample laid out in the plane; by principal components where umap is not installed."""
    if method is None:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:POINTS])
    try:
        layout = layout_by(method, seed=seed)(vectors[rows])
    except RayembError:
        if method == "pca":
            raise
        layout = layout_by("pca", seed=seed)(vectors[rows])
    return Space(
        method=layout.method,
        rows=len(vectors),
        x=tuple(layout.points[:, 0].tolist()),
        y=tuple(layout.points[:, 1].tolist()),
        labels=tuple(labels[row] for row in rows) if len(labels) else (),
        texts=tuple(short(texts[row]) for row in rows) if len(texts) else (),
        images=tuple(images[row] for row in rows) if len(images) else (),
        neighbours_kept=layout.neighbours_kept,
    )


def similarities(positives: NDArray[np.floating], negatives: NDArray[np.floating]) -> Similarities | None:
    """Both histograms in the same bins; None where one has no pairs."""
    if not len(positives) or not len(negatives):
        return None
    low = float(min(positives.min(), negatives.min()))
    high = max(float(max(positives.max(), negatives.max())), low + 1e-6)
    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(part, edges)[0].tolist() for part in (positives, negatives)]
    return Similarities(edges=tuple(edges.tolist()), positives=tuple(counts[0]), negatives=tuple(counts[1]))


def class_similarities(vectors: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> Similarities | None:
    """Of pairs of one class and of two, among a sample."""
    rows = np.random.default_rng(seed).permutation(len(vectors))[:SAMPLE]
    first, second = np.triu_indices(len(rows), 1)
    products = (vectors[rows] @ vectors[rows].T)[first, second]
    same = labels[rows][first] == labels[rows][second]
    return similarities(products[same], products[~same])


def confusion(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str], seed: int
) -> Confusion | None:
    """Of which class the nearest neighbour (itself aside) of each class's items is; of many classes the most confused.

    Rows of a class sum to 1 where all classes are shown. Of more items than 10,000 so many are asked, by seed, for
    their neighbours among all.
    """
    if len(vectors) < 2:
        return None
    asked = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:ASKED])
    found = exact_search(vectors[asked], vectors, 1, exclude=asked[:, None]).rows[:, 0]
    size = len(names)
    pairs = (labels[asked], labels[found])
    counts = sparse.coo_array((np.ones(len(asked)), pairs), (size, size)).tocsr()
    shares = sparse.diags_array(1 / np.maximum(counts.sum(axis=1), 1)) @ counts
    kept, note = np.arange(size), ""
    if size > CLASSES:
        off = shares - sparse.diags_array(shares.diagonal())
        confused = (off + off.T).max(axis=1).toarray().ravel()
        kept = np.sort(np.argsort(-confused, kind="stable")[:CLASSES])
        note = f"The {CLASSES} of {size:,} classes that are confused most; shares are of all neighbours."
    if len(asked) < len(vectors):
        note = f"{note} Of {len(asked):,} of the {len(vectors):,} items.".strip()
    return Confusion(
        labels=tuple(short(names[int(n)], 40) for n in kept),
        shares=tuple(tuple(row) for row in shares.tocsr()[kept][:, kept].toarray().tolist()),
        note=note,
    )


def worst(values: NDArray[np.float64], count: int = WORST) -> list[int]:
    """The rows with the lowest values, worst first; of equals the first."""
    return [int(row) for row in np.argsort(values, kind="stable")[:count]]


def text_example(
    task: str,
    direction: str,
    query: str,
    found: Sequence[tuple[str, float, bool]],
    *,
    rank: int | None = None,
    image: bytes | None = None,
) -> Example:
    """A query and the texts found for it: text, score, relevant."""
    hits = tuple(Hit(caption=short(text), score=score, relevant=bool(good)) for text, score, good in found)
    return Example(split=task, direction=direction, text=short(query), image=image, rank=rank, hits=hits)


def short(text: str, most: int = TEXT) -> str:
    """A text, cut where it is longer than the page has room for."""
    return text if len(text) <= most else text[: most - 1] + "…"
