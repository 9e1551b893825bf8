"""A sweep over training configs: Ray Tune around Ray Train, as it runs without deadlock on a few CPUs."""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from rayemb import storage
from rayemb.config import ConfigError, dump, from_mapping
from rayemb.data import Corpus
from rayemb.errors import RayembError
from rayemb.progress import Progress
from rayemb.train import TrainConfig, train
from rayemb.tune.config import TuneConfig, parse_distribution

SLOT = "trial_slot"


class TuneError(RayembError):
    """A sweep that cannot start, or in which no trial finished."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found. `trials`: a row per trial with its settings, its last metrics and its error, if any."""

    uri: str
    best: TrainConfig
    best_settings: dict[str, Any]
    best_value: float
    metric: str
    trials: list[dict[str, Any]]

    @property
    def summary(self) -> str:
        """One line."""
        settings = ", ".join(f"{key}={_short(value)}" for key, value in self.best_settings.items())
        return f"{len(self.trials)} trials; best {self.metric} {self.best_value:.3f} with {settings}"

    @property
    def figures(self) -> dict[str, Any]:
        """For machines."""
        return {"best": self.best_settings, self.metric: self.best_value, "trials": self.trials}


def sweep(
    config: TuneConfig, base: TrainConfig, corpus_uri: str, sweeps_uri: str, *, progress: Progress | None = None
) -> SweepResult:
    """Tries `config.trials` samples of the search space around `base`; writes `best.yaml` and `trials.json`.

    A trial is a driver that holds no CPU (it takes a `trial_slot`) and starts a Ray Train run of its own: with
    Tune's defaults the drivers would hold the very CPUs that their workers wait for.
    Raises TuneError before any trial if a setting is not one of the training config or the cluster is too small.
    Needs a connected Ray.
    """
    corpus = Corpus.open(corpus_uri)
    space = {key: _domain(text) for key, text in config.search.items()}
    samples = [{key: _sample(domain) for key, domain in space.items()} for _ in range(3)]
    configs = [trial_config(base, config, sample) for sample in samples]
    concurrent = _concurrent(config, configs[0])
    sweeps_uri = storage.normalise(sweeps_uri)
    fs, path = storage.filesystem(sweeps_uri)
    name = f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"

    def trial(sample: dict[str, Any]) -> None:
        context = tune.get_context()
        place = storage.join(sweeps_uri, f"{name}-runs", str(context.get_trial_id()))
        train(
            trial_config(base, config, sample),
            corpus.uri,
            storage.join(place, "model"),
            storage.join(place, "runs"),
            callbacks=[TuneReportCallback()],
        )

    if progress:
        progress(0, config.trials, f"{config.trials} trials, {concurrent} at once")
    tuner = tune.Tuner(
        tune.with_resources(trial, {SLOT: 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            num_samples=config.trials,
            max_concurrent_trials=concurrent,
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=configs[0].steps,
                grace_period=config.grace_steps,
                reduction_factor=config.reduction_factor,
            ),
            search_alg=tune.search.BasicVariantGenerator(random_state=config.seed, max_concurrent=concurrent),
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=fs,
            callbacks=[_Reporter(progress, config)] if progress else None,
            verbose=0,
        ),
    )
    return _collect(tuner.fit(), config, base, sweeps_uri, name)


def trial_config(base: TrainConfig, config: TuneConfig, sample: dict[str, Any]) -> TrainConfig:
    """`base` with what every trial changes and with one sample of the search space.

    Raises TuneError naming the key that the training config does not know or refuses.
    """
    data = base.model_dump(mode="json")
    # Every report must carry the metric, so validation and reports go together.
    often = {"logging.every": config.grace_steps, "evaluation.every": config.grace_steps}
    for key, value in {**often, **config.set, **sample}.items():
        if not _set(data, key, value):
            section = "tune.search" if key in sample else "tune.set"
            raise TuneError(
                f"the training config has no key {key!r}", where=f"{section}.{key}", fix="see `rayemb config show`"
            )
    data["evaluation"]["every"] = data["logging"]["every"]
    data["checkpoints"]["every"] = data["steps"]
    try:
        return from_mapping(TrainConfig, data, source="tune")
    except ConfigError as error:
        raise TuneError(error.what, where="tune.search or tune.set") from error


class _Reporter(tune.Callback):  # type: ignore[misc]
    """Passes the state of the sweep on to the terminal."""

    def __init__(self, progress: Progress | None, config: TuneConfig) -> None:
        self.progress, self.config, self.done, self.best = progress, config, 0, None

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks; a terminal cannot be saved, and a restored sweep has another one.
        return {**self.__dict__, "progress": None}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Notes a report."""
        value = result.get(self.config.metric)
        if value is not None:
            better = self.best is None or (value > self.best) == (self.config.mode == "max")
            self.best = value if better else self.best
            self._show(f"{self.config.metric} {value:.3f} at step {result.get('step')}, best {self.best:.3f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Counts a trial."""
        self.done += 1
        self._show(f"trial {self.done} done")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Counts a failed trial."""
        self.done += 1
        self._show(f"trial {self.done} failed")

    def _show(self, text: str) -> None:
        if self.progress:
            self.progress(self.done, self.config.trials, text)


def _collect(results: Any, config: TuneConfig, base: TrainConfig, sweeps_uri: str, name: str) -> SweepResult:
    trials = []
    for result in results:
        metrics = result.metrics or {}
        figures = {key: metrics[key] for key in ("step", "loss", "temperature", config.metric) if key in metrics}
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        trials.append({"settings": _settings(result.config, config), **figures, "error": error})
    finished = [trial for trial in trials if trial.get(config.metric) is not None]
    if not finished:
        errors = "; ".join(str(trial["error"]) for trial in trials if trial["error"])[:500]
        raise TuneError(f"no trial reported {config.metric!r} ({errors or 'no error given'})", where="tune.metric")
    best = (max if config.mode == "max" else min)(finished, key=lambda trial: trial[config.metric])
    data = base.model_dump(mode="json")
    for key, value in best["settings"].items():
        _set(data, key, value)
    chosen = from_mapping(TrainConfig, data)
    storage.write_json(storage.join(sweeps_uri, name, "trials.json"), trials)
    text = "train:\n" + "".join(f"  {line}\n" for line in dump(chosen).splitlines())
    storage.write_bytes(storage.join(sweeps_uri, name, "best.yaml"), text.encode())
    return SweepResult(
        storage.join(sweeps_uri, name), chosen, best["settings"], float(best[config.metric]), config.metric, trials
    )


def _set(data: dict[str, Any], key: str, value: Any) -> bool:
    """Sets `a.b.c` in nested mappings; False, and nothing done, if there is no such key."""
    node: Any = data
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        return False
    node[leaf] = value
    return True


def _settings(sample: dict[str, Any], config: TuneConfig) -> dict[str, Any]:
    return {key: sample[key] for key in config.search}


def _domain(text: str) -> Any:
    name, arguments = parse_distribution(text)
    return getattr(tune, name)(*arguments)


def _sample(domain: Any) -> Any:
    return domain["grid_search"][0] if isinstance(domain, dict) else domain.sample()


def _concurrent(config: TuneConfig, trial: TrainConfig) -> int:
    """How many trials the cluster can really run at once: their workers and decoders."""
    resources = ray.cluster_resources()
    if resources.get(SLOT, 0) < 1:
        raise TuneError(
            f"the cluster has no {SLOT!r} resource, so trials would wait for ever",
            where="tune",
            fix=f"start its head with --resources='{{\"{SLOT}\": 2}}'",
        )
    need = max(1.0, trial.cpus)  # a tokenizer is learned on one
    fits = int(resources.get("CPU", 0) // need)
    if fits < 1:
        raise TuneError(
            f"a trial needs {need:g} CPUs and the cluster has {resources.get('CPU', 0):g}",
            where="tune.set",
            fix="lower workers or cpus_per_worker there, or add nodes",
        )
    return min(config.concurrent, fits, int(resources[SLOT]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
