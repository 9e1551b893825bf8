"""Evaluations on real ZeRO-3 engines in two processes, against one process that holds everything and naive loops."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

from rayemb.data import Corpus
from rayemb.data.augment import AugmentConfig
from rayemb.data.corpus import SCHEMA
from rayemb.data.decode import DecodeSettings
from rayemb.data.mix import CorpusEntry
from rayemb.errors import RayembError
from rayemb.losses import InfoNCEConfig
from rayemb.models import ConvNetConfig, Model, TextTokenizer, TextTransformerConfig, TokenizerConfig, TwoTowerConfig
from rayemb.parallel import Alone, Encoded, exchange_named
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine
from rayemb.train.evaluation import EvaluationConfig, Evaluator, open_tasks
from rayemb.train.evaluation.base import Task
from rayemb.train.evaluation.retrieval import RetrievalConfig
from rayemb.train.objective import Objective
from rayemb.train.step import train_step
from tests.data.corpora import png, write_corpus
from tests.parallel.processes import run_processes

WORLD, ROWS, CONCEPTS = 2, 23, 9
MODEL = TwoTowerConfig(
    dim=16,
    image=ConvNetConfig(image_size=16, widths=(8, 16), depths=(1, 1)),
    text=TextTransformerConfig(width=16, depth=1, heads=2),
    tokenizer=TokenizerConfig(vocab_size=512),
)
TASKS = {
    "images": {"kind": "retrieval", "rows": 100, "ks": [1, 3]},
    "one": {"kind": "retrieval", "split": "one", "ks": [1]},  # of which one rank has nothing
    "names": {"kind": "zero_shot", "templates": ["a drawing of a {}", "{}"], "ks": [1, 5], "rows": 20},
    "near": {"kind": "knn", "k": 1},
    "near_texts": {"kind": "knn", "k": 3, "side": "document"},
    "scored": {"kind": "sts", "corpus": "pairs", "split": "test", "query_prefix": "ask: "},
}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CorpusEntry]:
    root = tmp_path_factory.mktemp("corpora")
    images = write_corpus(root / "images", {"train": [30], "val": [10, ROWS - 10], "one": [1]}, concepts=CONCEPTS)
    pairs = write_corpus(root / "pairs", {"train": [30], "test": [14]}, pairs=True)
    (file,) = (root / "pairs/split=test").glob("*.parquet")
    rows = pq.read_table(file, partitioning=None).to_pylist()
    for number, row in enumerate(rows):
        row["score"] = None if number in (3, 8) else float(number % 5)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=5, write_page_checksum=True)
    return {"images": CorpusEntry(uri=images.uri), "pairs": CorpusEntry(uri=pairs.uri, query_prefix="query: ")}


@pytest.fixture(scope="module")
def decode(entries: dict[str, CorpusEntry]) -> DecodeSettings:
    texts = Corpus.open(str(entries["images"].uri)).column("train", "text")
    # Flips always: an evaluation sees the rows as they are all the same.
    return DecodeSettings(TextTokenizer.train(texts, MODEL.tokenizer), 16, 0, AugmentConfig(flip=1.0, grey=1.0))


@pytest.fixture(scope="module")
def tasks(entries: dict[str, CorpusEntry]) -> dict[str, Task]:
    return open_tasks(EvaluationConfig.model_validate({"tasks": TASKS}), entries)


def objective(decode: DecodeSettings) -> Objective:
    torch.manual_seed(0)
    network = Model.create(MODEL, decode.tokenizer, 0).network.train()
    return Objective(network, InfoNCEConfig(temperature=0.1).build(MODEL.dim))


def on_rank(rank: int, world: int, tasks: dict[str, Task], decode: DecodeSettings) -> list[Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    config = TrainConfig(model=MODEL, batch_size=4, workers=world, zero_stage=3)
    found: list[Any] = []
    for evaluating in (True, False):
        module, exchange = objective(decode), exchange_named("gather")
        engine = create_engine(module, config)
        evaluator = Evaluator(tasks, engine, exchange, decode, batch_size=4)
        for step in range(3):
            if evaluating:
                found.append(evaluator.run())
            generator = torch.Generator().manual_seed(10 * step + rank)
            batch = {
                "pixels": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator),
                "tokens": torch.randint(1, 250, (2, 5), generator=generator),
            }

            def loss(encoded: Any, module: Any = module, batch: Any = batch, exchange: Any = exchange) -> torch.Tensor:
                return module.share(encoded, batch, exchange)

            step_ = train_step(engine, [batch], loss)
            found.append(float(step_.loss))
    return found


class Plain:
    """What an evaluator asks of an engine, on a plain module."""

    device = "cpu"

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, batch: dict[str, torch.Tensor]) -> Any:
        return self.module(batch)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


class Known(torch.nn.Module):
    """An encoder whose vectors are known by row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.nn.functional.normalize(torch.randn(2, rows, 16, generator=generator), dim=-1)
        self.queries, self.documents = table

    def forward(self, batch: dict[str, torch.Tensor]) -> Encoded:
        return Encoded({"queries": self.queries[batch["row"]], "documents": self.documents[batch["row"]]}, {})


def alone(tasks: dict[str, Task], decode: DecodeSettings, module: torch.nn.Module) -> Evaluator:
    return Evaluator(tasks, Plain(module), Alone(), decode, batch_size=1000)


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds_and_training_does_not_notice(
    tasks: dict[str, Task], decode: DecodeSettings
) -> None:
    ranks = run_processes(WORLD, on_rank, tasks, decode)
    first = [entry for entry in ranks[0] if isinstance(entry, dict)]
    for found in ranks:
        assert [entry for entry in found if isinstance(entry, dict)] == first
        losses = [entry for entry in found if isinstance(entry, float)]
        assert losses[:3] == losses[3:]  # with evaluations, and without
    module = objective(decode)
    expected = alone(tasks, decode, module).run()
    assert module.training
    assert first[0].keys() == expected.keys()
    for name, value in expected.items():
        assert first[0][name] == pytest.approx(value, abs=2e-5), name
    assert first[2] != first[0]


def test_the_figures_are_those_of_naive_loops(
    tasks: dict[str, Task], decode: DecodeSettings, entries: dict[str, CorpusEntry]
) -> None:
    module = objective(decode)
    found = alone(tasks, decode, module).run()
    model = Model(module.network, decode.tokenizer)
    numbers = list(range(30, 30 + ROWS))
    x = model.embed_images([png(n) for n in numbers])
    y = model.embed_texts([f"text {n}" for n in numbers])
    concepts = [n % CONCEPTS for n in numbers]

    def recall(queries: Any, candidates: Any, k: int) -> float:
        hits = 0
        for q, concept in zip(queries, concepts, strict=True):
            order = np.argsort(-(candidates @ q), kind="stable")[:k]
            hits += any(concepts[j] == concept for j in order)
        return hits / len(queries)

    for k in (1, 3):
        assert found[f"images/query_recall@{k}"] == pytest.approx(recall(x, y, k))
        assert found[f"images/document_recall@{k}"] == pytest.approx(recall(y, x, k))
        assert found[f"images/recall@{k}"] == pytest.approx((recall(x, y, k) + recall(y, x, k)) / 2)
    assert found["images/alignment"] == pytest.approx(((x - y) ** 2).sum(1).mean(), abs=1e-5)

    names = [f"concept {c}" for c in range(CONCEPTS)]
    parts = [model.embed_texts([template.format(name) for name in names]) for template in ("a drawing of a {}", "{}")]
    classes = parts[0] + parts[1]
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    order = np.argsort(-(x[:20] @ classes.T), axis=1)
    for k in (1, 5):
        hits = [concept in best[:k] for concept, best in zip(concepts[:20], order, strict=True)]
        assert found[f"names/accuracy@{k}"] == pytest.approx(np.mean(hits))

    right = [
        KNeighborsClassifier(1).fit(np.delete(x, i, 0), np.delete(concepts, i)).predict(x[i : i + 1])[0] == concepts[i]
        for i in range(ROWS)
    ]
    assert found["near/accuracy"] == pytest.approx(np.mean(right))
    same = [x[i] @ x[j] for i in range(ROWS) for j in range(ROWS) if i != j and concepts[i] == concepts[j]]
    assert found["near/tolerance"] == pytest.approx(np.mean(same), abs=1e-5)

    rows = [n for n in range(30, 44) if n - 30 not in (3, 8)]
    cosines = [float(model.embed_texts([f"ask: query {n}"])[0] @ model.embed_texts([f"text {n}"])[0]) for n in rows]
    scores = [float((n - 30) % 5) for n in rows]
    assert found["scored/spearman"] == pytest.approx(stats.spearmanr(cosines, scores).statistic, abs=1e-6)
    assert found["scored/pearson"] == pytest.approx(stats.pearsonr(cosines, scores).statistic, abs=1e-4)
    p = [np.linalg.svd(side.astype(float), compute_uv=False) for side in (x, y)]
    p = [s / s.sum() + 1e-7 for s in p]
    assert found["images/rankme"] == pytest.approx(min(math.exp(-(s * np.log(s)).sum()) for s in p), rel=1e-4)


def test_a_collapse_and_bad_rows_are_told_once(decode: DecodeSettings, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [10], "val": [12]})
    (file,) = (tmp_path / "corpus/split=val").glob("*.parquet")
    rows = pq.read_table(file, partitioning=None).to_pylist()
    rows[4]["image"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=5)
    opened = open_tasks(EvaluationConfig(), {"main": CorpusEntry(uri=corpus.uri)})
    module = Known(len(rows))
    evaluator = alone(opened, decode, module)
    assert evaluator.run()["collapsed"] is False
    assert evaluator.warnings == ["1 rows of the evaluation val cannot be used and are left out"]
    module.documents[:] = module.documents[0]
    found = evaluator.run()
    assert found["collapsed"] is True
    assert found["val/rankme"] == pytest.approx(1, abs=1e-3)
    assert found["val/uniformity"] == pytest.approx(0, abs=1e-6)
    assert found["val/query_recall@1"] == 0  # ties are no hits
    (warning,) = evaluator.warnings
    assert warning.startswith("the vectors of val have collapsed: all vectors are nearly one (mean cosine 1.0")
    evaluator.run()
    assert evaluator.warnings == []


def test_what_cannot_be_evaluated_is_refused_with_its_key(entries: dict[str, CorpusEntry]) -> None:
    for task, message in (
        ({"kind": "retrieval", "split": "dev"}, "no split 'dev'"),
        ({"kind": "zero_shot", "corpus": "pairs", "split": "test"}, "needs images, not text_pair"),
        ({"kind": "sts"}, "needs pairs of texts, not image_text"),
        ({"kind": "sts", "corpus": "pairs", "split": "train"}, "split 'train' has no scores"),
    ):
        with pytest.raises(RayembError, match=message) as caught:
            open_tasks(EvaluationConfig.model_validate({"tasks": {"mine": task}}), entries)
        assert "mine" in caught.value.where or "corpora" in caught.value.where or "images" in caught.value.where
    # The default is there where its split is.
    assert open_tasks(EvaluationConfig(), {"pairs": entries["pairs"]}) == {}
    with pytest.raises(ValueError, match="not both"):
        RetrievalConfig(corpus="images", uri="elsewhere")
