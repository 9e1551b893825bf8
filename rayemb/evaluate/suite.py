"""A suite: several tasks over local data, for a model and its baselines, as one report that says what differs."""

import datetime
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from rayemb import storage
from rayemb.cluster import ClusterConfig
from rayemb.config import Config, dump
from rayemb.evaluate import kept
from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import VectorSearch
from rayemb.evaluate.gate import Place
from rayemb.evaluate.report import (
    Corpus,
    Curve,
    Difference,
    DirectionResult,
    Estimate,
    Example,
    Report,
    SplitResult,
    SystemResult,
    write_report,
)
from rayemb.evaluate.resample import RESAMPLES, differences, estimates
from rayemb.evaluate.tasks import AnyTask, Found, Means, Task, TaskConfig
from rayemb.progress import Progress
from rayemb.storage import StorageConfig

UNTRAINED = "untrained"
SUITE = "suite.yaml"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class SuiteConfig(Config):
    """What is judged on what."""

    title: str = Field("Evaluation suite", description="of the page")
    model: str | None = Field(
        None, description="a model directory, a sentence-transformers directory, or the URL of a running service"
    )
    baselines: tuple[str, ...] = Field(
        (), description='as model; "untrained": the model as its training began. Differences are to the first'
    )
    tasks: dict[str, AnyTask] = Field(min_length=1, description="by name")
    out: str = Field("rayemb-suite", description="folder or s3:// prefix of the report; run again to go on")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    samples: int = Field(
        2000, ge=100, description=f"bootstrap samples; of figures that are no means at most {RESAMPLES}"
    )
    seed: int = Field(0, ge=0, description="bootstrap, samples, k-means, episodes")
    map: Literal["umap", "pca"] | None = Field("umap", description="how the vectors are laid out on the page")
    batch_size: int = Field(64, ge=1, description="texts or images that an encoder takes at a time")
    workers: int = Field(
        0, ge=0, description="Ray actors that encode, and tasks that share an exact search; 0: all in this process"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each encoder takes")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each encoder takes")
    cluster: ClusterConfig = Field(ClusterConfig(), description="where the workers are")
    storage: StorageConfig = StorageConfig()

    @field_validator("tasks")
    @classmethod
    def _plain_names(cls, value: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        for name in value:
            if not re.match(NAME, name):
                raise ValueError(f"the task {name!r} needs a name of letters, digits, '.', '_' and '-'")
        return value

    @property
    def offered(self) -> list[Place]:
        """The figures that it yields, for requirements that are checked before the work."""
        return [Place(name, task.direction, metric) for name, task in self.tasks.items() for metric in task.metrics]

    @property
    def diagnosed(self) -> list[Place]:
        """The diagnostics of the model's vectors, which have neither interval nor gain; as `offered`."""
        return [Place(name, "", each) for name, task in self.tasks.items() for each in task.diagnosed]


@dataclass(frozen=True)
class SuiteResult:
    """The report, one line about it, and the model's figures: task, metric, value."""

    report: Report
    summary: str
    figures: dict[str, dict[str, float]]


def load_tasks(config: SuiteConfig) -> dict[str, Task]:
    """The tasks with their data, before any model is opened. Raises what is wrong with the first that is."""
    return {name: task.load(name) for name, task in config.tasks.items()}


def run_suite(
    config: SuiteConfig,
    tasks: Mapping[str, Task],
    encoders: Sequence[Callable[[], Encoder]],
    *,
    open_index: Callable[[str], VectorSearch] | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Every task for every encoder (the model first, then baselines), and the report in `config.out`.

    Encoders are opened one at a time and closed (`close`) if they can be. What was found before of the same model,
    data and settings is not repeated. A task that has no figure for a baseline is reported without it, one that has
    none for the model is named in the notes. With `workers`, needs a connected Ray.
    Raises EvaluateError for data or vectors that cannot be judged, and where nothing could be judged at all.
    """
    found: dict[str, dict[str, Found]] = {name: {} for name in tasks}
    notes: list[str] = []
    systems: list[str] = []
    digest = ""
    total, done = len(tasks) * len(encoders), 0
    for number, opened in enumerate(encoders):
        encoder = opened()
        try:
            system = _distinct(encoder.name, systems)
            systems.append(system)
            digest = digest or encoder.digest
            named = _Named(encoder, system)
            for name, task in tasks.items():
                if progress:
                    progress(done, total, f"{system}: {name}")
                try:
                    found[name][system] = _found(config, name, task, named, number == 0, open_index)
                except EvaluateError as error:
                    if number == 0:
                        raise
                    notes.append(f"{name}: not measured for {system} ({error.what}).")
                done += 1
        finally:
            if hasattr(encoder, "close"):
                encoder.close()
    if progress:
        progress(total, total, "intervals and the page")
    report = _report(config, tasks, found, systems, digest, notes)
    storage.write_bytes(storage.join(config.out, SUITE), dump(config).encode())
    write_report(config.out, report)
    figures = {
        result.split: {name: each.value for name, each in result.directions[0].systems[0].metrics.items()}
        for result in report.results
    }
    return SuiteResult(report, _summary(config, report), figures)


class _Named:
    """An encoder under the name that the report has for it."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        self._encoder, self.name, self.digest = encoder, name, encoder.digest
        self.texts, self.images = encoder.texts, encoder.images


def _found(
    config: SuiteConfig,
    name: str,
    task: Task,
    encoder: Encoder,
    show: bool,
    open_index: Callable[[str], VectorSearch] | None,
) -> Found:
    key = kept.key_of(
        task=config.tasks[name].model_dump(mode="json"),
        data=task.digest,
        model=encoder.digest,
        system=encoder.name,
        seed=config.seed,
        map=config.map,
        show=show,
    )
    # Without a digest nothing says that it is still the same model.
    before = kept.read(config.out, name, encoder.name, key) if encoder.digest else None
    if before is not None:
        return before
    means = Means(config.seed, show, config.map, config.workers or None, open_index)
    made = task.run(encoder, means)
    kept.write(config.out, name, encoder.name, key, made, data=task.digest)
    return made


def _report(
    config: SuiteConfig,
    tasks: Mapping[str, Task],
    found: Mapping[str, Mapping[str, Found]],
    systems: Sequence[str],
    digest: str,
    notes: list[str],
) -> Report:
    results: list[SplitResult] = []
    examples: list[Example] = []
    for name in tasks:
        result = _result(config, name, found[name], systems, notes)
        if result is not None:
            results.append(result)
            shown = found[name][systems[0]].shown.examples
            examples += [example.model_copy(update={"worst": True}) for example in shown]
    if not results:
        raise EvaluateError("no task has a figure for the model: " + " ".join(notes), where=systems[0])
    rows = {name: len(found[name][systems[0]].items.ids) for name in tasks}
    model = config.model or systems[0]
    return Report(
        title=config.title,
        created=datetime.datetime.now(datetime.UTC),
        model_digest=digest,
        corpus=Corpus(name=f"{len(tasks)} tasks", uri=storage.normalise(config.out), rows=rows),
        facts={"model": model, **({"baselines": ", ".join(systems[1:])} if systems[1:] else {})},
        config=dump(config),
        confidence=config.confidence,
        method=f"Intervals: bootstrap of the items, by cluster where a task has clusters, {config.samples} samples "
        f"(of figures that are no means {min(config.samples, RESAMPLES)}). Differences are paired, item by item.",
        results=tuple(results),
        examples=tuple(examples),
        examples_note="The queries (pairs, items) on which the model does worst.",
        notes=tuple(dict.fromkeys(notes)),
    )


def _result(
    config: SuiteConfig, name: str, found: Mapping[str, Found], systems: Sequence[str], notes: list[str]
) -> SplitResult | None:
    task = config.tasks[name]
    settings: dict[str, Any] = {"seed": config.seed, "confidence": config.confidence, "samples": config.samples}
    measured = {system: estimates(task, found[system].items, **settings) for system in systems if system in found}
    model, first = systems[0], found[systems[0]]
    notes += [f"{name}: {note}" for note in first.notes]
    columns = [metric for metric in task.metrics if metric in measured[model]]
    for metric in task.metrics:
        if metric not in columns:
            notes.append(f"{name}: {metric} has no figure for {model} (constant, or one class alone).")
    if not columns:
        return None
    results = []
    for system, figures in measured.items():
        if missing := [metric for metric in columns if metric not in figures]:
            notes.append(f"{name}: {system} is left out, it has no {missing[0]} (constant, or one class alone).")
            continue
        results.append(SystemResult(system=system, metrics={metric: figures[metric] for metric in columns}))
    return SplitResult(
        split=name,
        description=task.description,
        directions=(
            DirectionResult(
                direction=task.direction,
                queries=len(first.items.ids),
                candidates=first.candidates,
                systems=tuple(results),
                difference=_difference(task, found, [each.system for each in results], systems, settings),
            ),
        ),
        space=first.shown.space,
        similarities=first.shown.similarities,
        curves=tuple(_curves([found[each.system] for each in results])),
        confusion=first.shown.confusion,
        diagnostics={each.system: dict(found[each.system].diagnostics) for each in results},
    )


def _difference(
    task: TaskConfig,
    found: Mapping[str, Found],
    there: Sequence[str],
    systems: Sequence[str],
    settings: Mapping[str, Any],
) -> Difference | None:
    if len(systems) < 2 or systems[1] not in there:
        return None
    gains: dict[str, Estimate] = differences(task, found[systems[0]].items, found[systems[1]].items, **settings)
    return Difference(system=systems[0], baseline=systems[1], metrics=gains) if gains else None


def _curves(found: Sequence[Found]) -> Iterator[Curve]:
    """The same curves of all systems in one picture."""
    for curve in found[0].shown.curves:
        lines = {
            name: line
            for each in found
            for other in each.shown.curves
            if (other.metric, other.ks) == (curve.metric, curve.ks)
            for name, line in other.systems.items()
        }
        yield curve.model_copy(update={"systems": lines})


def _distinct(name: str, taken: Sequence[str]) -> str:
    """The name, with a number behind it where it is taken."""
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, 1000))) if each not in taken)


def _summary(config: SuiteConfig, report: Report) -> str:
    words = []
    for result in report.results:
        part = result.directions[0]
        metric = part.columns[0]
        text = f"{result.split} {metric} {part.systems[0].metrics[metric].value:.3f}"
        gain = part.difference.metrics.get(metric) if part.difference else None
        if gain is not None and part.difference is not None:
            ends = f" ({gain.low:+.3f} to {gain.high:+.3f})" if gain.low is not None else ""
            text += f", {gain.value:+.3f}{ends} on {part.difference.baseline}"
        words.append(text)
    missing = [name for name in config.tasks if name not in {result.split for result in report.results}]
    return "; ".join(words) + (f"; without a figure: {', '.join(missing)}" if missing else "")
