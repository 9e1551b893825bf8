"""The manifest: the one file that says what an index is, and whose bytes are its version."""

import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from rayemb import storage
from rayemb.index.errors import IndexArtefactError

FORMAT = 1
MANIFEST = "manifest.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class EmbeddingsRef(_Part):
    """The version of the embeddings table that an index was built from."""

    uri: str
    version: int
    rows: int = Field(ge=1)


class ShardFile(_Part):
    """One shard: a FAISS file with the rows `start .. stop-1`, whose keys are those row offsets."""

    file: str = Field(description="path below the index's folder")
    start: int = Field(ge=0)
    stop: int
    rows: int = Field(ge=1)
    bytes: int
    sha256: str


class BuildFigures(_Part):
    """What the build took, and with which FAISS."""

    seconds: float
    train_rows: int
    faiss: str


class Recall(_Part):
    """Recall@k against exact search over all rows.

    The queries are rows of the table, and each finds itself: the first hit is easy, so recall@1 says little.
    """

    k: int
    queries: int
    recall: float


class Manifest(_Part):
    """What an index is: model, embeddings, type, shards with checksums, figures."""

    format: Literal[1] = 1
    created: str = Field(description="UTC, ISO 8601")
    model_digest: str
    embeddings: EmbeddingsRef
    metric: Literal["inner_product"]
    dim: int = Field(ge=1)
    factory: str
    nprobe: int = Field(ge=1)
    ef_search: int = Field(ge=1)
    shards: tuple[ShardFile, ...] = Field(min_length=1)
    build: BuildFigures
    recall: Recall | None = None

    _version: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _shards_cover_the_rows(self) -> Self:
        expected = 0
        for shard in self.shards:
            if shard.start != expected or shard.stop - shard.start != shard.rows:
                raise ValueError(f"{shard.file} does not begin at row {expected} or does not hold what it says")
            expected = shard.stop
        if expected != self.embeddings.rows:
            raise ValueError(f"the shards hold {expected} rows and the embeddings {self.embeddings.rows}")
        return self

    @property
    def version(self) -> str:
        """The index version: the first 12 hex digits of the SHA-256 of the manifest's bytes."""
        return self._version or _version_of(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The manifest as it is published (UTF-8 JSON)."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()

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
        raise IndexArtefactError(f"no {MANIFEST}: there is no index here", where=index_uri, fix="run `rayemb index`")
    return Manifest.from_bytes(storage.read_bytes(uri), uri)


def publish_manifest(index_uri: str, manifest: Manifest) -> Manifest:
    """Makes `manifest` the one that readers find, in one atomic step, and gives it back."""
    storage.write_bytes(storage.join(index_uri, MANIFEST), manifest.to_bytes())
    return manifest


def _version_of(data: bytes) -> str:
    return storage.sha256_bytes(data)[:12]
