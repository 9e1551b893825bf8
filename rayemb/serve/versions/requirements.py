"""What labelled queries must show of a version, in the measures of `rayemb evaluate` and in its language."""

import asyncio
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.gate import Figure, Outcome, Place, Requirement, judge, parse
from rayemb.evaluate.metrics import Interval, MetricError, bootstrap_interval, judge_run, paired_bootstrap
from rayemb.evaluate.report import Estimate

if TYPE_CHECKING:
    from rayemb.serve.engine import Engine
    from rayemb.serve.versions.gate import Labelled

MEASURES = ("recall", "success", "precision", "ndcg", "map", "mrr")
"""recall: the share of a query's relevant items that is found; success: whether any is (image–text recall)."""
_BATCH = 64
_DEEPEST = 1000


def requirements(texts: Iterable[str], where: str = "require") -> list[Requirement]:
    """The requirements that the texts say. Raises EvaluateError for what is none, or asks for no such measure."""
    found = [parse(text, where) for text in texts]
    for each in found:
        name, _, k = each.name.partition("@")
        if name not in MEASURES or not (k.isascii() and k.isdigit() and 1 <= int(k) <= _DEEPEST):
            known = ", ".join(f"{measure}@k" for measure in MEASURES)
            raise EvaluateError(
                f"labelled queries have no figure {each.name!r}",
                where=f"{where} {each.text!r}",
                fix=f"there are {known}, k from 1 to {_DEEPEST:,}",
            )
    return found


def meet(
    asked: Sequence[Requirement], engine: "Engine", live: "Engine | None", queries: "Sequence[Labelled]"
) -> tuple[dict[str, float], list[Outcome]]:
    """Figures of the measures that are asked for, and what came of each requirement.

    Both versions are searched as deep as the deepest measure. Intervals are of 95 %, by bootstrap over the queries.
    Where nothing is live, there is nothing to gain on, and gains are not asked for.
    """
    asked = [each for each in asked if live is not None or not each.gain]
    if not asked:
        return {}, []
    names = list(dict.fromkeys(each.name for each in asked))
    new, old = values_of(engine, queries, names), values_of(live, queries, names) if live else None
    told: dict[str, float] = {}
    figures = {}
    for name in names:
        value = _estimate(new[name], None)
        gain = _estimate(new[name], old[name]) if old else None
        figures[Place("", "", name)] = Figure(value, gain)
        told |= _told(f"labelled {name}", value)
        if old and gain:
            told[f"live labelled {name}"] = float(old[name].mean())
            told |= _told(f"gain of {name}", gain)
    return told, judge(asked, figures)


def values_of(engine: "Engine", queries: "Sequence[Labelled]", names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Each measure `(Q,)`, a value a query, as `rayemb.evaluate.metrics.judge_run` has them; ties count against it."""
    deepest = max(int(name.partition("@")[2]) for name in names)
    run = asyncio.run(_run(engine, queries, deepest))
    qrels: dict[Hashable, dict[Hashable, int]] = {
        number: dict.fromkeys(query.relevant, 1) for number, query in enumerate(queries)
    }
    judged = judge_run(run, qrels, queries=range(len(queries)))
    return {name: judged.measure(name) for name in names}


async def _run(engine: "Engine", queries: "Sequence[Labelled]", k: int) -> dict[Hashable, dict[Hashable, float]]:
    run: dict[Hashable, dict[Hashable, float]] = {}
    for start in range(0, len(queries), _BATCH):
        batch = queries[start : start + _BATCH]
        vectors, _ = await engine.embed_texts([query.text for query in batch])
        found = await engine.search_ids(vectors, k)
        ids = np.array(found.ids.to_pylist(), object).reshape(len(batch), -1)
        scores = np.asarray(found.scores, np.float64).reshape(ids.shape)
        for row in range(len(batch)):
            pairs = zip(ids[row], scores[row].tolist(), strict=True)
            run[start + row] = {item: score for item, score in pairs if item is not None}
    return run


def _estimate(values: NDArray[np.float64], baseline: NDArray[np.float64] | None) -> Estimate:
    try:
        found: Interval = (
            bootstrap_interval(values, seed=0) if baseline is None else paired_bootstrap(values, baseline, seed=0)
        )
    except MetricError:  # a single query has no spread
        return Estimate(value=float((values if baseline is None else values - baseline).mean()))
    return Estimate(value=found.mean, low=found.low, high=found.high)


def _told(name: str, estimate: Estimate) -> dict[str, float]:
    ends = {f"{name} low": estimate.low, f"{name} high": estimate.high}
    return {name: estimate.value, **{end: value for end, value in ends.items() if value is not None}}
