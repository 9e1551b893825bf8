"""The index artefact: built shard by shard with Ray, verified, searched in one process or many.

config.py       what to build            build.py     embeddings table -> shards -> manifest, published last
manifest.py     what was built           shard.py     one shard: verified, mapped, filtered, searched
searcher.py     all shards in a process  merge.py     answers of shards into one, exactly
verify.py       checksums and recall     payload.py   ids and fields held in memory
filters.py      the language of filters  columns.py   conditions on one column, by binary search
selection.py    the rows that pass       strategy.py  how a shard answers under a filter
stored.py       vectors kept by FAISS    queries.py   examples, diversity, groups, fusion, re-ranking
lexical.py      BM25 beside the vectors  lexical_build.py  building it with Ray
"""

from rayemb.index.build import build_index
from rayemb.index.config import IndexConfig
from rayemb.index.errors import FilterError, IndexArtefactError, QueryError
from rayemb.index.filters import Filter
from rayemb.index.lexical_build import build_lexical
from rayemb.index.manifest import MANIFEST, Manifest, Recall, ShardFile, load_manifest
from rayemb.index.merge import merge
from rayemb.index.queries import Fusion, Hits, Query, Rerank, Reranker
from rayemb.index.searcher import Index
from rayemb.index.shard import Shard
from rayemb.index.verify import VerifyReport, measure_recall, verify_index

__all__ = [
    "MANIFEST",
    "Filter",
    "FilterError",
    "Fusion",
    "Hits",
    "Index",
    "IndexArtefactError",
    "IndexConfig",
    "Manifest",
    "Query",
    "QueryError",
    "Recall",
    "Rerank",
    "Reranker",
    "Shard",
    "ShardFile",
    "VerifyReport",
    "build_index",
    "build_lexical",
    "load_manifest",
    "measure_recall",
    "merge",
    "verify_index",
]
