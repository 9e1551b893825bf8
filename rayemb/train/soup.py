"""Soups from the driver: the ingredients checked, a greedy choice judged by the trainer's evaluations, the model saved.

The mean itself is `rayemb.models.soup` (Wortsman et al., 2022).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import ray
import torch
from pydantic import Field, model_validator

from rayemb import storage
from rayemb.cluster import require_cpus
from rayemb.config import Config
from rayemb.data.augment import AugmentConfig
from rayemb.data.corpus import Corpus
from rayemb.data.decode import DecodeSettings
from rayemb.errors import RayembError
from rayemb.models import Model, ModelError, model_digest
from rayemb.models.soup import Greedy, WeightMean, greedy, require_alike, shared_info
from rayemb.parallel import Alone
from rayemb.progress import Progress
from rayemb.train.config import TrainConfig
from rayemb.train.evaluation import Evaluator, open_tasks
from rayemb.train.evaluation.base import Task
from rayemb.train.objective import Objective

FORMAT = 1  # of the fingerprint


class SoupError(RayembError):
    """Models that make no soup."""


class SoupConfig(Config):
    """The mean of several models' weights (model soups, Wortsman et al., 2022)."""

    models: list[str] = Field(
        [], description="two or more model directories, paths or URIs, of one architecture and tokenizer"
    )
    method: Literal["uniform", "greedy"] = Field(
        "uniform",
        description="uniform: the mean of all; greedy: the best alone first, then each with which the metric of the "
        "mean does not fall",
    )
    weights: list[float] | None = Field(None, description="uniform: of the models, in their order; null: equal")
    metric: str = Field("val/recall@1", description="greedy: task/metric of train.evaluation, on held-out rows")
    mode: Literal["max", "min"] = Field("max", description="whether more or less of it is better")

    @model_validator(mode="after")
    def _agree(self) -> "SoupConfig":
        repeated = [uri for number, uri in enumerate(self.models) if uri in self.models[:number]]
        if repeated:
            raise ValueError(f"models: {repeated[0]} is there twice; to count it more give weights")
        if self.weights is None:
            return self
        if self.method == "greedy":
            raise ValueError("weights: a greedy soup is a plain mean; leave them out, or use method=uniform")
        if len(self.weights) != len(self.models):
            raise ValueError(f"weights: there are {len(self.weights)} of them and {len(self.models)} models")
        if min(self.weights) <= 0:
            raise ValueError("weights: each must be above 0; leave the model out")
        return self


def soup(
    config: SoupConfig, training: TrainConfig, corpus_uri: str, uri: str, *, progress: Progress | None = None
) -> Model:
    """The mean of the models, saved at `uri`; one that is already there, of the same ingredients, is used.

    Models are held two at a time, and the mean in fp64. A greedy soup is judged in one process of the cluster by
    `training.evaluation` on `training.corpora`, `corpus_uri` where they name none; uniform ones need no corpus, and
    no Ray. Raises SoupError for what cannot be mixed or judged, ModelError naming the first parameter that differs.
    """
    uris, uri = [storage.normalise(each) for each in config.models], storage.normalise(uri)
    if len(uris) < 2:
        raise SoupError("a soup needs two models or more", where="soup.models", fix="soup.models=[MODEL, MODEL, ...]")
    if uri in uris:
        raise SoupError("a soup is not written over one of its models", where=uri, fix="set artefacts.soup")
    digests = [model_digest(each) for each in uris]
    recipe: list[Any] = [FORMAT, config.model_dump(mode="json", exclude={"models"}), digests]
    if config.method == "greedy":
        judged = {name: Corpus.open(given or corpus_uri).digest for name, given in judged_on(training).items()}
        recipe += [judged, training.evaluation.model_dump(mode="json", include={"tasks"})]
    fingerprint = storage.sha256_bytes(json.dumps(recipe, sort_keys=True).encode())
    if finished := _finished(uri, fingerprint):
        return finished
    first = Model.load(uris[0])
    infos = [first.info, *(model.info for model in _others(first, uris))]
    chosen = _choose(config, training, corpus_uri, uris, progress) if config.method == "greedy" else None
    taken = chosen.taken if chosen else list(range(len(uris)))
    weights = config.weights or [1.0] * len(uris)
    mean = _mean(uris, taken, weights, progress)
    first.network.load_state_dict(mean.state)
    first.info = {
        **shared_info([infos[place] for place in taken]),
        "fingerprint": fingerprint,
        "soup": _about(config, uris, digests, taken, [weight / mean.total for weight in weights], chosen),
    }
    first.save(uri)
    return first


def judged_on(training: TrainConfig) -> dict[str, str | None]:
    """The corpus of each task of the evaluation by the task's name; None: the run's own."""
    first = next(iter(training.corpora))
    tasks = training.evaluation.chosen.items()
    return {name: task.uri or training.corpora[task.corpus or first].uri for name, task in tasks}


class Judge:
    """One process that measures means of models on held-out rows; it keeps the mean of the last two questions."""

    def __init__(self, uris: Sequence[str], tasks: Mapping[str, Task], training: TrainConfig) -> None:
        torch.set_num_threads(training.threads_per_worker)
        self.uris, model = list(uris), Model.load(uris[0])
        self.towers = _Towers(model.network, ())
        self.towers.device = torch.device("cuda" if training.gpus_per_worker else "cpu")
        self.towers.to(self.towers.device)
        config = model.network.config
        decode = DecodeSettings(model.tokenizer, config.image_size, 0, AugmentConfig(), prompts=config.prompts)
        self.evaluator = Evaluator(tasks, self.towers, Alone(), decode, batch_size=training.evaluation.batch_size)
        self._means: dict[tuple[int, ...], WeightMean] = {}

    def metrics(self, places: Sequence[int]) -> dict[str, Any]:
        """The metrics of the mean of the models at those places."""
        *before, last = places
        state = Model.load(self.uris[last]).network.state_dict()
        known = self._means.get(tuple(before)) if before else None
        if before and known is None:
            known = _mean(self.uris, before, [1.0] * len(self.uris))
        mean = known.plus(state) if known else WeightMean.of(state)
        # The next question is one more than these, if they were accepted, or one more than those before.
        self._means = {tuple(places): mean} | ({tuple(before): known} if known else {})
        self.towers.network.load_state_dict(mean.state)
        return self.evaluator.run()


class _Towers(Objective):
    """Towers without a loss, as what an evaluator asks of an engine."""

    device = torch.device("cpu")


def _choose(
    config: SoupConfig,
    training: TrainConfig,
    corpus_uri: str,
    uris: Sequence[str],
    progress: Progress | None,
) -> Greedy:
    """The greedy choice, judged in the cluster."""
    entries = {
        name: entry.model_copy(update={"uri": entry.uri or storage.normalise(corpus_uri)})
        for name, entry in training.corpora.items()
    }
    tasks = open_tasks(training.evaluation, entries)
    if config.metric.rsplit("/", 1)[0] not in tasks:
        raise SoupError(
            f"{config.metric} is not measured: there is no such split",
            where="soup.metric",
            fix="give train.evaluation.tasks",
        )
    require_cpus(training.cpus_per_worker, "judging a soup")
    resources = {"num_cpus": training.cpus_per_worker, "num_gpus": training.gpus_per_worker or None}
    judge = ray.remote(Judge).options(**resources).remote(uris, tasks, training)
    asked = 0

    def score(places: Sequence[int]) -> float:
        nonlocal asked
        value = ray.get(judge.metrics.remote(places)).get(config.metric)
        if value is None or not math.isfinite(value):
            raise SoupError(f"{config.metric} has no value on {uris[places[-1]]}", where="soup.metric")
        asked += 1
        if progress:
            progress(asked, 2 * len(uris) - 1, f"{config.metric} of {len(places)} {value:.4f}")
        return float(value)

    try:
        return greedy(len(uris), score, higher=config.mode == "max")
    finally:
        ray.kill(judge)


def _others(first: Model, uris: Sequence[str]) -> Iterator[Model]:
    """The models after the first, one at a time, each known to be of its kind."""
    for uri in uris[1:]:
        other = Model.load(uri)
        require_alike(first, other, uri)
        yield other


def _mean(
    uris: Sequence[str], places: Sequence[int], weights: Sequence[float], progress: Progress | None = None
) -> WeightMean:
    mean: WeightMean | None = None
    for number, place in enumerate(places, 1):
        state, weight = Model.load(uris[place]).network.state_dict(), weights[place]
        mean = mean.plus(state, weight) if mean else WeightMean.of(state, weight)
        if progress:
            progress(number, len(places), f"{number} of {len(places)} models")
    assert mean is not None
    return mean


def _about(
    config: SoupConfig,
    uris: Sequence[str],
    digests: Sequence[str],
    taken: Sequence[int],
    weights: Sequence[float],
    chosen: Greedy | None,
) -> dict[str, Any]:
    """What the model's manifest says of its making."""
    found: dict[str, Any] = {"method": config.method}
    if chosen:
        found |= {"metric": config.metric, "value": chosen.score}
    rows = [
        {
            "uri": uris[place],
            "digest": digests[place],
            "weight": weights[place] if place in taken else 0.0,
            **({"alone": chosen.alone[place]} if chosen else {}),
        }
        for place in [*taken, *(place for place in range(len(uris)) if place not in taken)]
    ]
    return {**found, "ingredients": rows}


def _finished(uri: str, fingerprint: str) -> Model | None:
    try:
        model = Model.load(uri)
    except ModelError:
        return None
    return model if model.info.get("fingerprint") == fingerprint else None
