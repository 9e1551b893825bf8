"""`rayemb evaluate`: what is required is checked before the work, and decides the exit code after it."""

import contextlib
import re
import tempfile
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from rayemb import storage
from rayemb.cluster import connect, require_cpus
from rayemb.config import load
from rayemb.data import Corpus
from rayemb.evaluate.encoders import Encoder, ModelEncoder, SpreadEncoder, model_directory, name_of, untrained
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import Neighbours, VectorSearch
from rayemb.evaluate.gate import Gate
from rayemb.evaluate.report import read_report
from rayemb.evaluate.run import yields
from rayemb.evaluate.suite import UNTRAINED, SuiteConfig, load_tasks, run_suite
from rayemb.index import Index
from rayemb.models import Model, model_digest
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.display import Display
from rayemb.pipeline.stages import run_stage


def evaluate_run(config: RunConfig, gate: Gate, display: Display | None = None) -> bool:
    """Evaluates the model on the splits of its corpus; whether it meets what is required.

    Raises EvaluateError before anything starts if a requirement names what will not be measured.
    """
    display = display or Display()
    if gate.requirements:
        with storage.environment(config.storage.environment()):
            # No split to judge is an error of the stage, which names those that there are.
            if offered := yields(config.evaluate, Corpus.open(config.uri("corpus")).splits):
                gate.check(offered)
    outcome = run_stage("evaluate", config, display)
    with storage.environment(config.storage.environment()):
        return passes(gate, outcome.uri, display.console)


def passes(gate: Gate, report_uri: str, console: Console) -> bool:
    """Whether the report in that folder meets what is required; a line each, those that failed on stderr."""
    if not gate.requirements:
        return True
    outcomes = gate.judge(read_report(report_uri))
    failures = Console(stderr=True, highlight=False, soft_wrap=True)
    for each in outcomes:
        if each.passed:
            console.print(f"  passed  {each.line}", markup=False)
        else:
            failures.print(f"failed  {each.line}", markup=False)
    if gate.junit:
        console.print(f"  → {gate.junit}", markup=False)
    return all(each.passed for each in outcomes)


def read_suite(
    path: str,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    baselines: Sequence[str] | None = None,
    out: str | None = None,
) -> SuiteConfig:
    """The suite of a YAML file, with overrides and what the command line says otherwise. Raises ConfigError."""
    if files := [text for text in overrides if "=" not in text]:
        raise EvaluateError(
            f"{files[0]!r} is no override", where="--suite", fix="beside --suite there is key=value only"
        )
    config = load(SuiteConfig, path, overrides)
    chosen = {"model": model, "baselines": tuple(baselines) if baselines else None, "out": out}
    return config.model_copy(update={name: value for name, value in chosen.items() if value is not None})


def evaluate_suite(config: SuiteConfig, gate: Gate, display: Display | None = None, *, key: str | None = None) -> bool:
    """Runs a suite and writes its report; whether the model meets what is required.

    `key`: for services that want one. Data and requirements are checked before a model is opened or a cluster started.
    """
    display = display or Display()
    if config.model is None:
        raise EvaluateError("which model is to be judged?", where="model", fix="--model URI, or `model` in the suite")
    with storage.environment(config.storage.environment()):
        tasks = load_tasks(config)
        if gate.requirements:
            gate.check(config.offered, bare=config.diagnosed, baseline=bool(config.baselines))
        with contextlib.ExitStack() as stack:
            if config.workers:
                stack.enter_context(connect(config.cluster, config.storage.environment()))
                require_cpus(config.workers * config.cpus_per_worker, "the suite (its encoders)")
            progress = stack.enter_context(display.stage(config.title))
            sources = [config.model, *config.baselines]
            encoders = [partial(open_encoder, source, config, stack, key) for source in sources]
            result = run_suite(config, tasks, encoders, open_index=open_index, progress=progress)
        display.result(result.summary, storage.normalise(config.out))
        return passes(gate, config.out, display.console)


def open_encoder(source: str, config: SuiteConfig, stack: contextlib.ExitStack, key: str | None = None) -> Encoder:
    """The encoder of a model directory (ours or sentence-transformers'), of a service, or `untrained`.

    What lies in temporary folders stays there until `stack` is closed.
    """
    if re.match(r"https?://", source):
        from rayemb.serve.client import EndpointEncoder

        return EndpointEncoder(source, key=key)
    if source == UNTRAINED:
        if re.match(r"https?://", str(config.model)):
            raise EvaluateError("what a service's model began as is not known", where="baselines: untrained")
        model, name = untrained(Model.load(stack.enter_context(model_directory(str(config.model))))), UNTRAINED
        uri = storage.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayemb-")), UNTRAINED)
        if config.workers:  # on a disk that all nodes see
            uri = storage.join(config.out, f".{UNTRAINED}")
            stack.callback(storage.delete, uri)
        model.save(uri)
    else:
        uri, name = stack.enter_context(model_directory(source)), name_of(source)
    if not config.workers:
        return ModelEncoder.open(uri, name=name, batch_size=config.batch_size)
    return SpreadEncoder(
        uri,
        name,
        model_digest(uri),
        workers=config.workers,
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
        batch_size=config.batch_size,
    )


class _IndexSearch:
    """The sharded index as a suite searches it."""

    def __init__(self, uri: str) -> None:
        self._index = Index.open(uri)
        self.table = self._index.manifest.embeddings.uri, self._index.manifest.embeddings.version

    def __call__(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        hits = self._index.search(queries, k)
        return Neighbours(hits.keys, hits.scores.astype(np.float64))


def open_index(uri: str) -> VectorSearch:
    """The search of the index at `uri`. Raises IndexArtefactError."""
    return _IndexSearch(uri)
