"""Pair classification against sentence-transformers', mteb's and scikit-learn's own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
)

from rayemb.evaluate.metrics import MetricError, pair_classification, pair_hits, pair_similarities

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


class Table:
    """As much of a SentenceTransformer as the evaluator needs: texts are row numbers."""

    similarity_fn_name = "cosine"

    def __init__(self, rows: NDArray[np.float64]) -> None:
        self.rows = rows

    def encode(self, texts: list[str], **_: Any) -> NDArray[np.float64]:
        return self.rows[[int(t) for t in texts]]


# Not the cosine of the lattice: their normalisation rounds, which splits ties by chance.
@pytest.mark.parametrize(
    ("similarity", "lattice"),
    [(name, False) for name in SIMILARITIES] + [(name, True) for name in SIMILARITIES if name != "cosine"],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_sentence_transformers(seed: int, lattice: bool, similarity: Any) -> None:
    """On random vectors, and on small whole numbers: ties, duplicates and zero vectors."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (60, 2)).astype(np.float64) if lattice else rng.normal(size=(60, 8))
    a = rng.integers(0, 60, 200)
    b = (a + rng.integers(1, 60, 200)) % 60
    labels = (rng.random(200) < 0.3).astype(np.int64)
    evaluator = BinaryClassificationEvaluator(
        list(map(str, a)), list(map(str, b)), labels.tolist(), similarity_fn_names=[similarity], write_csv=False
    )
    theirs = evaluator.compute_metrics(Table(rows))[similarity]
    ours = pair_classification(pair_similarities(rows[a], rows[b], similarity), labels)
    sign = -1 if similarity in ("euclidean", "manhattan") else 1
    for name, value in {
        "ap": ours.average_precision,
        "accuracy": ours.accuracy,
        "accuracy_threshold": sign * ours.accuracy_threshold,
        "f1": ours.f1,
        "f1_threshold": sign * ours.f1_threshold,
        "precision": ours.precision,
        "recall": ours.recall,
        "mcc": ours.mcc,
    }.items():
        assert value == pytest.approx(theirs[name], abs=1e-9), name


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1 + 2**-52, -1e300, 1e300, 5e-324]), st.booleans()),
        min_size=2,
        max_size=30,
    ).filter(lambda pairs: len({label for _, label in pairs}) == 2)
)
def test_every_figure_is_what_its_threshold_gives(pairs: list[tuple[float, bool]]) -> None:
    """By scikit-learn, at the threshold that is given back; and no threshold is better."""
    s_N, y_N = np.array([s for s, _ in pairs]), np.array([y for _, y in pairs]).astype(np.int64)
    found = pair_classification(s_N, y_N)
    assert found.average_precision == pytest.approx(average_precision_score(y_N, s_N), abs=1e-9)
    at_accuracy, at_f1 = s_N >= found.accuracy_threshold, s_N >= found.f1_threshold
    assert found.accuracy == pytest.approx(accuracy_score(y_N, at_accuracy), abs=1e-12)
    assert found.f1 == pytest.approx(f1_score(y_N, at_f1), abs=1e-12)
    assert found.precision == pytest.approx(precision_score(y_N, at_f1), abs=1e-12)
    assert found.recall == pytest.approx(recall_score(y_N, at_f1), abs=1e-12)
    assert found.mcc == pytest.approx(matthews_corrcoef(y_N, at_f1), abs=1e-9)
    for threshold in [*s_N, np.inf]:
        same = s_N >= threshold
        assert (same == y_N).mean() <= found.accuracy + 1e-12
        assert 2 * (same & (y_N == 1)).sum() / (same.sum() + y_N.sum()) <= found.f1 + 1e-12
    assert pair_hits(s_N, y_N, found.accuracy_threshold).mean() == pytest.approx(found.accuracy)
    assert (found.pairs, found.positives) == (len(y_N), y_N.sum())


@pytest.mark.parametrize("seed", range(3))
def test_equals_mteb_where_its_thresholds_suffice(seed: int) -> None:
    """mteb leaves the lowest threshold (all pairs are the same) and the highest (none is) out."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(300) < 0.4).astype(np.int64)
    s_N = rng.normal(size=300).round(1) + 1.5 * labels
    theirs = AbsTaskPairClassification._compute_metrics_values(
        Bare(), s_N.tolist(), labels, high_score_more_similar=True
    )
    ours = pair_classification(s_N, labels)
    for name, value in {
        "ap": ours.average_precision,
        "accuracy": ours.accuracy,
        "f1": ours.f1,
        "precision": ours.precision,
        "recall": ours.recall,
    }.items():
        assert value == pytest.approx(theirs[name], abs=1e-9), name


class Bare(AbsTaskPairClassification):
    """The task's arithmetic without its data."""

    def __init__(self) -> None:
        pass


def test_a_constant_model_has_the_share_of_positives() -> None:
    labels = np.array([1, 0, 0, 0])
    for order in (labels, labels[::-1]):
        found = pair_classification(np.full(4, 0.7), order)
        assert found.average_precision == 0.25
        assert found.accuracy == 0.75  # all of them different
        assert found.accuracy_threshold > 0.7
        assert found.mcc == 0.0


def test_millions_of_pairs_do_not_overflow_the_table() -> None:
    labels = np.tile([0, 1], 500_000)
    found = pair_classification(labels * 1.0, labels)
    assert found.mcc == 1.0
    assert found.average_precision == 1.0


def test_similarities_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 7)).astype(np.float32), rng.normal(size=(50, 7)).astype(np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    expected = {
        "dot": [float(u @ v) for u, v in zip(x, y, strict=True)],
        "cosine": [float(u @ v / np.sqrt((u @ u) * (v @ v))) for u, v in zip(x, y, strict=True)],
        "euclidean": [
            -float(sum((i - j) ** 2 for i, j in zip(u, v, strict=True)) ** 0.5) for u, v in zip(x, y, strict=True)
        ],
        "manhattan": [-float(sum(abs(i - j) for i, j in zip(u, v, strict=True))) for u, v in zip(x, y, strict=True)],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(pair_similarities(a, b, name), values, rtol=1e-12)  # type: ignore[arg-type]
    assert pair_similarities(0 * a, b).tolist() == [0.0] * 50
    assert pair_similarities(1e30 * a[:1], 1e30 * a[:1]).tolist() == pytest.approx([1.0])


def test_blocks_make_no_difference() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5000, 300)), rng.normal(size=(5000, 300))  # more than one block
    np.testing.assert_array_equal(pair_similarities(a, b)[4900:], pair_similarities(a[4900:], b[4900:]))


def test_bad_input_is_named() -> None:
    good, labels = np.array([0.1, 0.2, 0.3]), np.array([0, 1, 0])
    for label, y in ((0, np.zeros(3, int)), (1, np.ones(3, int))):
        with pytest.raises(MetricError, match=f"all 3 pairs are of class {label}.*pairs of both classes"):
            pair_classification(good, y)
    for value in (np.nan, np.inf):
        with pytest.raises(MetricError, match="pair 1 has the similarity"):
            pair_classification(np.array([0.1, value, 0.2]), labels)
    with pytest.raises(MetricError, match=r"pair 2 has the label 2\. 1 is same, 0 is not"):
        pair_classification(good, np.array([0, 1, 2]))
    with pytest.raises(MetricError, match="labels: expected 3 entries"):
        pair_classification(good, labels[:2])
    with pytest.raises(MetricError, match="labels: expected integers"):
        pair_classification(good, labels * 1.0)
    with pytest.raises(MetricError, match="there are no pairs"):
        pair_hits(np.array([]), np.array([], int), 0.5)
    with pytest.raises(MetricError, match="the threshold is nan"):
        pair_hits(good, labels, float("nan"))
    a = np.ones((3, 2))
    broken = a.copy()
    broken[2, 0] = np.nan
    for pair in ((a, broken), (broken, a)):
        with pytest.raises(MetricError, match="pair 2 holds NaN"):
            pair_similarities(*pair)
    with pytest.raises(MetricError, match="expected two of floats"):
        pair_similarities(a, a[:2])
    with pytest.raises(MetricError, match="no similarity 'jaccard'"):
        pair_similarities(a, a, "jaccard")  # type: ignore[arg-type]
