"""Which index type for a table: candidates built of a sample and measured, the choice with its reason."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index.config import IndexConfig
from rayemb.index.effort import Effort
from rayemb.index.errors import IndexArtefactError
from rayemb.index.faiss_index import FaissShard, faiss, make_index, parts_of, rows_to_train, seed_training, serialise
from rayemb.index.manifest import CurvePoint
from rayemb.index.shard import exact_block, take_vectors
from rayemb.index.verify import efforts_of, frontier

_QUERIES = 100
_TIMED = 20
_TIE = 1e-6
_TRAIN_PER_LIST = 39  # FAISS's own rule for k-means
_LISTS = "{lists}"
# As wide as this from the fastest, the smaller type is the better one: the timings are no finer.
_AS_FAST = 1.25


@dataclass(frozen=True)
class Candidate:
    """One type: what it would cost and reach, and what keeps it from being chosen ("" if nothing does).

    `memory_mb` is what searches read all over; the vectors of a refine stage are mapped, and a few read for each
    query. `total_mb` is the files, those vectors included.
    """

    factory: str
    effort: Effort
    bytes_per_vector: float
    memory_mb: float
    total_mb: float
    recall: float
    ms: float
    lacks: str


@dataclass(frozen=True)
class Plan:
    """The candidates, and the one chosen. `measured_rows` below `rows`: time and lists are extrapolated."""

    rows: int
    dim: int
    measured_rows: int
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str

    def settings(self, config: IndexConfig) -> IndexConfig:
        """`config` with the chosen type in place of `auto`."""
        lists = _lists_in(self.chosen.factory)
        return config.model_copy(
            update={
                "factory": self.chosen.factory,
                "nprobe": self.chosen.effort.nprobe,
                "ef_search": self.chosen.effort.ef_search,
                "rerank": self.chosen.effort.rerank,
                "train_rows": max(config.train_rows, _TRAIN_PER_LIST * lists),
            }
        )


def choose(uri: str, version: int, config: IndexConfig) -> IndexConfig:
    """`config` with the type that `plan_index` chooses for version `version` of the embeddings table at `uri`."""
    return plan_index(EmbeddingsTable.open(uri, version), config).settings(config)


def plan_index(embeddings: EmbeddingsTable, config: IndexConfig) -> Plan:
    """The type for this table under the limits of `config.plan`, on one thread of this process. Needs no Ray.

    Each candidate is built of `plan.sample_rows` rows and asked for the neighbours of other rows. Bytes a vector
    are those of the built index; lists grow with the root of the rows, time with the rows that a search scans
    (of a graph, their logarithm), and the lists probed with the root of the number of lists. The build measures
    all of it again, at the real size. Memory: the sample, three times at most.

    Raises IndexArtefactError for a table too small to plan for, or limits that no type can meet.
    """
    rows, dim, sample = embeddings.rows, embeddings.dim, min(config.plan.sample_rows, embeddings.rows)
    held_out = min(_QUERIES, sample // 10)
    if sample < 1000:
        raise IndexArtefactError(
            f"{rows} rows are too few to choose a type by", where="index.factory", fix="name one; Flat will do"
        )
    at = np.random.default_rng(config.seed).choice(rows, sample, replace=False)
    x_RD, q_ND = (take_vectors(embeddings, np.sort(part)) for part in (at[held_out:], at[:held_out]))
    k = min(config.recall_k, len(x_RD))
    nothing = np.full((held_out, k), -np.inf, np.float32), np.full((held_out, k), -1, np.int64)
    exact = exact_block(q_ND, x_RD, np.arange(len(x_RD)), k, nothing)[0][:, -1:]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        names = factories(dim, by_cell=config.by == "cell")
        found = [_measure(name, x_RD, q_ND, exact, rows, config) for name in names]
    finally:
        faiss.omp_set_num_threads(threads)
    candidates = tuple(each for each in found if each is not None)
    return _choice(Plan(rows, dim, sample, candidates, candidates[0], ""), config)


def factories(dim: int, *, by_cell: bool) -> list[str]:
    """The types worth trying in `dim` dimensions, simplest first; `{lists}` stands for a number of IVF lists.

    No product quantiser of 8 bits: of the same bytes one of 4 bits trains a hundred times as fast. No sign bits
    by themselves: RaBitQ finds with 16 candidates a result what they find with 64, and fast scan both sooner
    (100,000 x 128: recall@10 0.996 and 0.997; 1.000 in a third of RaBitQ's time).
    """
    half = max((m for m in range(1, dim // 2 + 1) if dim % m == 0), default=1)
    refined = [f"PQ{half}x4fs,Refine(SQfp16)", "RaBitQ,Refine(SQfp16)"]
    flat = ["Flat", "SQfp16", "SQ8", *refined, "HNSW32"]
    stored = ["Flat", "SQfp16", "SQ8", *refined, f"PQ{half}x4fs"]
    return ([] if by_cell else flat) + [f"IVF{_LISTS},{each}" for each in stored]


def lists_for(rows: int) -> int:
    """IVF lists for `rows` rows: the power of two below four times their root, as FAISS's guide has it."""
    most = max(1.0, min(4 * math.sqrt(rows), rows / _TRAIN_PER_LIST))
    return int(2 ** math.floor(math.log2(most)))


def _measure(
    template: str,
    x_RD: NDArray[np.float32],
    q_ND: NDArray[np.float32],
    worst_exact_N1: NDArray[np.float32],
    rows: int,
    config: IndexConfig,
) -> Candidate | None:
    """The candidate of a factory with `{lists}`; None where FAISS cannot build it of these vectors."""
    here, there = lists_for(len(x_RD)), lists_for(rows)
    try:
        index = make_index(x_RD.shape[1], template.replace(_LISTS, str(here)))
    except ValueError:
        return None  # no such number of parts in these dimensions
    if rows_to_train(index) > len(x_RD):
        return None
    seed_training(index, config.seed)
    index.train(x_RD)
    empty = len(serialise(index))
    index.add(x_RD)
    per_vector = (len(serialise(index)) - empty) / len(x_RD)
    lists, graph, _ = parts_of(index)
    fixed = empty + (there - here) * 4 * x_RD.shape[1] * (lists > 0)
    shard, k = FaissShard(index), min(config.recall_k, len(x_RD))
    efforts = efforts_of(index, config.effort)
    points = frontier([_point(shard, effort, k, x_RD, q_ND, worst_exact_N1) for effort in efforts])
    reaching = [point for point in points if point.recall >= config.plan.recall]
    point = reaching[0] if reaching else max(points, key=lambda each: each.recall)
    effort, grown = point.effort, rows / len(x_RD)
    if lists:
        wider = math.sqrt(there / here)
        effort = replace(effort, nprobe=min(there, round(effort.nprobe * wider)))
        grown *= here / there * wider
    elif graph:
        grown = math.log(rows) / math.log(len(x_RD))
    stage = faiss.downcast_index(index.refine_index).code_size if isinstance(index, faiss.IndexRefine) else 0
    total_mb, ms = (per_vector * rows + fixed * config.shards) / 1e6, point.ms * grown
    memory_mb = total_mb - stage * rows / 1e6
    limits = config.plan
    lacks = [
        f"recall {point.recall:.3f} of {limits.recall:g}" if point.recall < limits.recall else "",
        f"{memory_mb:,.4g} of {limits.memory_mb:g} MB" if limits.memory_mb and memory_mb > limits.memory_mb else "",
        f"{ms:.2g} of {limits.latency_ms:g} ms" if limits.latency_ms and ms > limits.latency_ms else "",
    ]
    return Candidate(
        factory=template.replace(_LISTS, str(there)),
        effort=effort,
        bytes_per_vector=round(per_vector, 1),
        memory_mb=round(memory_mb, 3),
        total_mb=round(total_mb, 3),
        recall=point.recall,
        ms=round(ms, 4),
        lacks=", ".join(filter(None, lacks)),
    )


def _point(
    shard: FaissShard,
    effort: Effort,
    k: int,
    x_RD: NDArray[np.float32],
    q_ND: NDArray[np.float32],
    worst_exact_N1: NDArray[np.float32],
) -> CurvePoint:
    positions = shard.search(q_ND, k, effort)[1]
    scores = np.einsum("nd,nkd->nk", q_ND, x_RD[np.maximum(positions, 0)])
    recall = float(((positions >= 0) & (scores >= worst_exact_N1 - _TIE)).mean())
    timed = q_ND[:_TIMED]
    started = time.perf_counter()
    for query in timed:
        shard.search(query[None], k, effort)
    ms = (time.perf_counter() - started) / len(timed) * 1000
    return CurvePoint(effort=effort, recall=round(recall, 6), ms=ms)


def _choice(plan: Plan, config: IndexConfig) -> Plan:
    able = [each for each in plan.candidates if not each.lacks]
    limits = config.plan
    asked = f"recall@{config.recall_k} {limits.recall:g}"
    if limits.memory_mb:
        asked += f" within {limits.memory_mb:g} MB"
    if limits.latency_ms:
        asked += f" in {limits.latency_ms:g} ms"
    if not able:
        nearest = "; ".join(f"{each.factory}: {each.lacks}" for each in plan.candidates)
        raise IndexArtefactError(
            f"no type reaches {asked} ({nearest})", where="index.plan", fix="raise a limit, or ask for less recall"
        )
    fastest = min(each.ms for each in able)
    chosen = min((each for each in able if each.ms <= fastest * _AS_FAST), key=lambda each: each.memory_mb)
    others = "the only one that reaches" if len(able) == 1 else f"the fastest of {len(able)} that reach"
    if chosen.ms > fastest:
        others = f"the smallest of those as fast as any of {len(able)} that reach"
    return replace(plan, chosen=chosen, reason=f"{others} {asked}")


def _lists_in(factory: str) -> int:
    parts = [part for part in factory.split(",") if part.startswith("IVF")]
    return int(parts[0].removeprefix("IVF").split("_")[0]) if parts else 0
