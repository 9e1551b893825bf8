"""Judges a model on held-out pairs of a corpus, beside the same model untrained and beside chance."""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb import storage
from rayemb.cluster import require_cpus
from rayemb.config import Config, dump
from rayemb.data import Corpus, CorpusError, EmbedConfig, encode_images
from rayemb.data.corpus import RowGroup
from rayemb.evaluate.captions import Captioned
from rayemb.evaluate.config import EvaluateConfig
from rayemb.evaluate.gate import Place
from rayemb.evaluate.metrics import (
    bootstrap_interval,
    chance_mrr,
    chance_recall_at,
    hits_at,
    paired_bootstrap,
    ranks,
    reciprocal_ranks,
)
from rayemb.evaluate.report import Corpus as CorpusFacts
from rayemb.evaluate.report import (
    Difference,
    DirectionResult,
    Estimate,
    Example,
    Report,
    SplitResult,
    SystemResult,
    TrainingPoint,
    write_report,
)
from rayemb.models import Model
from rayemb.progress import Progress

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image→text", "text→image"
DESCRIPTIONS = {
    "zero_shot": "concepts that training never saw, drawn in styles that it saw",
    "style_held_out": "concepts that training saw, in a style that it never saw",
    "zero_shot_style": "neither the concept nor the style was seen in training",
}
NOTES = (
    "Relevant is every candidate of the query's concept; recall@k is the share of queries with any relevant "
    "candidate among the first k. Ties count against the model.",
    "Queries and candidates are those of one split only: figures of splits of different size do not compare.",
)
DEMO_NOTE = "The pictures are drawings (icons and emoji), not photographs: nothing here is photo retrieval."


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the whole report, one line, and the headline figures."""

    report: Report
    summary: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Side:
    """The pairs of one split under every system: images `(N, D)`, distinct captions `(T, D)`."""

    images: dict[str, NDArray[np.float32]]
    texts: dict[str, NDArray[np.float32]]
    pairs: Captioned


def evaluate(
    config: EvaluateConfig,
    corpus_uri: str,
    model_uri: str,
    report_uri: str,
    *,
    settings: Config | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The report on the model, written to `report_uri`.

    The untrained baseline has the architecture, the tokenizer and the seed of the model, so it is the very network
    that training began with. Images are encoded on Ray Data, at most `config.max_rows` a split, and ranked
    blockwise in this process: memory O(max_rows · D). Needs a connected Ray.
    Raises CorpusError or ModelError if there is nothing to judge.
    """
    corpus, model = Corpus.open(corpus_uri), Model.load(model_uri)
    splits = [split for split in config.splits if split in corpus.splits]
    if not splits:
        raise CorpusError(
            f"none of the splits {config.splits} is in the corpus",
            where="evaluate.splits",
            fix=f"splits there: {', '.join(corpus.splits)}",
        )
    require_cpus(config.workers * config.cpus_per_worker + 1, "evaluation (encoders and their data)")
    untrained = Model.create(model.network.config, model.tokenizer, int(model.info.get("seed", 0)))
    baseline_uri = storage.join(report_uri, "untrained")
    untrained.save(baseline_uri)
    systems = {"trained": (model_uri, model), "untrained": (baseline_uri, untrained)}
    sides = _encode(config, corpus, splits, systems, progress)
    report = Report(
        title="Image–text retrieval on held-out pairs",
        created=datetime.datetime.now(datetime.UTC),
        model_digest=str(model.digest),
        corpus=CorpusFacts(name=corpus.digest[:12], uri=corpus.uri, rows=corpus.splits),
        config=dump(settings) if settings else "",
        training=tuple(_point(row) for row in model.info.get("training", [])),
        confidence=config.confidence,
        method=f"Intervals: cluster bootstrap by concept, {config.samples} samples. Chance: exact expectation.",
        results=tuple(_judge(split, side, config) for split, side in sides.items()),
        examples=tuple(_examples(splits[0], sides[splits[0]], config)),
        examples_note="Queries drawn at random by seed, not picked.",
        notes=_notes(config, corpus, splits),
    )
    write_report(report_uri, report)
    storage.delete(baseline_uri)
    figures = _headline(report)
    return Evaluation(report, figures["headline"], figures)


def yields(config: EvaluateConfig, splits: Iterable[str]) -> list[Place]:
    """The figures that `evaluate` will have of a corpus with those splits."""
    metrics = [*(f"recall@{k}" for k in config.ks), "mrr"]
    here = [split for split in config.splits if split in set(splits)]
    return [Place(split, way, metric) for split in here for way in (IMAGE_TO_TEXT, TEXT_TO_IMAGE) for metric in metrics]


def _encode(
    config: EvaluateConfig,
    corpus: Corpus,
    splits: list[str],
    systems: Mapping[str, tuple[str, Model]],
    progress: Progress | None,
) -> dict[str, _Side]:
    groups = {split: _first_groups(corpus.row_groups(split), config.max_rows) for split in splits}
    total = sum(group.rows for part in groups.values() for group in part)
    first = next(iter(systems.values()))[1]
    pool = EmbedConfig(
        workers=config.workers, cpus_per_worker=config.cpus_per_worker, gpus_per_worker=config.gpus_per_worker
    )
    dataset = encode_images(
        groups,
        [uri for uri, _ in systems.values()],
        pool,
        keep=("id", "image", "text", "concept", "split"),
        image_size=first.network.config.image_size,
        limits=corpus.image_limits,
    )
    parts: list[pa.Table] = []
    done = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        parts.append(batch)
        done += len(batch)
        if progress:
            progress(done, total, f"{done:,} pairs encoded")
    table = pa.concat_tables(parts)
    sides = {}
    for split in splits:
        rows = table.filter(pa.compute.equal(table["split"], split))
        sides[split] = _side(rows, systems)
    return sides


def _side(table: pa.Table, systems: Mapping[str, tuple[str, Model]]) -> _Side:
    pairs = Captioned.of(table.select(["id", "text", "image", "concept"]).to_pylist())
    return _Side(
        images={name: _vectors(table, number) for number, name in enumerate(systems)},
        texts={name: model.embed_texts(pairs.captions) for name, (_, model) in systems.items()},
        pairs=pairs,
    )


def _vectors(table: pa.Table, number: int) -> NDArray[np.float32]:
    column = table[f"vector_{number}" if number else "vector"].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        column = column.storage
    vectors: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return vectors.astype(np.float32)


def _judge(split: str, side: _Side, config: EvaluateConfig) -> SplitResult:
    directions = (
        _direction(IMAGE_TO_TEXT, side.images, side.texts, side.pairs.image_groups, side.pairs.text_groups, config),
        _direction(TEXT_TO_IMAGE, side.texts, side.images, side.pairs.text_groups, side.pairs.image_groups, config),
    )
    return SplitResult(split=split, description=DESCRIPTIONS.get(split, ""), directions=directions)


def _direction(
    name: str,
    queries: Mapping[str, NDArray[np.float32]],
    candidates: Mapping[str, NDArray[np.float32]],
    groups_q: NDArray[np.int64],
    groups_c: NDArray[np.int64],
    config: EvaluateConfig,
) -> DirectionResult:
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    for system in queries:
        found = ranks(queries[system], candidates[system], groups_q, groups_c)
        scores[system] = {f"recall@{k}": hits_at(found, k) for k in config.ks} | {"mrr": reciprocal_ranks(found)}
    chance = {f"recall@{k}": chance_recall_at(groups_q, groups_c, k) for k in config.ks}
    chance["mrr"] = chance_mrr(groups_q, groups_c)

    def mean(values: NDArray[np.float64]) -> Estimate:
        return _estimate(
            bootstrap_interval(values, groups_q, seed=config.seed, confidence=config.confidence, samples=config.samples)
        )

    def gain(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate:
        return _estimate(
            paired_bootstrap(
                values, baseline, groups_q, seed=config.seed, confidence=config.confidence, samples=config.samples
            )
        )

    systems = [
        SystemResult(
            system=system,
            metrics={metric: mean(found) for metric, found in values.items()},
        )
        for system, values in scores.items()
    ]
    systems.append(SystemResult(system="chance", metrics={m: Estimate(value=v) for m, v in chance.items()}))
    difference = Difference(
        system="trained",
        baseline="untrained",
        metrics={metric: gain(values, scores["untrained"][metric]) for metric, values in scores["trained"].items()},
    )
    return DirectionResult(
        direction=name,
        queries=len(groups_q),
        candidates=len(groups_c),
        systems=tuple(systems),
        difference=difference,
    )


def _examples(split: str, side: _Side, config: EvaluateConfig) -> list[Example]:
    """Random queries of both kinds against the pictures of the split."""
    rng = np.random.default_rng(config.seed)
    images, texts, pairs = side.images["trained"], side.texts["trained"], side.pairs
    examples = []
    for q in rng.permutation(len(pairs.captions))[: config.examples]:
        hits = pairs.hits(texts[q], int(pairs.text_groups[q]), images, config.example_hits)
        examples.append(Example(split=split, direction=TEXT_TO_IMAGE, text=pairs.captions[q], hits=hits))
    for q in rng.permutation(len(pairs.rows))[: config.examples]:
        group = int(pairs.image_groups[q])
        hits = pairs.hits(images[q], group, images, config.example_hits, leave_out=int(q))
        row = pairs.rows[q]
        examples.append(Example(split=split, direction="image→image", text=row["text"], image=row["image"], hits=hits))
    return examples


def _headline(report: Report) -> dict[str, Any]:
    """The figures of the first split that the last line of a run quotes."""
    first = report.results[0]
    figures: dict[str, Any] = {"split": first.split}
    words = []
    for direction in first.directions:
        metric = direction.columns[-2]  # the largest cut-off; the last column is MRR
        by_system = {system.system: system.metrics[metric].value for system in direction.systems}
        gain = direction.difference.metrics[metric] if direction.difference else None
        figures[direction.direction] = {"metric": metric, **by_system, "gain": gain.model_dump() if gain else None}
        interval = f" (+{gain.value:.3f}, {gain.low:.3f} to {gain.high:.3f})" if gain else ""
        words.append(
            f"{direction.direction} {metric} {by_system['trained']:.3f} against untrained "
            f"{by_system['untrained']:.3f}{interval}, chance {by_system['chance']:.3f}"
        )
    return {**figures, "headline": f"{first.split}: " + "; ".join(words)}


def _notes(config: EvaluateConfig, corpus: Corpus, splits: list[str]) -> tuple[str, ...]:
    notes = list(NOTES)
    if corpus.manifest.get("config", {}).get("source", {}).get("name") == "demo":
        notes.append(DEMO_NOTE)
    missing = [split for split in config.splits if split not in splits]
    if missing:
        notes.append(f"Not in the corpus, so not judged: {', '.join(missing)}.")
    return tuple(notes)


def _point(row: dict[str, Any]) -> TrainingPoint:
    return TrainingPoint(
        step=row["step"], loss=row["loss"], temperature=row["temperature"], learning_rate=row["learning_rate"]
    )


def _estimate(interval: Any) -> Estimate:
    return Estimate(value=interval.mean, low=interval.low, high=interval.high)


def _first_groups(groups: list[RowGroup], rows: int) -> list[RowGroup]:
    kept, total = [], 0
    for group in groups:
        if total >= rows:
            break
        kept.append(group)
        total += group.rows
    return kept
