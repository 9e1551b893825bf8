"""Each stage as one function of the run's config: artefacts in, an artefact out, a summary to print."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError

from rayemb import storage
from rayemb.cluster import connect
from rayemb.curate.run import curate
from rayemb.data import build_corpus, embed_corpus
from rayemb.data.embed import counted
from rayemb.errors import RayembError
from rayemb.evaluate import evaluate
from rayemb.index import build_index, compact_index, verify_index
from rayemb.index.attributes import cluster_attributes, neighbour_attributes
from rayemb.mining import mine
from rayemb.models import model_digest
from rayemb.pipeline.config import ArtefactName, ReadName, RunConfig
from rayemb.pipeline.display import Display
from rayemb.progress import Progress
from rayemb.train import soup, train
from rayemb.tune import check_sweep, sweep


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


def curate_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus → curated corpus, and the report of what was dropped."""
    corpus = curate(config.curate, config.uri("corpus"), config.uri("curated"), progress=progress)
    done = corpus.manifest["curation"]
    before = sum(done["input"]["rows"].values())
    steps = ", ".join(
        f"{step['step']} dropped {sum(step['dropped'].values()):,}"
        + "".join(f" and edited {count:,} {column}" for column, count in step["edits"].items())
        for step in done["steps"]
    )
    summary = f"{corpus.manifest['rows']:,} of {before:,} rows left: {steps}; examples in _report/index.html"
    return Outcome(corpus.uri, summary, {"digest": corpus.digest, "splits": corpus.splits, **done})


def train_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus → model."""
    model = train(config.train, config.uri("corpus"), config.uri("model"), config.uri("runs"), progress=progress)
    last = model.info["training"][-1]
    warm = f"temperature {last['temperature']:.3f}, " if last["temperature"] is not None else ""
    summary = (
        f"{last['step']} steps, loss {last['loss']:.3f}, {warm}"
        f"{last['pairs_per_second_overall']:.0f} pairs/s, model {str(model.digest)[:12]}"
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
    made = embed_corpus(
        config.uri("corpus"), config.uri("model"), config.uri("embeddings"), config.embed, progress=progress
    )
    table = made.table
    parts = [f"{table.rows:,} vectors of {table.dim} dimensions, version {table.version}"]
    if made.shards:
        parts.append(f"{made.rows:,} now at {made.rows_per_second:,.0f} rows/s")
    elif not made.resumed_shards:
        parts.append("up to date")
    if made.resumed_shards:
        parts.append(f"{made.resumed_rows:,} from an earlier run")
    if table.set_aside:
        parts.append(f"{sum(table.set_aside.values()):,} rows set aside ({counted(table.set_aside)})")
    figures = {
        "rows": table.rows,
        "dim": table.dim,
        "version": table.version,
        "model": table.model_digest,
        "what": table.what,
        "set_aside": table.set_aside,
        "embedded_rows": made.rows,
        "resumed_rows": made.resumed_rows,
        "seconds": made.seconds,
        "rows_per_second": made.rows_per_second,
    }
    return Outcome(table.uri, "; ".join(parts), figures)


def index_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Embeddings → index, verified against exact search."""
    uri = config.uri("index")
    digest = model_digest(config.uri("model"))
    progress(0, 2, "building shards")
    build_index(config.uri("embeddings"), uri, config.index, model_digest=digest)
    progress(1, 2, "comparing with exact search")
    return verify_stage(config, progress)


def compact_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Index and its live updates → the next version of the index, verified."""
    progress(0, 2, "building shards")
    compact_index(config.uri("index"), config.index)
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


def clusters_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Embeddings → a cluster of each row of a split."""
    settings = config.attributes
    uri = storage.join(config.uri("attributes"), f"clusters-{settings.split}.parquet")
    cluster_attributes(config.uri("corpus"), config.uri("embeddings"), uri, settings, progress=progress)
    return Outcome(uri, f"{settings.clusters} clusters of split {settings.split}", {"clusters": settings.clusters})


def neighbours_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Index → the neighbours of each row of a split."""
    settings = config.attributes
    uri = storage.join(config.uri("attributes"), f"neighbours-{settings.split}.parquet")
    neighbour_attributes(config.uri("corpus"), config.uri("index"), uri, settings, progress=progress)
    ranks = f"{settings.first_rank} to {settings.last_rank}"
    return Outcome(uri, f"neighbours of ranks {ranks} of split {settings.split}", {"ranks": ranks})


def mine_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus + model + index → the corpus with hard negatives."""
    step = config.mine.model_copy(
        update={
            "model": storage.normalise(config.mine.model) if config.mine.model else config.uri("model"),
            "index": storage.normalise(config.mine.index) if config.mine.index else config.uri("index"),
        }
    )
    corpus = mine(step, config.uri("corpus"), config.uri("mined"), progress=progress)
    (done,) = corpus.manifest["curation"]["steps"]
    edited, judged = done["edits"].get("negatives", 0), sum(done["judged"].values())
    summary = f"{edited:,} of {judged:,} rows have new hard negatives, up to {step.negatives} each"
    return Outcome(corpus.uri, summary, {"digest": corpus.digest, "splits": corpus.splits, **done})


def soup_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Models → the mean of them."""
    model = soup(config.soup, config.train, config.uri("corpus"), config.uri("soup"), progress=progress)
    made = model.info["soup"]
    used = sum(row["weight"] > 0 for row in made["ingredients"])
    judged = f", {made['metric']} {made['value']:.3f}" if "metric" in made else ""
    summary = f"{made['method']} mean of {used} of {len(made['ingredients'])} models{judged}, {str(model.digest)[:12]}"
    return Outcome(config.uri("soup"), summary, {**made, "digest": model.digest})


def tune_stage(config: RunConfig, progress: Progress) -> Outcome:
    """Corpus + search space → the best config."""
    result = sweep(config.tune, config.train, config.uri("corpus"), config.uri("sweeps"), progress=progress)
    return Outcome(result.uri, result.summary, result.figures)


def check_tune(config: RunConfig) -> None:
    """Raises TuneError for a search space, an objective or a searcher that cannot be."""
    check_sweep(config.tune, config.train)


@dataclass(frozen=True)
class Stage:
    """A stage: its title, the artefact it makes, what does it, and, for recipes, what it reads and is set by.

    `check` finds, before a cluster starts, what is wrong with a config beyond each key for itself.
    """

    title: str
    makes: ArtefactName
    run: Callable[[RunConfig, Progress], Outcome]
    reads: tuple[ReadName, ...]
    sections: tuple[str, ...]
    check: Callable[[RunConfig], object] | None = None
    dashboard: bool = False  # whether it needs a cluster with one


STAGES = {
    "corpus": Stage("Build the corpus", "corpus", corpus_stage, (), ("corpus",)),
    "curate": Stage("Curate the corpus", "curated", curate_stage, ("corpus",), ("curate",)),
    "train": Stage("Train the encoder", "model", train_stage, ("corpus",), ("train",)),
    "soup": Stage("Average the models", "soup", soup_stage, ("corpus",), ("soup", "train")),
    "evaluate": Stage("Evaluate on held-out pairs", "report", evaluate_stage, ("corpus", "model"), ("evaluate",)),
    "embed": Stage("Embed the corpus", "embeddings", embed_stage, ("corpus", "model"), ("embed",)),
    "index": Stage("Build and verify the index", "index", index_stage, ("embeddings", "model"), ("index",)),
    "compact": Stage("Compact the live updates", "index", compact_stage, ("index",), ("index",)),
    "verify": Stage("Verify the index", "index", verify_stage, ("index",), ("index",)),
    "clusters": Stage(
        "Cluster the embeddings", "attributes", clusters_stage, ("corpus", "embeddings"), ("attributes",)
    ),
    "neighbours": Stage("Find neighbours", "attributes", neighbours_stage, ("corpus", "index"), ("attributes",)),
    "mine": Stage("Mine hard negatives", "mined", mine_stage, ("corpus", "model", "index"), ("mine",)),
    "tune": Stage(
        "Search the settings", "sweeps", tune_stage, ("corpus",), ("tune", "train"), check_tune, dashboard=True
    ),
}


def run_stage(name: str, config: RunConfig, display: Display | None = None, *, title: str = "") -> Outcome:
    """Runs one stage on the configured cluster (the connected one, if any) and shows its progress."""
    stage = STAGES[name]
    if stage.check:
        stage.check(config)
    display = display or Display()
    with (
        connect(config.cluster, config.storage.environment(), dashboard=stage.dashboard),
        display.stage(title or stage.title) as progress,
    ):
        try:
            outcome = stage.run(config, progress)
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
