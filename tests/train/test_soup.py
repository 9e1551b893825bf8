"""Soups of models on disk: the mean that is saved, the greedy choice on held-out digits, cards, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayemb.config import ConfigError, load
from rayemb.data import Corpus
from rayemb.models import Model, ModelError
from rayemb.pipeline import RunConfig
from rayemb.pipeline.stages import soup_stage
from rayemb.train import SoupConfig, SoupError, TrainConfig, soup
from rayemb.train.evaluation import open_tasks
from rayemb.train.soup import Judge
from tests.curate.digits import corpus_of, digit_rows, png, trained_model
from tests.models.tiny import tiny_model

ROWS, SEEN = 80, 797
# Noise that a model hardly feels, and noise that ruins it.
NOISE = {"a": 0.01, "far": 0.6, "b": 0.01, "c": 0.02}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soup")
    corpus_of(root / "corpus", digit_rows(ROWS))
    trained = trained_model()
    for number, (name, scale) in enumerate(NOISE.items()):
        generator = torch.Generator().manual_seed(number)
        model = Model.create(trained.network.config, trained.tokenizer, 0)
        state = {
            key: value + scale * torch.randn(value.shape, generator=generator)
            for key, value in trained.network.state_dict().items()
        }
        model.network.load_state_dict(state)
        model.info = {"seed": number, "loss": {"name": "infonce"}, "training": [{"step": 1}], "license": "MIT"}
        model.save(str(root / name))
    return root


def uris(place: Path, *names: str) -> list[str]:
    return [str(place / name) for name in names]


def training(place: Path) -> TrainConfig:
    task = {"kind": "retrieval", "uri": str(place / "corpus"), "split": "train", "rows": ROWS, "ks": [1]}
    return TrainConfig.model_validate({"evaluation": {"tasks": {"digits": task}, "batch_size": 32}})


def recall(model: Model) -> float:
    """Of both directions, by going through all pairs; ties count against the model."""
    rows = digit_rows(ROWS)
    images, texts = (
        model.embed_images([png(SEEN + n) for n in range(ROWS)]),
        model.embed_texts([r["text"] for r in rows]),
    )
    names = np.array([row["concept"] for row in rows])
    similarities = images.astype(np.float64) @ texts.T.astype(np.float64)
    hits = []
    for scores in (*similarities, *similarities.T):
        own = names == names[len(hits) % ROWS]
        hits.append(scores[own].max() > scores[~own].max())
    return float(np.mean(hits))


def averaged(place: Path, *names: str) -> Model:
    """The naive mean of the weights."""
    models = [Model.load(uri) for uri in uris(place, *names)]
    states = [model.network.state_dict() for model in models]
    mean = {key: torch.stack([state[key].double() for state in states]).mean(0).float() for key in states[0]}
    models[0].network.load_state_dict(mean)
    return models[0]


def test_the_mean_of_weighted_models_is_a_model(place: Path, tmp_path: Path) -> None:
    config = SoupConfig(models=uris(place, "a", "b", "c"), weights=[1, 2, 5])
    made = soup(config, TrainConfig(), "nowhere", str(tmp_path / "soup"))
    loaded = Model.load(str(tmp_path / "soup"))
    assert loaded.digest == made.digest
    states = [Model.load(uri).network.state_dict() for uri in config.models]
    for key, value in loaded.network.state_dict().items():
        expected = sum(weight * state[key].double() for weight, state in zip((1, 2, 5), states, strict=True)) / 8
        torch.testing.assert_close(value, expected.float(), rtol=0, atol=1e-7)
    ingredients = loaded.info["soup"]["ingredients"]
    assert [row["weight"] for row in ingredients] == [0.125, 0.25, 0.625]
    assert [row["digest"] for row in ingredients] == [Model.load(uri).digest for uri in config.models]
    assert (loaded.info["loss"], loaded.info["license"]) == ({"name": "infonce"}, "MIT")
    assert "training" not in loaded.info
    card = (tmp_path / "soup/README.md").read_text()
    assert "## Ingredients" in card
    assert all(f"| `{row['digest']}` | {row['weight']:.6g} |" in card for row in ingredients)
    # Again: the same one, not written anew. Of other weights: another.
    before = (tmp_path / "soup/rayemb.json").stat().st_mtime_ns
    assert soup(config, TrainConfig(), "nowhere", str(tmp_path / "soup")).digest == made.digest
    assert (tmp_path / "soup/rayemb.json").stat().st_mtime_ns == before
    plain = soup(SoupConfig(models=config.models), TrainConfig(), "nowhere", str(tmp_path / "soup"))
    assert plain.digest != made.digest


def test_a_judge_measures_the_mean_whatever_was_asked_before(place: Path) -> None:
    config = training(place)
    judge = Judge(uris(place, *NOISE), open_tasks(config.evaluation, config.corpora), config)
    # As a greedy choice asks, and as it does not.
    for places in ((0,), (1,), (0, 2), (0, 2, 1), (0, 2, 3), (3, 0)):
        names = [list(NOISE)[place] for place in places]
        assert judge.metrics(places)["digits/recall@1"] == pytest.approx(recall(averaged(place, *names)), abs=1e-9)


def test_greedy_leaves_out_the_model_that_hurts(ray_cluster: str, place: Path, tmp_path: Path) -> None:
    config = SoupConfig(models=uris(place, *NOISE), method="greedy", metric="digits/recall@1")
    said: list[str] = []
    made = soup(
        config, training(place), "nowhere", str(tmp_path / "soup"), progress=lambda done, of, text: said.append(text)
    )
    about = made.info["soup"]
    weights = {Path(row["uri"]).name: row["weight"] for row in about["ingredients"]}
    assert weights["far"] == 0
    assert sum(weights.values()) == pytest.approx(1)
    alone = {Path(row["uri"]).name: row["alone"] for row in about["ingredients"]}
    for name in NOISE:
        assert alone[name] == pytest.approx(recall(averaged(place, name)), abs=1e-9)
    assert about["value"] == pytest.approx(recall(Model.load(str(tmp_path / "soup"))), abs=1e-9)
    assert about["value"] >= max(alone.values())
    taken = [name for name, weight in weights.items() if weight]
    # The order of the manifest is the order in which they were taken: none made it worse.
    means = [recall(averaged(place, *taken[:count])) for count in range(1, len(taken) + 1)]
    assert means == sorted(means)
    with_far = recall(averaged(place, *taken, "far"))
    assert with_far < about["value"]
    for key, value in averaged(place, *taken).network.state_dict().items():
        torch.testing.assert_close(made.network.state_dict()[key], value, rtol=0, atol=1e-7)
    assert "chosen on held-out rows by `digits/recall@1`" in (tmp_path / "soup/README.md").read_text()
    assert any(text.startswith("digits/recall@1 of 2 ") for text in said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ["a", "b"], "weights": [1]}, "there are 1 of them and 2 models"),
        ({"models": ["a", "b"], "weights": [1, 0]}, "each must be above 0"),
        ({"models": ["a", "b"], "weights": [1, 1], "method": "greedy"}, "a greedy soup is a plain mean"),
        ({"models": ["a", "b", "a"]}, "a is there twice"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(SoupConfig, None, [f"{key}={value}" for key, value in settings.items()])


def test_what_makes_no_soup_is_said(place: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "soup")
    with pytest.raises(SoupError, match=r"^soup\.models: a soup needs two models or more"):
        soup(SoupConfig(models=uris(place, "a")), TrainConfig(), "nowhere", out)
    with pytest.raises(SoupError, match="is not written over one of its models"):
        soup(SoupConfig(models=uris(place, "a", "b")), TrainConfig(), "nowhere", str(place / "b"))
    with pytest.raises(ModelError, match="there is no model here"):
        soup(SoupConfig(models=uris(place, "a", "nothing")), TrainConfig(), "nowhere", out)
    tiny_model().save(str(tmp_path / "tiny"))
    mixed = SoupConfig(models=[*uris(place, "a"), str(tmp_path / "tiny")])
    with pytest.raises(ModelError, match=r"tiny: another architecture: parameter \S+ is of shape") as caught:
        soup(mixed, TrainConfig(), "nowhere", out)
    assert str(tmp_path / "tiny") == caught.value.where
    greedy = SoupConfig(models=uris(place, "a", "b"), method="greedy")
    with pytest.raises(SoupError, match=r"soup\.metric: val/recall@1 is not measured: there is no such split"):
        soup(greedy, TrainConfig(), Corpus.open(str(place / "corpus")).uri, out)
    assert not Path(out).exists()
    with pytest.raises(ConfigError, match=r"soup\.metric: 'val/recall@3' is not measured; there are val/recall@1"):
        load(RunConfig, None, ["soup.models=[a, b]", "soup.method=greedy", "soup.metric=val/recall@3"])


def test_the_stage_says_what_it_made(place: Path, tmp_path: Path) -> None:
    overrides = [f"workspace={tmp_path}", f"soup.models={uris(place, 'a', 'b')}"]
    outcome = soup_stage(load(RunConfig, None, overrides), lambda done, total, text: None)
    assert outcome.uri == str(tmp_path / "soup")
    assert outcome.summary == f"uniform mean of 2 of 2 models, {outcome.figures['digest'][:12]}"
