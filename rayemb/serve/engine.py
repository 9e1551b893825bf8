"""What the gateway asks of its engine."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import Effort, Filter, IndexArtefactError, IndexMap, Manifest, Query, load_manifest
from rayemb.index.columns import kind_of
from rayemb.serve.errors import EngineUnavailable
from rayemb.storage import StorageError

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
T = TypeVar("T")
_POOL_THREADS = 8
# Characters whose tokens are counted on the event loop: in less time than a thread takes to begin.
_COUNTED_HERE = 2_000


@dataclass(frozen=True)
class Found:
    """What a search gave: `scores` `(n, k)` float32 and `keys` `(n, k)` int64, padded with -inf and -1.

    `rows` has id and payload of every key in `keys` (-1 apart); `strategies` and `updates` are those of
    `rayemb.index.Hits`; `index_version`: of the index that answered, where it is not the only one of its engine.
    """

    scores: Vectors
    keys: NDArray[np.int64]
    rows: Mapping[int, dict[str, Any]]
    missing_shards: list[str] = field(default_factory=list)
    strategies: Sequence[str] = ()
    updates: int | None = None
    index_version: str = ""


@dataclass(frozen=True)
class FoundIds:
    """What a search gave, without payloads: `scores` `(n, k)` float32, padded with -inf, and as many `ids`.

    `ids` is an arrow array of `n * k` texts, row by row, null in empty places.
    """

    scores: Vectors
    ids: pa.Array
    missing_shards: list[str] = field(default_factory=list)
    strategies: Sequence[str] = ()
    updates: int | None = None
    index_version: str = ""


@dataclass(frozen=True)
class Description:
    """What is served."""

    index_version: str
    model_digest: str
    rows: int
    dim: int
    metric: str
    factory: str
    recall: dict[str, Any]
    effort: dict[str, int]
    curve: list[dict[str, Any]]
    words: str | None
    shards: list[dict[str, Any]]
    payload_columns: list[str]
    payload_types: dict[str, str]
    has_images: bool


class Engine(Protocol):
    """Everything the gateway needs to answer. Implementations never block the event loop.

    Raises ImageError for a bad image, QueryError for a bad filter, EngineUnavailable if nothing answers now.
    """

    def describe(self) -> Description:
        """What is served."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` float32, and the number of tokens that the model read."""
        ...

    async def embed_documents(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` float32 of texts that are to be found, which some models embed unlike queries.

        And the number of tokens that the model read.
        """
        ...

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)` float32 of encoded images."""
        ...

    async def search(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Found:
        """The k best for each vector, payloads included: in `spread`, a further trip costs time.

        `effort`, `recall`: how wide to search, as in `rayemb.index.Index.search`.
        """
        ...

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind, of one vector `(D,)` or of examples: `n` is 1, nothing is padded."""
        ...

    async def search_ids(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> FoundIds:
        """As `search`, ids and scores alone: no object is made for a hit."""
        ...

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of the item with this id; None if there is none."""
        ...

    async def map(self) -> IndexMap | None:
        """The map of the index that is served now; None if none was made. Raises as `rayemb.index.load_map`."""
        ...

    async def missing(self) -> list[str]:
        """The parts that do not answer now; empty: all well."""
        ...

    def hedged(self) -> Mapping[str, int]:
        """Calls that were made a second time because they were late, by part; empty where there are no calls."""
        ...

    def mapped(self, vectors: Vectors) -> Vectors:
        """Vectors of the model as the index is asked for them: the same, unless there is a map between models."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What the index is."""
        ...

    def close(self) -> None:
        """Lets go of threads and memory, once nothing is asked any more; may wait for what still runs."""
        ...

    # -- where `ServeConfig.live` is set ---------------------------------------------------------------------

    async def refresh(self, at_least: int | None = None) -> int:
        """Takes in what others wrote; the version of the updates. Raises as `rayemb.index.Index.refresh`."""
        ...

    async def upsert(
        self,
        ids: Sequence[str],
        vectors: Vectors,
        payload: Sequence[Mapping[str, Any]],
        images: Sequence[bytes | None] | None,
    ) -> int:
        """Durable, and found from now on; the version of the updates. Raises as `rayemb.index.Index.upsert`."""
        ...

    async def delete(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many of the items there were, and the version of the updates without them."""
        ...

    async def items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Id and payload of the items that there are, in that order."""
        ...

    async def count(self) -> int:
        """How many items can be found. EngineUnavailable if that cannot be told."""
        ...

    def updates(self) -> tuple[int, int]:
        """The version of the updates that searches see, and how many wait to be compacted; never waits."""
        ...


def check_match(model_digest: str, index_uri: str) -> Manifest:
    """The manifest of an index that was built with that model. Raises IndexArtefactError if it was not."""
    manifest = load_manifest(index_uri)
    if manifest.model_digest != model_digest:
        raise IndexArtefactError(
            f"the index was built with model {manifest.model_digest[:12]}, and the model to serve is "
            f"{model_digest[:12]}: their vectors do not compare",
            where=index_uri,
            fix="serve the model that the index was built with, or embed and index again",
        )
    return manifest


def describe(manifest: Manifest, embeddings: EmbeddingsTable) -> Description:
    """What a gateway says about the index of `manifest`."""
    fields = embeddings.dataset.schema
    return Description(
        index_version=manifest.version,
        model_digest=manifest.model_digest,
        rows=manifest.embeddings.rows,
        dim=manifest.dim,
        metric=manifest.metric,
        factory=manifest.factory,
        recall=manifest.recall.model_dump() if manifest.recall else {},
        effort=asdict(manifest.effort),
        curve=[point.model_dump(mode="json") for point in manifest.curve],
        words=manifest.words.column if manifest.words else None,
        shards=[
            {"name": name, "rows": shard.rows}
            for name, shard in zip(shard_names(manifest), manifest.shards, strict=True)
        ],
        payload_columns=embeddings.payload_columns,
        payload_types={name: kind_of(fields.field(name).type) for name in embeddings.payload_columns},
        has_images=embeddings.has_images,
    )


@contextmanager
def reading_table() -> Iterator[None]:
    """Storage that does not answer is a state that passes: the rest of the service needs it not."""
    try:
        yield
    except (OSError, StorageError) as error:
        logger.warning("the embeddings table cannot be read (%s)", " ".join(str(error).split())[:300])
        raise EngineUnavailable("the storage of the embeddings does not answer", fix="try again later") from error


def shard_names(manifest: Manifest) -> list[str]:
    """How the shards are called in answers and on the dashboard, in order."""
    return [f"shard-{number}" for number in range(len(manifest.shards))]
