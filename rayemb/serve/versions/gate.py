"""What a version must pass before it goes live: its index's recall, and labelled queries beside the live version's."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from rayemb import storage
from rayemb.config import Config
from rayemb.evaluate.metrics import paired_bootstrap
from rayemb.index import load_manifest
from rayemb.serve.engine import Engine
from rayemb.serve.errors import ServeError
from rayemb.serve.versions.catalog import GateConfig, Version
from rayemb.serve.versions.requirements import meet, requirements

_BATCH = 64


class Labelled(Config):
    """A query and the items that are right for it."""

    text: str = Field(min_length=1)
    relevant: tuple[str, ...] = Field(min_length=1, description="ids; any one among the hits is an answer")


@dataclass(frozen=True)
class Verdict:
    """What was measured, and what is wrong; empty: it may go live."""

    figures: dict[str, float]
    problems: tuple[str, ...]


def judge(version: Version, engine: Engine, live: Engine | None, config: GateConfig) -> Verdict:
    """Whether a version is good enough.

    Its index's recall is that of the manifest. Labelled queries are asked of it and of the live version: the share with
    any relevant item among the first `k`, which is the recall@k of `rayemb evaluate`, may not be lower by more than
    `margin`; a 95 % interval of the difference (paired bootstrap) is among the figures. What is required besides is
    measured on the same queries; a version that has none does not meet it.
    """
    recall = load_manifest(version.index).recall
    figures: dict[str, float] = {}
    problems: list[str] = []
    if recall is not None:
        figures[f"recall@{recall.k}"] = recall.recall
        if recall.recall < config.min_recall:
            problems.append(f"the index's recall@{recall.k} is {recall.recall:.3f}, below {config.min_recall:g}")
    elif config.min_recall > 0:
        problems.append(f"the recall of the index was not measured, and {config.min_recall:g} is asked for")
    if version.labels:
        queries = read_labels(version.labels)
        new = hits_of(engine, queries, config.k)
        figures[f"labelled@{config.k}"], figures["labelled queries"] = float(new.mean()), len(queries)
        if live is not None:
            old = hits_of(live, queries, config.k)
            difference = float((new - old).mean())
            figures[f"live labelled@{config.k}"] = float(old.mean())
            if len(queries) > 1:
                _, figures["difference low"], figures["difference high"] = paired_bootstrap(new, old, seed=0)
            if difference < -config.margin:
                problems.append(
                    f"it answers {new.mean():.3f} of {len(queries)} labelled queries among the first {config.k} hits, "
                    f"the live version {old.mean():.3f}: {-difference:.3f} less, over the margin of {config.margin:g}"
                )
        told, outcomes = meet(requirements(config.require), engine, live, queries)
        figures |= told
        problems += [outcome.line for outcome in outcomes if not outcome.passed]
    elif config.require:
        problems.append(f"there are no labelled queries to show {', '.join(config.require)} on")
    return Verdict({name: round(value, 6) for name, value in figures.items()}, tuple(problems))


def read_labels(uri: str) -> list[Labelled]:
    """Labelled queries, a JSON object a line. Raises ServeError naming the line."""
    try:
        lines = storage.read_bytes(uri).splitlines()
    except storage.StorageError as error:
        raise ServeError(f"the labelled queries cannot be read ({error.what})", where=uri) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(Labelled.model_validate(json.loads(line)))
        except (ValueError, ValidationError) as error:
            raise ServeError(
                'no labelled query: expected {"text": ..., "relevant": [id, ...]}', where=f"{uri}:{number}"
            ) from error
    if not found:
        raise ServeError("there are no labelled queries", where=uri)
    return found


def hits_of(engine: Engine, queries: Sequence[Labelled], k: int) -> NDArray[np.float64]:
    """Per query `(Q,)` 1 where a relevant item is among the first `k` hits, else 0."""
    return asyncio.run(_hits_of(engine, queries, k))


async def _hits_of(engine: Engine, queries: Sequence[Labelled], k: int) -> NDArray[np.float64]:
    hits = np.zeros(len(queries))
    for start in range(0, len(queries), _BATCH):
        batch = queries[start : start + _BATCH]
        vectors, _ = await engine.embed_texts([query.text for query in batch])
        found = await engine.search_ids(vectors, k)
        ids = np.array(found.ids.to_pylist(), object).reshape(len(batch), -1)
        for number, query in enumerate(batch):
            hits[start + number] = bool(set(query.relevant) & set(ids[number]))
    return hits
