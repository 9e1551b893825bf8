"""`rayemb recipe`: several stages in order, each reading what earlier ones made, on one cluster."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from rayemb import __version__, storage
from rayemb.cluster import connect
from rayemb.data import Corpus
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.errors import RayembError
from rayemb.index import load_manifest
from rayemb.models import model_digest
from rayemb.pipeline.config import ArtefactName, RunConfig
from rayemb.pipeline.display import Display
from rayemb.pipeline.plan import PlannedStep, plan
from rayemb.pipeline.stages import run_stage

MANIFEST = "recipe.json"
FORMAT = 1


@dataclass(frozen=True)
class StepRecord:
    """What the manifest keeps of a finished step: what it was made of, and what it made."""

    name: str
    run: str
    fingerprint: str
    inputs: dict[str, dict[str, str]]  # label: uri and digest
    uri: str
    digest: str
    seconds: float
    summary: str


@dataclass(frozen=True)
class StepResult:
    """A step of this run: its record, and whether it was there already."""

    record: StepRecord
    there: bool


def run_recipe(config: RunConfig, display: Display | None = None) -> list[StepResult]:
    """Runs the steps of the config that are not done yet, and gives a result for each.

    A step is done if `recipe.json` says that it was made by the same settings from the same inputs, and its artefact is
    still that one. What was interrupted goes on as its stage does: training from its last checkpoint, embedding and
    mining from their last shard. The manifest is written, in one atomic step, after every step. Nothing starts before
    the whole recipe is known to be possible: raises ConfigError naming every wrong key, then what a stage raises.
    """
    steps, display = plan(config), display or Display()
    started = time.monotonic()
    environment = config.storage.environment()
    results: list[StepResult] = []
    with storage.environment(environment), contextlib.ExitStack() as stack:
        manifest = _Manifest(config, steps)
        for number, step in enumerate(steps, 1):
            title = f"{number}/{len(steps)} {step.name}: {step.stage.title}"
            inputs = {label: {"uri": uri, "digest": _digest(kind, uri)} for label, (kind, uri) in step.inputs.items()}
            fingerprint = _fingerprint(step, {label: given["digest"] for label, given in inputs.items()})
            if record := manifest.done(step, fingerprint):
                display.console.print(f"[bold]{title}[/bold]")
                display.result(f"already there: {record.summary}", record.uri)
                results.append(StepResult(record, there=True))
                continue
            if all(result.there for result in results):
                # Not before: where there is nothing to do, no cluster is wanted.
                dashboard = any(step.stage.dashboard for step in steps)
                stack.enter_context(connect(config.cluster, environment, dashboard=dashboard))
            begun = time.monotonic()
            outcome = run_stage(step.run, step.config, display, title=title)
            seconds = round(time.monotonic() - begun, 2)
            digest = _digest(step.stage.makes, outcome.uri)
            record = StepRecord(step.name, step.run, fingerprint, inputs, outcome.uri, digest, seconds, outcome.summary)
            manifest.add(record)
            results.append(StepResult(record, there=False))
    _show(results, manifest.uri, time.monotonic() - started, display)
    return results


class _Manifest:
    """`recipe.json` in the workspace: the recipe and the record of each step that is done."""

    def __init__(self, config: RunConfig, steps: list[PlannedStep]) -> None:
        self.uri = storage.join(config.workspace, MANIFEST)
        self._config, self._names = config.model_dump(mode="json"), [step.name for step in steps]
        self._records: dict[str, StepRecord] = {}
        with contextlib.suppress(storage.MissingError):
            self._records = _records(storage.read_json(self.uri), self.uri)

    def done(self, step: PlannedStep, fingerprint: str) -> StepRecord | None:
        """The record of the step, if it still holds."""
        record = self._records.get(step.name)
        if record is None or record.fingerprint != fingerprint:
            return None
        try:
            return record if _digest(step.stage.makes, record.uri) == record.digest else None
        except RayembError:
            return None  # it is gone

    def add(self, record: StepRecord) -> None:
        """Publishes the manifest with one more step; of later ones it keeps what an earlier run did."""
        self._records[record.name] = record
        steps = [asdict(self._records[name]) for name in self._names if name in self._records]
        document = {"format": FORMAT, "rayemb": __version__, "config": self._config, "steps": steps}
        storage.write_json(self.uri, document)


def _records(document: Any, where: str) -> dict[str, StepRecord]:
    """The records of a manifest by step. Raises RayembError if it is none, or of another format."""
    try:
        if document["format"] == FORMAT:
            return {row["name"]: StepRecord(**row) for row in document["steps"]}
    except (KeyError, TypeError):
        pass
    what = f"not a recipe's manifest of format {FORMAT}"
    raise RayembError(what, where=where, fix="delete it, or take another workspace")


def _fingerprint(step: PlannedStep, digests: dict[str, str]) -> str:
    """Of all that decides what the step makes."""
    sections = step.stage.sections
    settings: dict[str, Any] = {name: getattr(step.config, name).model_dump(mode="json") for name in sections}
    if "train" in settings:
        settings["train"] = step.config.train.outcome  # another number of workers makes the same model
    document = [FORMAT, step.run, settings, digests]
    return storage.sha256_bytes(json.dumps(document, sort_keys=True).encode())


def _digest(artefact: ArtefactName, uri: str) -> str:
    """What names the content of an artefact, from its manifest. Raises what its room raises if there is none."""
    if artefact in ("corpus", "curated", "mined"):
        return Corpus.open(uri).digest
    if artefact in ("model", "soup"):
        return model_digest(uri)
    if artefact == "embeddings":
        table = EmbeddingsTable.open(uri)
        return f"{table.model_digest}@{table.version}"
    if artefact == "index":
        return load_manifest(uri).version
    files = {"report": "metrics.json", "sweeps": "best.yaml"}
    return storage.sha256_file(storage.join(uri, files[artefact]) if artefact in files else uri)


def _show(results: list[StepResult], manifest: str, seconds: float, display: Display) -> None:
    table = Table(pad_edge=False)
    for title in ("step", "stage", "seconds", "what"):
        table.add_column(title, justify="right" if title == "seconds" else "left", no_wrap=title != "what")
    for result in results:
        took = "already there" if result.there else f"{result.record.seconds:.1f}"
        table.add_row(result.record.name, result.record.run, took, result.record.summary)
    display.console.print(table)
    new = sum(not result.there for result in results)
    display.result(f"rayemb recipe: {new} of {len(results)} steps done now, in {seconds:.0f} s", manifest)
