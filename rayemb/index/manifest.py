"""The manifest: the one file that says what an index is, and whose bytes are its version."""

import json
import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from rayemb import storage
from rayemb.index.effort import Effort
from rayemb.index.errors import IndexArtefactError, QueryError

FORMAT = 2
MANIFEST = "manifest.json"
_NUMBERS = re.compile(r"\[(?:\s+\d+,?)+\s+\]")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class EmbeddingsRef(_Part):
    """The version of the embeddings table that an index was built from."""

    uri: str
    version: int
    rows: int = Field(ge=1)


class File(_Part):
    """A file of the index."""

    file: str = Field(description="path below the index's folder")
    bytes: int
    sha256: str


class ShardFile(File):
    """One shard: a FAISS file whose ids are positions 0 .. rows-1, and the keys (table offsets) of those rows."""

    rows: int = Field(ge=0)
    start: int | None = Field(None, ge=0, description="by rows: key of position 0; the others follow")
    keys: File | None = Field(None, description="otherwise: the keys, ascending, 64 bits each, little-endian")

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if (self.start is None) == (self.keys is None):
            raise ValueError(f"{self.file} must have either `start` or `keys`")
        return self


class Sharding(_Part):
    """How rows were placed; `rayemb.index.placement` says where a row or a query belongs."""

    by: Literal["rows", "hash", "cell"]
    cells: tuple[int, ...] = Field((), description="by cell: the shard of each IVF list; a query asks those it probes")


class Words(_Part):
    """The lexical half (BM25): the words of each shard's rows, and what their scores need of all rows together."""

    column: str = Field(description="the payload column whose texts these are")
    length: int = Field(ge=0, description="words of all rows together")
    terms: File
    shards: tuple[File, ...]


class BuildFigures(_Part):
    """What was built with which FAISS, and what it took."""

    seconds: float
    train_rows: int
    seed: int = 0
    faiss: str


class Recall(_Part):
    """Recall@k against exact search over all rows, at the index's own effort.

    The queries are rows of the table, and each is left out of its own answers: they are held out.
    """

    k: int
    queries: int
    recall: float


class CurvePoint(_Part):
    """Recall@k of the same queries at one effort, and the milliseconds that a query took, alone on one thread."""

    effort: Effort
    recall: float
    ms: float


class Manifest(_Part):
    """What an index is: model, embeddings, type, shards with checksums, figures."""

    format: Literal[2] = 2
    created: str = Field(description="UTC, ISO 8601")
    model_digest: str
    embeddings: EmbeddingsRef
    metric: Literal["inner_product"]
    dim: int = Field(ge=1)
    factory: str
    prefix: int | None = Field(None, description="the type sees this many first coordinates; all are re-ranked by")
    effort: Effort = Field(description="how wide to search unless asked otherwise")
    updates: int = Field(0, ge=0, description="version of the log of live updates that the embeddings hold")
    origin: str | None = Field(None, description="of an index that was compacted: the version that was built")
    sharding: Sharding
    trained: File = Field(description="the trained FAISS index without rows, of which every shard is a copy")
    shards: tuple[ShardFile, ...] = Field(min_length=1)
    words: Words | None = Field(None, description="for queries by words beside vectors, if they were asked for")
    build: BuildFigures
    recall: Recall | None = None
    curve: tuple[CurvePoint, ...] = Field((), description="what more effort buys, cheapest first")

    _version: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _shards_cover_the_rows(self) -> Self:
        expected = 0
        for shard in self.shards:
            if (shard.start is None) == (self.sharding.by == "rows") or shard.start not in (None, expected):
                raise ValueError(f"{shard.file} does not begin at row {expected}")
            expected += shard.rows
        if expected != self.embeddings.rows:
            raise ValueError(f"the shards hold {expected} rows and the embeddings {self.embeddings.rows}")
        if any(not 0 <= shard < len(self.shards) for shard in self.sharding.cells):
            raise ValueError(f"sharding.cells names a shard beyond the {len(self.shards)} there are")
        if self.words is not None and len(self.words.shards) != len(self.shards):
            raise ValueError(f"words are of {len(self.words.shards)} shards and there are {len(self.shards)}")
        return self

    @property
    def files(self) -> list[File]:
        """All files of the index beside the manifest."""
        keys = [shard.keys for shard in self.shards if shard.keys is not None]
        words = [self.words.terms, *self.words.shards] if self.words else []
        return [self.trained, *self.shards, *keys, *words]

    def chosen_effort(self, effort: Effort | None, recall: float | None) -> Effort:
        """How wide to search: `effort`, or the cheapest that reached `recall`; by default the index's own.

        Raises QueryError for both, or a recall that no measured effort reaches.
        """
        if recall is None:
            return effort or self.effort
        if effort is not None:
            raise QueryError("give effort or recall, not both", where="effort")
        for point in self.curve:
            if point.recall >= recall:
                return point.effort
        if not self.curve:
            raise QueryError(
                "the recall of this index was not measured",
                where="recall",
                fix="build it with index.recall_queries above 0, or ask by effort",
            )
        best = max(point.recall for point in self.curve)
        raise QueryError(
            f"no measured effort of this index reaches {recall:g}; the best is {best:g}",
            where="recall",
            fix="ask for less, or build a finer index.factory",
        )

    @property
    def version(self) -> str:
        """The index version: the first 12 hex digits of the SHA-256 of the manifest's bytes."""
        return self._version or _version_of(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The manifest as it is published (UTF-8 JSON)."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        # A routing table has a number for each IVF list: on one line.
        return (_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST) -> "Manifest":
        """The manifest in `data`. Raises IndexArtefactError if it is none, or of another format."""
        try:
            document = json.loads(data)
        except ValueError as error:
            raise IndexArtefactError("the manifest is not JSON", where=where, fix="build the index again") from error
        found = document.get("format") if isinstance(document, dict) else None
        if found != FORMAT:
            raise IndexArtefactError(
                f"the manifest has format {found!r} and this rayemb reads {FORMAT}",
                where=where,
                fix="build the index again, or use the rayemb that wrote it",
            )
        try:
            manifest = cls.model_validate(document)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'shards'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            )
            raise IndexArtefactError(
                f"the manifest is not whole ({problems})", where=where, fix="build the index again"
            ) from error
        # Of the bytes as they lie there: another writer's spacing must not change the name of its index.
        manifest._version = _version_of(data)
        return manifest


def load_manifest(index_uri: str) -> Manifest:
    """The manifest of the index at `index_uri`. Raises IndexArtefactError if it cannot be read."""
    uri = storage.join(index_uri, MANIFEST)
    if not storage.exists(uri):
        raise IndexArtefactError(
            f"no {MANIFEST}: there is no index here", where=index_uri, fix="run `rayemb index build`"
        )
    return Manifest.from_bytes(storage.read_bytes(uri), uri)


def publish_manifest(index_uri: str, manifest: Manifest) -> Manifest:
    """Makes `manifest` the one that readers find, in one atomic step, and gives it back."""
    storage.write_bytes(storage.join(index_uri, MANIFEST), manifest.to_bytes())
    return manifest


def _version_of(data: bytes) -> str:
    return storage.sha256_bytes(data)[:12]
