"""Trainings over several corpora on real engines: tasks, losses of their own, hard negatives, labels, bad rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayemb.config import load
from rayemb.data import Corpus, CorpusError
from rayemb.data.corpus import SCHEMA
from rayemb.errors import RayembError
from rayemb.models import Model
from rayemb.train import TrainConfig, TrainError, train
from tests.data.corpora import corrupt, write_corpus

QUICK = [
    "steps=8",
    "batch_size=16",
    "logging.every=1",
    "checkpoints.every=4",
    "max_failures=0",
    "model.dim=16",
    "model.image.image_size=16",
    "model.image.widths=[8, 16]",
    "model.image.depths=[1, 1]",
    "model.text.width=16",
    "model.text.depth=1",
    "model.tokenizer.vocab_size=600",
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        "images": write_corpus(root / "images", {"train": [60, 40], "val": [20]}, concepts=30),
        "pairs": write_corpus(root / "pairs", {"train": [80]}, pairs=True),
    }


def run(folder: Path, corpus: Corpus, *overrides: str) -> Model:
    config = load(TrainConfig, None, [*QUICK, *overrides])
    return train(config, corpus.uri, str(folder / "model"), str(folder / "runs"))


@pytest.mark.slow
def test_images_and_texts_in_turn_each_with_its_loss(
    ray_cluster: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    pairs = f"{{uri: '{corpora['pairs'].uri}', weight: 1, query_prefix: 'query: ', hard_negatives: 2}}"
    overrides = [
        "corpora.images={weight: 1, loss: {name: siglip}}",
        f"corpora.pairs={pairs}",
        "mix.order=round_robin",
        "mix.distinct=[text]",
        "zero_stage=2",
        "ema.decay=0.5",
        "parameters=[{pattern: 'text\\.positions', freeze: true}]",
        "micro_batch_size=5",
        "exchange=ring",
        "evaluation.every=4",
    ]
    model = run(tmp_path, corpora["images"], *overrides)
    history = model.info["training"]
    losses = np.array([row["loss"] for row in history])
    assert np.isfinite(losses).all()
    # SigLIP with its bias begins far from the logarithm of a batch and its hard negatives.
    assert abs(losses[1] - np.log(16 + 24)) < 0.9 < abs(losses[0] - losses[1])
    assert [row["bad_rows"] for row in history] == [0] * 8
    assert 0 <= history[3]["val/recall@1"] <= 1
    assert [corpus["name"] for corpus in model.info["corpora"]] == ["images", "pairs"]
    assert sorted(model.info["loss"]) == ["corpora.images.loss", "corpora.pairs.loss"]
    # Both towers learned, not one alone.
    start = Model.create(load(TrainConfig, None, QUICK).model, model.tokenizer, 0)
    for name in ("image_projection.weight", "text_projection.weight"):
        assert not np.allclose(start.network.state_dict()[name], model.network.state_dict()[name])


@pytest.mark.slow
def test_rows_of_two_corpora_in_a_batch_with_a_temperature_of_each(
    ray_cluster: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    other = write_corpus(tmp_path / "other", {"train": [40]}, concepts=30)
    mixed = [
        "mix.batches=mixed",
        "corpora={a: {}, b: {uri: '" + other.uri + "'}}",
        "loss={name: rzenembed, tasks: 2}",
        "zero_stage=3",
        "precision=fp16",
        "checkpoint_activations=true",
        "adapters={name: lora, rank: 2}",
    ]
    model = run(tmp_path, corpora["images"], *mixed)
    history = model.info["training"]
    # Saved as plain weights, with the adapters in them.
    assert model.info["adapters"] == load(TrainConfig, None, mixed[-1:]).model_dump()["adapters"]
    start = Model.create(load(TrainConfig, None, QUICK).model, model.tokenizer, 0).network.state_dict()
    # What is frozen is as it was to the last bit, though the engine had it in fp16.
    moved = {name for name, value in start.items() if not torch.equal(model.network.state_dict()[name], value)}
    assert {"text.blocks.0.qkv.weight", "text_projection.weight"} <= moved
    assert not {"text.tokens.weight", "text.positions", "text.norm.weight", "text.blocks.0.qkv.bias"} & moved
    assert len(history) == 8
    # The scale of the loss starts too high: such steps are left out, and have no norm.
    norms = [row["gradient_norm"] for row in history]
    assert history[-1]["skipped_steps"] == norms.count(None) < 8
    assert np.isfinite([row["loss"] for row in history]).all()


@pytest.mark.slow
def test_concepts_are_classes_where_a_loss_has_a_proxy_of_each(
    ray_cluster: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    balanced = "corpora.main.sampler={name: class_balanced, per_class: 2}"
    with pytest.raises(TrainError, match="there are 30 concepts and 29 classes") as caught:
        run(tmp_path, corpora["images"], balanced, "loss={name: class_proxies, classes: 29}")
    assert caught.value.where == "train.loss.classes"
    history = run(tmp_path, corpora["images"], balanced, "loss={name: class_proxies, classes: 30}").info["training"]
    assert np.isfinite([row["loss"] for row in history]).all()


@pytest.mark.slow
def test_bad_rows_are_set_aside_and_too_many_end_the_run(ray_cluster: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [400, 400, 400]}, group_rows=10)
    files = sorted((tmp_path / "corpus/split=train").glob("*.parquet"))
    corrupt(files[0], 7)
    rows = pq.read_table(files[1], partitioning=None).to_pylist()
    rows[33]["image"] = b"no picture at all"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), files[1], row_group_size=10)
    # 1,200 rows: each comes once.
    options: tuple[Any, ...] = (corpus, "steps=12", "batch_size=100", "evaluation.tasks={}", "checkpoints.every=6")
    model = run(tmp_path, *options)
    assert model.info["training"][-1]["bad_rows"] == 11
    parts = sorted((tmp_path / "runs").glob("train-*/quarantine/*.parquet"))
    bad = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert sorted(row["reason"] for row in bad) == ["corrupt_file"] * 10 + ["unreadable"]
    assert {row["source"].split(" row group ")[0] for row in bad} == {str(files[0]), str(files[1])}
    with pytest.raises(TrainError, match=r"BadRowsError.*\d+ of 1\d00 rows could not be used \(.*corrupt_file"):
        run(tmp_path / "strict", *options, "max_bad_fraction=0.005")


def test_corpora_that_cannot_be_trained_on_are_refused(
    ray_cluster: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    both = "corpora={a: {}, b: {uri: '" + corpora["pairs"].uri + "'}}"
    with pytest.raises(TrainError, match="image_text and text_pair cannot share a batch"):
        run(tmp_path, corpora["images"], both, "mix.batches=mixed")
    with pytest.raises(TrainError, match="no dropout to tell the two apart") as caught:
        run(tmp_path, corpora["images"], "corpora.main.identical=true")
    assert caught.value.where == "train.corpora.main.identical"
    with pytest.raises(CorpusError, match="no split 'test'"):
        run(tmp_path, corpora["images"], "corpora.main.split=test")
    with pytest.raises(RayembError, match=r"train\.parameters\[0\]\.pattern: no parameter matches 'imgae'"):
        run(tmp_path, corpora["images"], "parameters=[{pattern: imgae}]")
    with pytest.raises(TrainError, match="has 20 rows, fewer than one batch"):
        run(tmp_path, corpora["images"], "corpora.main.split=val", "batch_size=32")
