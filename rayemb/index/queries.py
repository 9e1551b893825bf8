"""Kinds of queries beyond the k nearest: by example, diverse, grouped, with words beside vectors, re-ranked.

`answer` composes them over any `Source`: an `Index`, or whatever else can search, here or elsewhere.
Shape suffixes: D dimensions, C candidates, K results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayemb.index.effort import Effort
from rayemb.index.errors import FilterError, QueryError
from rayemb.index.filters import AND, NOT, Filter

Floats = NDArray[np.float32]
Keys = NDArray[np.int64]

# Candidates for each result that is wanted, and at least: for a diverse choice, and for each side of a fusion.
_CANDIDATES, _LEAST_CANDIDATES = 5, 50
# Cormack, Clarke and Buettcher (2009); the choice hardly matters.
_RRF_K = 60


@dataclass(frozen=True)
class Hits:
    """The answer to N queries: scores `(N, k)` float32 and keys `(N, k)` int64, padded with -inf and -1.

    `strategies`: how each shard answered (`index` without a filter; `exact`, `selector`, `overfetch` with one).
    `updates`: the version of the live updates that were searched; None where they are not followed.
    """

    scores: Floats
    keys: Keys
    strategies: tuple[str, ...] = ()
    updates: int | None = None


class Source(Protocol):
    """What a query is asked of."""

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Hits:
        """The k best rows for each vector."""
        ...

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        """The k best rows for the words of `text`, as of one query."""
        ...

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id."""
        ...

    def vectors(self, keys: Sequence[int]) -> Floats:
        """Vectors `(len(keys), D)` of rows."""
        ...

    def payload(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        """Id and payload of rows."""
        ...


class Reranker(Protocol):
    """Scores pairs of a query and a text, `(N,)`, larger is better; such as `rayemb.mining.CrossEncoder`."""

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """One score for each pair."""
        ...


@dataclass(frozen=True)
class Fusion:
    """Words beside vectors.

    `rrf`: the sum of `1 / (60 + rank)` over both rankings; `convex`: `weight` times the words' score and the rest
    times the vectors', each scaled to 0..1 over its candidates.
    """

    text: str
    how: Literal["rrf", "convex"] = "rrf"
    weight: float = 0.5


@dataclass(frozen=True)
class Rerank:
    """The best `candidates` scored anew by reading `text` and the column `column` of each together."""

    text: str
    column: str
    candidates: int
    reranker: Reranker


@dataclass(frozen=True)
class Query:
    """What is wanted. Of `diversity`, `group_by` and (`fusion`, `rerank`) one at most.

    Args:
        k: results; with `group_by`, groups.
        filter: `rayemb.index.filters`.
        effort, recall: how wide to search, as in `Index.search`.
        min_score: only rows whose inner product reaches this; not with `fusion` or `rerank`.
        positive, negative: ids of rows to be near to and far from; the rows themselves are left out.
        diversity: 0 (the nearest) to 1 (the most unlike each other): maximal marginal relevance.
        group_by: a column; the best `group_size` rows of each of its values, the groups by their best rows.
    """

    k: int = 10
    filter: Filter | None = None
    effort: Effort | None = None
    recall: float | None = None
    min_score: float | None = None
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    diversity: float | None = None
    group_by: str | None = None
    group_size: int = 1
    fusion: Fusion | None = None
    rerank: Rerank | None = None

    def __post_init__(self) -> None:
        kinds = [("diversity", self.diversity), ("group_by", self.group_by), ("fusion", self.fusion or self.rerank)]
        given = [name for name, value in kinds if value is not None]
        if len(given) > 1:
            raise QueryError(f"{given[0]} and {given[1]} cannot be asked for together", where=given[1])
        if self.effort is not None and self.recall is not None:
            raise QueryError("give effort or recall, not both", where="effort")
        if self.min_score is not None and (self.fusion or self.rerank):
            raise QueryError("min_score is of vectors: not with words or a re-ranking", where="min_score")

    @property
    def plain(self) -> bool:
        """Whether nothing but the k nearest of one vector is wanted."""
        return self == Query(self.k, self.filter, self.effort, self.recall)


def answer(source: Source, vector: ArrayLike | None, query: Query) -> Hits:
    """One query answered, `(1, <= results)`, without padding.

    Args:
        vector: `(D,)`, None if the examples alone say what is wanted.

    Raises:
        QueryError: no vector and no positive example, an id that is not there, a group that is no value.
        FilterError: see `rayemb.index.filters`.
    """
    asked = _Asked(source, _target(source, vector, query), query)
    if query.group_by is not None:
        return asked.grouped(query.group_by)
    if query.diversity is not None:
        return asked.diverse(query.diversity)
    if query.rerank is not None:
        return asked.reranked(query.rerank)
    return asked.ranked(query.k, query.filter)


def diversify(relevance_C: Floats, vectors_CD: Floats, k: int, diversity: float) -> list[int]:
    """Positions of `k` candidates by maximal marginal relevance (Carbonell and Goldstein, 1998), in their order.

    Each next one has the largest `(1 - diversity) * relevance - diversity * max similarity to those before`, the
    first of equals.
    """
    chosen: list[int] = []
    nearest_C = np.full(len(relevance_C), -np.inf, np.float32)
    open_C = np.ones(len(relevance_C), np.bool_)
    for _ in range(min(k, len(relevance_C))):
        penalty_C = diversity * nearest_C if chosen else 0.0
        value_C = np.where(open_C, (1 - diversity) * relevance_C - penalty_C, -np.inf)
        best = int(np.argmax(value_C))
        chosen.append(best)
        open_C[best] = False
        nearest_C = np.maximum(nearest_C, vectors_CD @ vectors_CD[best])
    return chosen


def fuse(dense: Hits, lexical: Hits, fusion: Fusion) -> Hits:
    """Two rankings of one query as one, highest score first, lowest key first among equal scores."""
    summed: dict[int, float] = {}
    weights = {"rrf": (1.0, 1.0), "convex": (1 - fusion.weight, fusion.weight)}[fusion.how]
    for hits, weight in zip((dense, lexical), weights, strict=True):
        keys = hits.keys[0][hits.keys[0] >= 0]
        by_rank = 1 / (_RRF_K + 1 + np.arange(len(keys)))
        values = by_rank if fusion.how == "rrf" else _scaled(hits.scores[0][: len(keys)])
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            summed[key] = summed.get(key, 0.0) + weight * value
    order = sorted(summed, key=lambda key: (-summed[key], key))
    return _hits([summed[key] for key in order], order, dense.strategies)


class _Asked:
    """One query on its way: the vector that is wanted, the rows that are left out."""

    def __init__(self, source: Source, target: tuple[Floats, list[int]], query: Query) -> None:
        self.source, self.query = source, query
        self.vector, self.excluded = target

    def ranked(self, k: int, filter: Filter | None) -> Hits:
        """The k best by vectors, or by vectors and words."""
        wide = k + len(self.excluded)
        fusion = self.query.fusion
        if fusion is not None:
            wide = max(wide, _CANDIDATES * k, _LEAST_CANDIDATES)
        hits = self.source.search(self.vector[None], wide, filter, effort=self.query.effort, recall=self.query.recall)
        if fusion is not None:
            hits = fuse(hits, self.source.words(fusion.text, wide, filter), fusion)
        scores, keys = hits.scores[0], hits.keys[0]
        kept = (keys >= 0) & ~np.isin(keys, self.excluded)
        if self.query.min_score is not None:
            kept &= scores >= self.query.min_score
        return _hits(scores[kept][:k], keys[kept][:k], hits.strategies)

    def diverse(self, diversity: float) -> Hits:
        k = self.query.k
        hits = self.ranked(max(_CANDIDATES * k, _LEAST_CANDIDATES), self.query.filter)
        keys = hits.keys[0]
        chosen = diversify(hits.scores[0], self.source.vectors(keys.tolist()), k, diversity) if len(keys) else []
        return _hits(hits.scores[0][chosen], keys[chosen], hits.strategies)

    def reranked(self, rerank: Rerank) -> Hits:
        hits = self.ranked(max(self.query.k, rerank.candidates), self.query.filter)
        keys = hits.keys[0].tolist()
        if not keys:
            return hits
        texts = [str(row.get(rerank.column) or "") for row in self.source.payload(keys)]
        scores = rerank.reranker.scores([rerank.text] * len(texts), texts)
        order = sorted(range(len(keys)), key=lambda i: (-float(scores[i]), keys[i]))[: self.query.k]
        return _hits([float(scores[i]) for i in order], [keys[i] for i in order], hits.strategies)

    def grouped(self, column: str) -> Hits:
        """The groups first, each search leaving out those that are known; then what the groups still lack."""
        query, size = self.query, self.query.group_size
        groups: dict[Any, list[tuple[float, int]]] = {}
        strategies: set[str] = set()
        while len(groups) < query.k:
            known = [{NOT: {column: {"in": list(groups)}}}] if groups else []
            hits = self._members(query.k * size, column, {column: {"exists": True}}, *known)
            strategies |= set(hits.strategies)
            keys = hits.keys[0].tolist()
            if not keys:
                break
            found: dict[Any, list[tuple[float, int]]] = {}
            for score, key, row in zip(hits.scores[0].tolist(), keys, self.source.payload(keys), strict=True):
                value = row[column]
                if not isinstance(value, str | int | bool):
                    fix = "group by a column of texts, whole numbers or booleans"
                    raise QueryError(f"{column!r} holds no plain values", where="group_by", fix=fix)
                found.setdefault(value, []).append((score, key))
            groups |= dict(list(found.items())[: query.k - len(groups)])
        for value, members in groups.items():
            if len(members) < size:
                hits = self._members(size, column, {column: value})
                groups[value] = list(zip(hits.scores[0].tolist(), hits.keys[0].tolist(), strict=True))
        members = [member for group in groups.values() for member in group[:size]]
        return _hits([score for score, _ in members], [key for _, key in members], tuple(sorted(strategies)))

    def _members(self, k: int, column: str, *more: Mapping[str, Any]) -> Hits:
        filter = _both(self.query.filter, *more)
        own = [f"filter.{AND}[{i}].{column}" for i in range(len(filter[AND]) - len(more), len(filter[AND]))]
        try:
            return self.ranked(k, filter)
        except FilterError as error:
            if error.where not in own:
                raise
            raise QueryError(error.what, where="group_by", fix=error.fix) from error


def _target(source: Source, vector: ArrayLike | None, query: Query) -> tuple[Floats, list[int]]:
    """The unit vector that is wanted, and the keys of the examples.

    The mean of the positives, the query's own vector among them, minus the mean of the negatives.
    """
    keys: dict[str, list[int]] = {}
    for name, ids in (("positive", query.positive), ("negative", query.negative)):
        found = [source.key(row_id) for row_id in ids]
        for i, key in enumerate(found):
            if key is None:
                raise QueryError(f"there is no item {ids[i]!r}", where=f"{name}[{i}]")
        keys[name] = [key for key in found if key is not None]
    own = [] if vector is None else [np.asarray(vector, np.float32).reshape(-1)]
    if not keys["positive"] and not keys["negative"] and own:
        return own[0], []
    towards = own + (list(source.vectors(keys["positive"])) if keys["positive"] else [])
    if not towards:
        raise QueryError("nothing says what is wanted", where="positive", fix="give a vector or a positive example")
    x_D = np.mean(towards, axis=0)
    if keys["negative"]:
        x_D = x_D - source.vectors(keys["negative"]).mean(axis=0)
    length = float(np.linalg.norm(x_D))
    if length < 1e-6:
        raise QueryError("the positive and negative examples cancel each other out", where="negative")
    return np.asarray(x_D / length, np.float32), keys["positive"] + keys["negative"]


def _both(filter: Filter | None, *more: Mapping[str, Any]) -> Filter:
    """`filter` and `more`; the paths of what is wrong in `filter` stay what they are."""
    given = dict(filter or {})
    return {**given, AND: [*given.get(AND, []), *more]}


def _scaled(scores: Floats) -> NDArray[np.float64]:
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)
    scaled = (scores.astype(np.float64) - low) / (high - low) if high > low else np.ones(len(scores))
    return np.asarray(scaled, np.float64)


def _hits(scores: Sequence[float] | Floats, keys: Sequence[int] | Keys, strategies: tuple[str, ...]) -> Hits:
    return Hits(np.asarray(scores, np.float32).reshape(1, -1), np.asarray(keys, np.int64).reshape(1, -1), strategies)
