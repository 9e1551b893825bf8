"""An empty collection that takes writes, for the stores of frameworks: live, over an index of one deleted row."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from fastapi import FastAPI

from rayemb.index import IndexConfig
from rayemb.index.payload import Payload
from rayemb.models import Model
from rayemb.serve import ServeConfig
from rayemb.serve.asgi import create_app
from rayemb.serve.engine import Vectors
from rayemb.serve.local import LocalEngine
from tests.index.tables import build_here, write_table

KINDS = {
    "string": pa.string(),
    "strings": pa.list_(pa.string()),
    "integer": pa.int64(),
    "boolean": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
    "point": pa.struct({"lat": pa.float64(), "lon": pa.float64()}),
}
_CONFIG = ServeConfig(live=True, max_k=20, max_batch=4, follow_s=3600)


def payload_of(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, pa.DataType]) -> Payload:
    """The rows as the index holds them."""
    arrays = {
        name: pa.array([_value(row.get(name), kind) for row in rows.values()], kind) for name, kind in columns.items()
    }
    return Payload(pa.table({"id": pa.array(list(rows), pa.string()), **arrays}))


def _value(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_timestamp(kind) and isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return value


class Collection(LocalEngine):
    """Items of a model, payload columns of the kinds in `columns`; `uploads` has the sizes of the writes.

    `what` the index is of: in one of images the texts to look for are captions, in one of texts they are queries.
    """

    def __init__(self, folder: Path, model: Model, columns: Mapping[str, str], *, what: str = "image") -> None:
        uri, table, index = str(folder / "model"), str(folder / "embeddings.lance"), folder / "index"
        model.save(uri)
        payload = {name: pa.array([None], KINDS[kind]) for name, kind in columns.items()}
        write_table(table, model.embed_texts(["gone"]), payload, ids=["gone"], digest=str(model.digest), what=what)
        build_here(table, index, IndexConfig(factory="Flat"))
        super().__init__(uri, str(index), _CONFIG)
        self.index.delete(["gone"])
        self.uploads: list[int] = []

    def app(self) -> FastAPI:
        """The service of it."""
        return create_app(self, _CONFIG)

    async def upsert(
        self,
        ids: Sequence[str],
        vectors: Vectors,
        payload: Sequence[Mapping[str, Any]],
        images: Sequence[bytes | None] | None,
    ) -> int:
        """As the engine's own."""
        self.uploads.append(len(ids))
        return await super().upsert(ids, vectors, payload, images)
