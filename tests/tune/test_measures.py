"""What is measured of a trained model: right figures, and words for what there is nothing for."""

from pathlib import Path

import numpy as np
import pytest

from rayemb.config import ConfigError, from_mapping, load
from rayemb.data import Corpus
from rayemb.evaluate.diagnostics import lidar, tolerance
from rayemb.models import Model
from rayemb.models.tokenizer import TextTokenizer
from rayemb.train import TrainConfig
from rayemb.tune import TuneConfig, TuneError, check_sweep
from rayemb.tune.measures import Diagnostics, Latency, Size, Trained
from tests.data.corpora import write_corpus

SMALL = [
    "model.dim=16",
    "model.image.image_size=16",
    "model.image.widths=[8, 16]",
    "model.image.depths=[1, 1]",
    "model.text.width=16",
    "model.text.depth=1",
    "model.tokenizer.vocab_size=600",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder: Path = tmp_path_factory.mktemp("measured")
    corpus = write_corpus(folder / "corpus", {"train": [8], "val": [24]}, concepts=6)
    config = load(TrainConfig, None, SMALL)
    model = Model.create(
        config.model, TextTokenizer.train(corpus.column("val", "text"), config.model.tokenizer), seed=0
    )
    return Trained(model, str(folder / "model"), corpus.uri, config)


def test_diagnostics_are_those_of_the_vectors(trained: Trained) -> None:
    measure = Diagnostics(names=("tolerance", "lidar"), rows=20)
    found = measure.measure(trained)
    assert tuple(found) == measure.metrics == ("val/tolerance", "val/lidar")
    corpus = Corpus.open(trained.corpus_uri)
    images = trained.model.embed_images(corpus.column("val", "image")[:20])
    texts = trained.model.embed_texts(corpus.column("val", "text")[:20])
    labels = np.array(corpus.column("val", "concept_key")[:20])
    assert found["val/tolerance"] == pytest.approx(tolerance(images, labels), abs=1e-6)
    assert found["val/lidar"] == pytest.approx(lidar(np.stack([images, texts], axis=1)), rel=1e-5)


def test_a_diagnostic_that_there_is_nothing_for_is_named(trained: Trained) -> None:
    with pytest.raises(TuneError, match="utilisation needs train"):
        Diagnostics(names=("utilisation",)).measure(trained)
    with pytest.raises(TuneError, match="no split 'dev'"):
        Diagnostics(split="dev").measure(trained)
    with pytest.raises(ConfigError, match="no diagnostic 'lydar'"):
        from_mapping(TuneConfig, {"measures": [{"name": "diagnostics", "names": ["lydar"]}]})


def test_size_and_latency(trained: Trained) -> None:
    model: Model = trained.model
    size = Size().measure(trained)
    assert size["bytes_per_vector"] == 4 * model.dim
    assert size["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert Latency(queries=3).measure(trained)["query_ms"] > 0


def test_what_is_watched_must_be_measured() -> None:
    with pytest.raises(TuneError, match="no evaluation yields 'val/tolerance'") as caught:
        check_sweep(TuneConfig(watch=("val/tolerance",)), TrainConfig())
    assert caught.value.where == "tune.watch.val/tolerance"
    check_sweep(TuneConfig(watch=("val/tolerance",), measures=[Diagnostics()]), TrainConfig())
