"""The index artefact: built shard by shard with Ray, verified, searched in one process or many.

config.py       what to build            build.py     embeddings table -> shards -> manifest, published last
manifest.py     what was built           shard.py     one shard: verified, mapped, filtered, searched
searcher.py     all shards in a process  merge.py     answers of shards into one, exactly
verify.py       checksums and recall     payload.py   ids, fields and filters held in memory
"""

from rayemb.index.build import build_index
from rayemb.index.config import IndexConfig
from rayemb.index.errors import FilterError, IndexArtefactError, QueryError
from rayemb.index.filters import Filter
from rayemb.index.manifest import MANIFEST, Manifest, Recall, ShardFile, load_manifest
from rayemb.index.merge import merge
from rayemb.index.searcher import Hits, Index
from rayemb.index.shard import Shard
from rayemb.index.verify import VerifyReport, measure_recall, verify_index

__all__ = [
    "MANIFEST",
    "Filter",
    "FilterError",
    "Hits",
    "Index",
    "IndexArtefactError",
    "IndexConfig",
    "Manifest",
    "QueryError",
    "Recall",
    "Shard",
    "ShardFile",
    "VerifyReport",
    "build_index",
    "load_manifest",
    "measure_recall",
    "merge",
    "verify_index",
]
