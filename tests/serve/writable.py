"""A collection that takes writes, for the stores of frameworks.

The service takes no writes yet. What they are to do is spelled out here: the real gateway over an exact engine in
memory, whose filters are the index's own, with the three routes that the client calls. When the service has those
routes, this class goes and its users run against the service.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, Request

from rayemb.index.payload import Payload
from rayemb.models import Model
from rayemb.serve import ServeConfig
from rayemb.serve.engine import Description, Found, FoundIds, Vectors
from rayemb.serve.errors import ApiError
from rayemb.serve.gateway import create_app

KINDS = {
    "string": pa.string(),
    "strings": pa.list_(pa.string()),
    "integer": pa.int64(),
    "boolean": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}


def payload_of(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, pa.DataType]) -> Payload:
    """The rows as the index holds them."""
    arrays = {name: pa.array([_value(row.get(name), kind) for row in rows.values()], kind)
              for name, kind in columns.items()}  # fmt: skip
    return Payload(pa.table({"id": pa.array(list(rows), pa.string()), **arrays}))


class Collection:
    """Items of a real model, payload columns of the kinds in `columns`; `max_k` and `max_batch` are small."""

    def __init__(self, model: Model, columns: Mapping[str, str]) -> None:
        self._model, self._columns = model, {name: KINDS[kind] for name, kind in columns.items()}
        self._vectors: dict[str, Vectors] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self.uploads: list[int] = []
        self._about = Description(
            index_version="v",
            model_digest=str(model.digest),
            rows=0,
            dim=model.dim,
            metric="inner_product",
            factory="Flat",
            recall={},
            effort={},
            curve=[],
            words=None,
            shards=[],
            payload_columns=list(columns),
            payload_types=dict(columns),
            has_images=False,
        )

    def app(self) -> FastAPI:
        app = create_app(self, ServeConfig(max_k=20, max_batch=4))
        app.add_api_route("/v1/items", self.upsert, methods=["POST"])
        app.add_api_route("/v1/items/delete", self.delete, methods=["POST"])
        app.add_api_route("/v1/items/get", self.get, methods=["POST"])
        return app

    async def upsert(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        for item in body["items"]:
            for name in item["payload"]:
                if name not in self._columns:
                    raise ApiError(422, "invalid_request", "there is no such field", f"items.payload.{name}")
            if "vector" in item:
                if body.get("model") != str(self._model.digest):
                    raise ApiError(409, "model_mismatch", "vectors of another model", "model")
                vector = np.array(item["vector"], np.float32)
            elif "image" in item:
                raise ApiError(422, "invalid_request", f"a picture of {len(item['image'])} characters", "image")
            else:
                (vector,) = self._model.embed_texts([item["text"]])
            self._vectors[item["id"]], self._rows[item["id"]] = vector, item["payload"]
        self.uploads.append(len(body["items"]))
        return self._changed({"upserted": len(body["items"]), "version": len(self.uploads)})

    async def delete(self, request: Request) -> dict[str, Any]:
        ids = (await request.json())["ids"]
        gone = [name for name in ids if self._rows.pop(name, None) is not None]
        return self._changed({"deleted": len(gone), "version": len(self.uploads)})

    async def get(self, request: Request) -> dict[str, Any]:
        ids = (await request.json())["ids"]
        return {"items": [{"id": name, "payload": self._rows[name]} for name in ids if name in self._rows]}

    def _changed(self, answer: dict[str, Any]) -> dict[str, Any]:
        vars(self._about)["rows"] = len(self._rows)  # the gateway holds this very object
        return answer

    def describe(self) -> Description:
        return self._about

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        return self._model.embed_texts(list(texts)), 0

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        raise NotImplementedError

    async def query(self, vector: Any, query: Any) -> Found:
        raise NotImplementedError

    async def search(self, vectors: Vectors, k: int, filter: Mapping[str, Any] | None = None, **width: Any) -> Found:
        payload = payload_of(self._rows, self._columns)
        passing = np.flatnonzero(payload.mask(filter)) if filter else np.arange(payload.rows)
        names = list(self._rows)
        x_ND = np.array([self._vectors[names[i]] for i in passing], np.float32).reshape(-1, self._model.dim)
        scores = (vectors @ x_ND.T).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        keys = passing[order]
        rows = {key: {"id": names[key], **payload.take([key])[0]} for key in keys.reshape(-1).tolist()}
        return Found(np.take_along_axis(scores, order, 1), keys, rows)

    async def search_ids(
        self, vectors: Vectors, k: int, filter: Mapping[str, Any] | None = None, **width: Any
    ) -> FoundIds:
        found = await self.search(vectors, k, filter)
        return FoundIds(found.scores, pa.array([found.rows[key]["id"] for key in found.keys.reshape(-1).tolist()]))

    async def image(self, item: str) -> bytes | None:
        return None

    async def missing(self) -> list[str]:
        return []


def _value(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_timestamp(kind) and isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return value
