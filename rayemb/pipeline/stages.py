"""Each stage as one function of the run's config: artefacts in, an artefact out, a summary to print."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError

from rayemb.cluster import connect
from rayemb.data import build_corpus, embed_corpus
from rayemb.errors import RayembError
from rayemb.evaluate import evaluate
from rayemb.index import build_index, verify_index
from rayemb.models import model_digest
from rayemb.pipeline.config import ArtefactName, RunConfig
from rayemb.pipeline.display import Display
from rayemb.progress import Progress
from rayemb.train import train
from rayemb.tune import sweep


@dataclass(frozen=True)
class Outcome:
    """What a stage made: the artefact's place, one line about it, and the figures."""

    uri: str
    summary: str
    figures: dict[str, Any]


def corpus_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Source → corpus."""
    corpus = build_corpus(config.corpus, config.uri("corpus"), progress=progress)
    splits = ", ".join(f"{name} {rows:,}" for name, rows in corpus.splits.items())
    bad = corpus.manifest["quarantine"]
    aside = f"; {bad['rows']} rows set aside {bad['reasons']}" if bad["rows"] else ""
    figures = {"rows": corpus.manifest["rows"], "splits": corpus.splits, "quarantine": bad, "digest": corpus.digest}
    return Outcome(corpus.uri, f"{corpus.manifest['rows']:,} pairs: {splits}{aside}", figures)


def train_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus → model."""
    model = train(config.train, config.uri("corpus"), config.uri("model"), config.uri("runs"), progress=progress)
    last = model.info["training"][-1]
    summary = (
        f"{last['step']} steps, loss {last['loss']:.3f}, temperature {last['temperature']:.3f}, "
        f"{last['pairs_per_second']:.0f} pairs/s, model {str(model.digest)[:12]}"
    )
    return Outcome(config.uri("model"), summary, {**last, "digest": model.digest})


def evaluate_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus + model → report."""
    result = evaluate(
        config.evaluate,
        config.uri("corpus"),
        config.uri("model"),
        config.uri("report"),
        settings=config,
        progress=progress,
    )
    return Outcome(config.uri("report"), result.summary, result.figures)


def embed_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus + model → embeddings."""
    table = embed_corpus(
        config.uri("corpus"), config.uri("model"), config.uri("embeddings"), config.embed, progress=progress
    )
    figures = {"rows": table.rows, "dim": table.dim, "version": table.version, "model": table.model_digest}
    return Outcome(table.uri, f"{table.rows:,} vectors of {table.dim} dimensions, version {table.version}", figures)


def index_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Embeddings → index, verified against exact search."""
    uri = config.uri("index")
    digest = model_digest(config.uri("model"))
    progress(0, 2, "building shards")
    build_index(config.uri("embeddings"), uri, config.index, model_digest=digest)
    progress(1, 2, "comparing with exact search")
    return verify_stage(config, progress)


def verify_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Index → the same index, checked: checksums, rows, model, recall against exact search."""
    uri = config.uri("index")
    report = verify_index(uri, config.index).require_ok()
    progress(2, 2, "verified")
    recall = report.recall
    measured = f"recall@{recall.k} {recall.recall:.3f} against exact search" if recall else "recall not measured"
    summary = f"{report.rows:,} rows in {report.shards} shards, {measured}"
    figures = {"version": report.version, "rows": report.rows, "shards": report.shards}
    return Outcome(uri, summary, figures | ({"recall": recall.model_dump()} if recall else {}))


def tune_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus + search space → the best config."""
    result = sweep(config.tune, config.train, config.uri("corpus"), config.uri("sweeps"), progress=progress)
    return Outcome(result.uri, result.summary, result.figures)


STAGES: dict[str, tuple[str, ArtefactName, Callable[[RunConfig, Progress], Outcome]]] = {
    "corpus": ("Build the corpus", "corpus", corpus_stage),
    "train": ("Train the encoder", "model", train_stage),
    "evaluate": ("Evaluate on held-out pairs", "report", evaluate_stage),
    "embed": ("Embed the corpus", "embeddings", embed_stage),
    "index": ("Build and verify the index", "index", index_stage),
    "verify": ("Verify the index", "index", verify_stage),
    "tune": ("Search the settings", "sweeps", tune_stage),
}


def run_stage(name: str, config: RunConfig, display: Display | None = None) -> Outcome:
    """Runs one stage on the configured cluster (the connected one, if any) and shows its progress."""
    title, _, stage = STAGES[name]
    display = display or Display()
    with connect(config.cluster), display.stage(title) as progress:
        try:
            outcome = stage(config, progress)
        except Exception as error:
            if (ours := _ours(error)) and ours is not error:
                raise ours from error
            raise
    display.result(outcome.summary, outcome.uri)
    return outcome


def _ours(error: BaseException) -> RayembError | None:
    """The error of ours that a Ray task raised, from inside what Ray made of it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RayTaskError):
            inner = inner.cause
        elif isinstance(inner, RayembError):
            return inner
        else:
            inner = inner.__cause__
    return None
