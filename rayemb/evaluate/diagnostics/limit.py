"""LIMIT: how many sets of documents can a model's vectors return? (S031, Weller et al., 2025.)

"Who likes kites?", where each person likes some things and each thing is liked by exactly k people, and every pair (or
k-set) of people is what some query asks for. Nothing in it is hard to understand; the only question is whether one
vector a person can serve every combination. `limit_task` makes such a task of any size, `limit_report` says how far a
model is from what vectors of its dimension can do, `limit_free` finds what that is.

Suffixes: Q queries, N documents, K relevant documents of each query, D dimensions, B queries of one block.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.limit_free import Free, check_shape, free_embeddings, limit_sets, reachable
from rayemb.evaluate.diagnostics.limit_words import FIRST, KINDS, LAST, LIKES
from rayemb.evaluate.diagnostics.spaces import table
from rayemb.evaluate.metrics.arrays import Floats
from rayemb.evaluate.metrics.errors import MetricError

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
CUTS = (2, 10, 20)
TIE = 1e-6
"""Similarities closer than TIE · |q| · max|c| are a tie, as in `metrics.ranks`: about eight float32 roundings."""


class LimitTask(NamedTuple):
    """Texts and who is relevant to what."""

    documents: list[str]
    """`(N,)` "Ada Nash likes kites, moss and tubas."; the first n are asked for, distractors follow."""
    document_ids: list[str]
    """`(N,)` the people's names."""
    queries: list[str]
    """`(Q,)` "Who likes kites?"."""
    query_ids: list[str]
    relevant: Integers
    """`(Q, K)` int64, rows of `documents`."""

    def qrels(self) -> dict[str, dict[str, int]]:
        """Relevance by id, as trec_eval and its kin take it."""
        pairs = zip(self.query_ids, self.relevant, strict=True)
        return {query: {self.document_ids[at]: 1 for at in row} for query, row in pairs}


def limit_task(
    n: int = 46,
    k: int = 2,
    *,
    queries: int | None = 1000,
    likes: int | None = None,
    distractors: int = 0,
    things: Sequence[str] | None = None,
    seed: int = 0,
) -> LimitTask:
    """A LIMIT task of `n` documents in which each query has exactly `k` relevant ones.

    The defaults have the shape of the paper's LIMIT-small (46 documents, 1,000 of their 1,035 pairs, about 45 likes a
    person), in words of our own: figures are not those of the published data.

    Args:
        n: documents that queries ask for.
        k: relevant documents a query, 1 ≤ k ≤ n.
        queries: at most so many, drawn from all C(n, k) sets without repetition; None: all of them.
        likes: things each person likes. Those that no query asks for fill up, so that length tells nothing. None: one
            more than the most that queries ask of one person.
        distractors: further people who like nothing that is asked for.
        things: what can be liked, all different; None: some 1,600 words, then "rare kites" and the like, whose words
            are shared. One is needed for each query, and as many more as one person likes.
        seed: the same seed gives the same task.

    Raises MetricError if k > n, if `likes` are fewer than what queries ask of one person (who is named), and if there
    are too few things or names. Time and memory O(Q K + (n + distractors) · likes).
    """
    check_shape(n, k)
    if queries is not None and queries < 1:
        raise MetricError(f"there is at least one query, got {queries}", where="queries")
    if distractors < 0:
        raise MetricError(f"cannot be negative, got {distractors}", where="distractors")
    rng = np.random.default_rng(seed)
    relevant_QK = limit_sets(n, k, queries, seed=seed)
    asked: list[list[int]] = [[] for _ in range(n)]
    for query, row in enumerate(relevant_QK):
        for document in row:
            asked[document].append(query)
    most = max(map(len, asked))
    each = most + 1 if likes is None else likes
    names = _names(n + distractors, rng)
    if each < most:
        busy = max(range(n), key=lambda at: len(asked[at]))
        raise MetricError(
            f"{each} are too few: document {busy} ({names[busy]}) is asked for by {most} queries", where="likes"
        )
    words = _things(len(relevant_QK) + each, things, rng)
    wanted, others = words[: len(relevant_QK)], words[len(relevant_QK) :]
    documents = []
    for at, name in enumerate(names):
        own = [wanted[query] for query in asked[at]] if at < n else []
        own += [others[i] for i in rng.permutation(len(others))[: each - len(own)]]
        documents.append(_sentence(name, [own[i] for i in rng.permutation(len(own))]))
    questions = [f"Who likes {thing}?" for thing in wanted]
    return LimitTask(documents, names, questions, [f"query_{i}" for i in range(len(questions))], relevant_QK)


class LimitReport(NamedTuple):
    """A model on a LIMIT task, and the distance to what vectors of its dimension can do."""

    solved: float
    """Share of the queries whose relevant documents all come before all others, in [0, 1]."""
    free_solved: float
    """The same of free vectors of this dimension, fitted to the task itself: what training could reach."""
    distance: float
    """`free_solved` - `solved`: what the model leaves of its dimension's capacity."""
    chance: float
    """`solved` of a random order, 1 / C(N, k)."""
    recall: dict[int, float]
    """Recall at each cut: the mean share of a query's relevant documents among its first."""
    free_recall: dict[int, float]
    chance_recall: dict[int, float]
    reachable: bool | None
    """Whether vectors of this dimension exist that serve *every* k-set: see `limit_free.reachable`."""
    dim: int


def limit_report(
    queries: Floats,
    documents: Floats,
    relevant: NDArray[np.int64],
    *,
    cuts: Sequence[int] = CUTS,
    free: Free | None = None,
    steps: int = 2000,
    seed: int = 0,
    block: int = 1024,
) -> LimitReport:
    """How a model's vectors do on a LIMIT task, beside free vectors of the same dimension and beside chance.

    Args:
        queries: `(Q, D)` floats, scored by inner product.
        documents: `(N, D)`.
        relevant: `(Q, K)` int64, rows of `documents`, as in `LimitTask`.
        cuts: recall is at these ranks; those above N are left out.
        free: a fit to compare with, from `free_embeddings` on the same `relevant`; None: it is made, `steps` long.
        steps, seed: of that fit.
        block: queries at a time.

    A perfect model is one that solves what free vectors of its dimension solve. At the dimensions in use (hundreds)
    that is everything, for any number of documents a file holds: a low score is the encoder's, not the dimension's.
    Time O(Q N D) and the fit's O(steps · Q N D), memory O(block · N) and the fit's O(Q (N + D)). Raises MetricError
    for non-finite rows (named) and relevant rows that are not there (the query is named).
    """
    q_QD, c_ND = table(queries, "queries"), table(documents, "documents")
    if q_QD.shape[1] != c_ND.shape[1]:
        raise MetricError(f"queries have {q_QD.shape[1]} dimensions, documents {c_ND.shape[1]}", where="documents")
    relevant_QK = _relevant(relevant, len(q_QD), len(c_ND))
    if block < 1:
        raise MetricError(f"a block has at least one query, got {block}", where="block")
    (n, dim), k = c_ND.shape, relevant_QK.shape[1]
    fit = free or free_embeddings(relevant_QK, n, dim, steps=steps, seeds=1, seed=seed)
    if fit.queries.shape[0] != len(q_QD) or fit.documents.shape[0] != n:
        raise MetricError(
            f"was fitted to {fit.queries.shape[0]} queries, {fit.documents.shape[0]} documents", where="free"
        )
    ranks_QK = _ranks(q_QD, c_ND, relevant_QK, block)
    free_QK = _ranks(fit.queries.astype(np.float64), fit.documents.astype(np.float64), relevant_QK, block)
    at = [cut for cut in _cuts(cuts) if cut <= n]
    solved, free_solved = _solved(ranks_QK), _solved(free_QK)
    return LimitReport(
        solved,
        free_solved,
        free_solved - solved,
        1 / math.comb(n, k),
        {cut: _recall(ranks_QK, cut) for cut in at},
        {cut: _recall(free_QK, cut) for cut in at},
        {cut: cut / n for cut in at},
        reachable(n, k, dim),
        dim,
    )


def limit_recall(
    scores: Floats, relevant: NDArray[np.int64], *, cuts: Sequence[int] = CUTS, tie: float = TIE
) -> dict[int, float]:
    """Recall at each cut from scores `(Q, N)` of any scorer: BM25, several vectors a document, a cross-encoder.

    Ties count against the scorer: documents of equal score that are not relevant come first. Scores closer than `tie`
    times the query's largest are equal; 0 where they are exact. `relevant` `(Q, K)` int64; cuts above N are left out.
    Raises MetricError as `limit_report`.
    """
    scores_QN = table(scores, "scores")
    relevant_QK = _relevant(relevant, *scores_QN.shape)
    tie_Q1 = tie * np.abs(scores_QN).max(axis=1, keepdims=True)
    ranks_QK = _ranks_of(scores_QN, relevant_QK, tie_Q1)
    return {cut: _recall(ranks_QK, cut) for cut in _cuts(cuts) if cut <= scores_QN.shape[1]}


def _ranks(q_QD: Doubles, c_ND: Doubles, relevant_QK: Integers, block: int) -> Integers:
    tie_Q1 = TIE * np.linalg.norm(q_QD, axis=1, keepdims=True) * np.linalg.norm(c_ND, axis=1).max()
    parts = [slice(at, at + block) for at in range(0, len(q_QD), block)]
    return np.concatenate([_ranks_of(q_QD[part] @ c_ND.T, relevant_QK[part], tie_Q1[part]) for part in parts])


def _ranks_of(s_BN: Doubles, relevant_BK: Integers, tie_B1: Doubles) -> Integers:
    """`(B, K)` ranks of the relevant documents, best first: behind every other document that is as good."""
    own_BK = -np.sort(-np.take_along_axis(s_BN, relevant_BK, axis=1), axis=1)
    others_BN = s_BN.copy()
    np.put_along_axis(others_BN, relevant_BK, -np.inf, axis=1)
    places = range(own_BK.shape[1])
    before = [1 + at + (others_BN >= own_BK[:, at, None] - tie_B1).sum(axis=1) for at in places]
    return np.stack(before, axis=1).astype(np.int64)


def _recall(ranks_QK: Integers, cut: int) -> float:
    return float((ranks_QK <= cut).mean())


def _solved(ranks_QK: Integers) -> float:
    return float((ranks_QK[:, -1] == ranks_QK.shape[1]).mean())


def _relevant(relevant: NDArray[np.int64], rows: int, n: int) -> Integers:
    relevant = np.asarray(relevant)
    if relevant.ndim != 2 or not np.issubdtype(relevant.dtype, np.integer) or not relevant.size:
        raise MetricError(f"expected integers (Q, K), got {relevant.dtype} {relevant.shape}", where="relevant")
    if len(relevant) != rows:
        raise MetricError(f"{rows:,} queries have {len(relevant):,} rows of relevant documents", where="relevant")
    wrong = np.argwhere((relevant < 0) | (relevant >= n))
    if len(wrong):
        query, place = wrong[0]
        raise MetricError(f"query {query} wants document {relevant[query, place]}, there are {n:,}", where="relevant")
    order = np.sort(relevant, axis=1)
    twice = np.flatnonzero((order[:, 1:] == order[:, :-1]).any(axis=1))
    if len(twice):
        raise MetricError(f"query {twice[0]} names a document twice", where="relevant")
    return relevant.astype(np.int64)


def _cuts(cuts: Sequence[int]) -> Sequence[int]:
    if any(cut < 1 for cut in cuts):
        raise MetricError(f"ranks count from 1, got {list(cuts)}", where="cuts")
    return cuts


def _names(count: int, rng: np.random.Generator) -> list[str]:
    pairs = len(FIRST) * len(LAST)
    if count > 27 * pairs:
        raise MetricError(f"there are names for {27 * pairs:,} people, not {count:,}", where="n, distractors")
    letters = ["", *(f"{letter}. " for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
    drawn = rng.permutation(pairs) if count <= pairs else rng.permutation(27 * pairs)
    return [f"{FIRST[i % len(FIRST)]} {letters[i // pairs]}{LAST[i // len(FIRST) % len(LAST)]}" for i in drawn[:count]]


def _things(count: int, things: Sequence[str] | None, rng: np.random.Generator) -> list[str]:
    if things is None:
        known = [*LIKES, *(f"{kind} {thing}" for kind in KINDS for thing in LIKES)]
        known = [known[i] for i in rng.permutation(len(LIKES))] + known[len(LIKES) :]
    else:
        known = [things[i] for i in rng.permutation(len(things))]
        if len(set(known)) < len(known):
            again = next(thing for thing in known if known.count(thing) > 1)
            raise MetricError(f"{again!r} is there twice", where="things")
    if len(known) < count:
        raise MetricError(
            f"{count:,} are needed, there are {len(known):,}", where="things", fix="bring more, or ask less"
        )
    return known[:count]


def _sentence(name: str, liked: list[str]) -> str:
    last = f" and {liked[-1]}" if len(liked) > 1 else "".join(liked)
    return f"{name} likes {', '.join(liked[:-1])}{last}." if liked else f"{name} likes nothing."
