"""The index artefact: built shard by shard with Ray, verified, searched in one process or many.

config.py       what to build            build.py     embeddings table -> shards -> manifest, published last
plan.py         which type, and why      tasks.py     what a build's workers do
manifest.py     what was built           ledger.py    what an unfinished build has done
placement.py    rows and queries to      shard.py     one shard: verified, mapped, filtered, searched
                shards                   keys.py      which row of the table a position is
searcher.py     all shards in a process  merge.py     answers of shards into one, exactly
effort.py       how wide to search       verify.py    checksums and recall
payload.py      ids and fields in memory columns.py   conditions on one column, by binary search
filters.py      the language of filters  strategy.py  how a shard answers under a filter
selection.py    the rows that pass       stored.py    vectors that FAISS keeps
lexical.py      BM25 beside the vectors  lexical_build.py  writing it
queries.py      examples, diversity, groups, fusion, re-ranking
view.py         what a query sees       live/        updates beside the index, compacted into it
map.py          a sample of the rows as points in the plane
"""

from rayemb.index.build import build_index
from rayemb.index.config import IndexConfig, MapConfig, PlanConfig
from rayemb.index.effort import Effort
from rayemb.index.errors import FilterError, IndexArtefactError, QueryError, UpdateError, UpdatesFullError
from rayemb.index.filters import Filter
from rayemb.index.live.compact import compact_index
from rayemb.index.live.config import LiveConfig
from rayemb.index.manifest import MANIFEST, CurvePoint, Manifest, Recall, ShardFile, load_manifest
from rayemb.index.map import IndexMap, build_map, load_map
from rayemb.index.merge import merge
from rayemb.index.plan import Candidate, Plan, plan_index
from rayemb.index.queries import Fusion, Hits, Query, Rerank, Reranker
from rayemb.index.searcher import Index
from rayemb.index.shard import Shard
from rayemb.index.verify import VerifyReport, measure, measure_recall, recall_of, verify_index
from rayemb.index.view import View

__all__ = [
    "MANIFEST",
    "Candidate",
    "CurvePoint",
    "Effort",
    "Filter",
    "FilterError",
    "Fusion",
    "Hits",
    "Index",
    "IndexArtefactError",
    "IndexConfig",
    "IndexMap",
    "LiveConfig",
    "Manifest",
    "MapConfig",
    "Plan",
    "PlanConfig",
    "Query",
    "QueryError",
    "Recall",
    "Rerank",
    "Reranker",
    "Shard",
    "ShardFile",
    "UpdateError",
    "UpdatesFullError",
    "VerifyReport",
    "View",
    "build_index",
    "build_map",
    "compact_index",
    "load_manifest",
    "load_map",
    "measure",
    "measure_recall",
    "merge",
    "plan_index",
    "recall_of",
    "verify_index",
]
