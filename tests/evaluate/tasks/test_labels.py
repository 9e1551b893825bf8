"""Classification, clustering, zero- and few-shot: against scikit-learn and by hand; wrong labels by row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, v_measure_score
from sklearn.neighbors import KNeighborsClassifier

from rayemb.config import ConfigError, from_mapping
from rayemb.evaluate.encoders import ModelEncoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.tasks import ClassificationConfig, ClusteringConfig, FewShotConfig, Means, ZeroShotConfig
from tests.evaluate.tasks.conftest import DOCUMENTS, SUBJECTS, jsonl

Labelled = tuple[str, str]


def test_classification_beats_chance_and_knn_is_scikit_learns(labelled: Labelled, encoder: ModelEncoder) -> None:
    train, test = labelled
    task = from_mapping(
        ClassificationConfig,
        {"train": {"file": train}, "test": {"file": test}, "methods": ["probe", "knn", "bayes"], "k": 5},
    )
    found = task.load("cls").run(encoder, Means())
    figures = task.figures(found.items.columns)
    assert tuple(figures) == task.metrics
    assert figures["probe_accuracy"] > 0.8
    assert figures["probe_per_class"] == pytest.approx(figures["probe_accuracy"])  # classes of one size
    x, y = encoder.texts([t for _, t, _ in DOCUMENTS[::2]]), [s for _, _, s in DOCUMENTS[::2]]
    q, z = encoder.texts([t for _, t, _ in DOCUMENTS[1::2]]), [s for _, _, s in DOCUMENTS[1::2]]
    theirs = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, y)
    assert found.items.columns["knn_accuracy"].tolist() == (theirs.predict(q) == np.array(z)).astype(float).tolist()
    assert found.shown.confusion is not None
    assert found.shown.confusion.labels == tuple(sorted(SUBJECTS))
    np.testing.assert_allclose(np.sum(found.shown.confusion.shares, axis=1), 1)


def test_clustering_is_scikit_learns(labelled: Labelled, encoder: ModelEncoder) -> None:
    task = from_mapping(ClusteringConfig, {"data": {"file": labelled[0]}})
    found = task.load("clu").run(encoder, Means(seed=3))
    x, y = encoder.texts([t for _, t, _ in DOCUMENTS[::2]]), [s for _, _, s in DOCUMENTS[::2]]
    theirs = KMeans(4, n_init=10, random_state=3).fit_predict(x.astype(np.float64))
    figures = task.figures(found.items.columns)
    assert figures["v_measure"] == pytest.approx(v_measure_score(y, theirs), abs=1e-9)
    assert figures["ami"] == pytest.approx(adjusted_mutual_info_score(y, theirs), abs=1e-9)
    assert figures["accuracy"] >= 0.5


def test_zero_shot_by_hand(labelled: Labelled, encoder: ModelEncoder) -> None:
    templates = ["{}", "a text about {}."]
    task = from_mapping(
        ZeroShotConfig,
        {"data": {"file": labelled[0]}, "templates": templates, "names": {"bread": "fresh bread"}, "ks": [1, 2]},
    )
    found = task.load("zero").run(encoder, Means())
    classes = []
    for name in sorted(SUBJECTS):
        of = encoder.texts([t.format("fresh bread" if name == "bread" else name) for t in templates]).mean(axis=0)
        classes.append(of / np.linalg.norm(of))
    scores = encoder.texts([t for _, t, _ in DOCUMENTS[::2]]) @ np.array(classes).T
    right = scores.argmax(axis=1) == [sorted(SUBJECTS).index(s) for _, _, s in DOCUMENTS[::2]]
    assert found.items.columns["accuracy@1"].tolist() == right.astype(float).tolist()
    assert 0.4 < right.mean() < 1
    worst = found.shown.examples[0]
    assert worst.rank is not None
    assert worst.rank > 1
    assert worst.hits[worst.rank - 1].relevant


def test_few_shot_sees_the_same_episodes_again(labelled: Labelled, encoder: ModelEncoder) -> None:
    task = from_mapping(FewShotConfig, {"data": {"file": labelled[0]}, "ways": 3, "queries": 5, "episodes": 50})
    loaded = task.load("few")
    a, b, c = (loaded.run(encoder, Means(seed=seed, show=False)).items.columns["accuracy"] for seed in (0, 0, 1))
    assert a.tolist() == b.tolist() != c.tolist()
    assert len(a) == 50
    assert a.mean() > 1 / 3


def test_pictures_come_from_parquet(tmp_path: Path) -> None:
    rows = [{"image": bytes([n + 1]), "label": "ab"[n % 2]} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "i.parquet")

    class Pictures:
        name, digest = "p", ""

        def images(self, images: Any) -> Any:
            return np.stack([np.float32([data[0] % 2, 1 - data[0] % 2]) for data in images])

    data = {"file": str(tmp_path / "i.parquet"), "input": "image"}
    task = from_mapping(ClusteringConfig, {"data": data})
    found = task.load("t").run(Pictures(), Means())  # type: ignore[arg-type]
    assert task.figures(found.items.columns)["accuracy"] == 1
    assert task.direction == "image→cluster"
    assert found.shown.space is not None
    assert found.shown.space.images[0] == rows[0]["image"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}] * 3, r"d.jsonl: all 3 labels are 'x'"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], r"line 2: label is missing"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], r"line 2: text is empty"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], r"each of the 2 items has a label of its own"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(EvaluateError, match=message):
        from_mapping(ClusteringConfig, {"data": {"file": path}}).load("t")


def test_what_cannot_be_asked_is_named(tmp_path: Path, labelled: Labelled) -> None:
    train = jsonl(tmp_path / "tr.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(EvaluateError, match=r"test.parquet, row 1: label 'cats' has no training item"):
        from_mapping(ClassificationConfig, {"train": {"file": train}, "test": {"file": labelled[1]}}).load("t")
    with pytest.raises(EvaluateError, match=r"the smallest class is 'bread' with 10"):
        from_mapping(FewShotConfig, {"data": {"file": labelled[0]}}).load("t")
    with pytest.raises(ConfigError, match="give file or corpus"):
        from_mapping(ClusteringConfig, {"data": {}})
    with pytest.raises(ConfigError, match=r"needs one \{\} for the name"):
        from_mapping(ZeroShotConfig, {"data": {"file": "x"}, "templates": ["none"]})
