"""POST /v1/items, /v1/items/delete, /v1/items/get: what a collection holds, changed while it is searched."""

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import quote

import numpy as np
from fastapi import Request
from pydantic import BaseModel, Field, JsonValue
from starlette.responses import Response

from rayemb.index import IndexArtefactError, UpdateError, UpdatesFullError
from rayemb.index.live.items import MAX_ID_BYTES
from rayemb.models import ImageError
from rayemb.serve.api import Strict
from rayemb.serve.batch import checked_vectors
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description, Vectors
from rayemb.serve.envelope import JsonResponse, request_id
from rayemb.serve.errors import ApiError
from rayemb.serve.parse import JSON, check_image_size, check_text, content_type, json_object, validated
from rayemb.storage import StorageError

if TYPE_CHECKING:
    from rayemb.serve.gateway import Gateway
    from rayemb.serve.versions.table import Served

# The payload column that an item's text is put into, where the payload does not say otherwise.
_TEXT = "text"

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES)]


class Item(Strict):
    """An item: its id, one of text, image and vector, which it is found by, and its payload."""

    id: ItemId = Field(description=f"the client's own; at most {MAX_ID_BYTES} bytes in UTF-8")
    text: str | None = Field(
        None, description="a text that the model embeds; also the payload's `text`, if it lacks it"
    )
    image: str | None = Field(
        None, description="an encoded picture in base64, which the model embeds", json_schema_extra={"format": "byte"}
    )
    vector: list[float] | None = Field(None, description="a vector of the served model, of any length but 0")
    payload: dict[str, JsonValue] = Field(
        {}, description="payload columns; timestamps as texts of ISO 8601; what it lacks is null"
    )


class UpsertRequest(Strict):
    """Items to put in; one whose id is there already replaces it. Of an id that comes twice the last one counts."""

    items: list[Item] = Field(min_length=1, description="all of them are written, or none")
    model: str | None = Field(None, description="digest of the model of the vectors, if there are any")


class IdsRequest(Strict):
    """Items by their ids."""

    ids: list[ItemId] = Field(min_length=1, description="ids that there are not are no error")


class _Written(BaseModel):
    version: int = Field(description="version of the updates with it; a search with `at_least` sees it everywhere")
    index_version: str = Field(description="version of the index that it is beside")
    request_id: str = Field(description="names this request in the server's log")


class UpsertResponse(_Written):
    """The items are durable, and searches find them."""

    upserted: int = Field(description="items written")


class DeleteResponse(_Written):
    """The items are durably gone, and no search finds them."""

    deleted: int = Field(description="items that there were")


class StoredItem(BaseModel):
    """An item as it is."""

    id: str
    payload: dict[str, Any] = Field(description="its payload columns")
    image_url: str | None = Field(None, description="where its picture is, if pictures are kept")


class GetResponse(BaseModel):
    """Those of the items that there are, in the order of their ids in the request."""

    items: list[StoredItem]
    index_version: str = Field(description="version of the index")
    request_id: str = Field(description="names this request in the server's log")


class Items:
    """What the routes of items do."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def upsert(self, request: Request) -> Response:
        """Puts items in, durably, before it answers."""
        gateway, config = self._gateway, self._gateway.config
        body = validated(UpsertRequest, await _fields(request))
        ids = [item.id for item in body.items]
        with gateway.taken(request, timed=False, live=True) as served:
            about = served.about
            images = _checked(body, config, about)
            async with gateway.place():
                async with gateway.stage("embed", len(ids)):
                    vectors = await _vectors(served, body, images)
                payload = [_payload(item, about) for item in body.items]
                pictures = [images.get(i) for i in range(len(ids))] if about.has_images else None
                async with gateway.stage("write", len(ids)):
                    try:
                        version = await served.engine.upsert(ids, vectors, payload, pictures)
                    except (UpdateError, UpdatesFullError, StorageError, IndexArtefactError) as error:
                        _refuse(error, config)
            return JsonResponse({"upserted": len(set(ids)), **_about(request, served, version)})

    async def delete(self, request: Request) -> Response:
        """Takes items out, durably, before it answers."""
        ids = self._ids(validated(IdsRequest, await _fields(request)).ids)
        gateway = self._gateway
        with gateway.taken(request, timed=False, live=True) as served:
            async with gateway.place(), gateway.stage("write", len(ids)):
                try:
                    deleted, version = await served.engine.delete(ids)
                except (UpdateError, UpdatesFullError, StorageError, IndexArtefactError) as error:
                    _refuse(error, gateway.config)
            return JsonResponse({"deleted": deleted, **_about(request, served, version)})

    async def get(self, request: Request) -> Response:
        """Payloads by id."""
        ids = self._ids(validated(IdsRequest, await _fields(request)).ids)
        gateway = self._gateway
        with gateway.taken(request, timed=False, live=True) as served:
            async with gateway.place():
                rows = await served.engine.items(ids)
            about = served.about
        found, root = [], request.scope.get("root_path", "")
        for row in rows:
            payload = dict(row)
            item = str(payload.pop("id"))
            url = f"{root}/v1/items/{quote(item, safe='')}/image" if about.has_images else None
            found.append({"id": item, "payload": payload, "image_url": url})
        name = request_id(request.scope)
        return JsonResponse({"items": found, "index_version": about.index_version, "request_id": name})

    def _ids(self, ids: list[str]) -> list[str]:
        _check_count(len(ids), "ids", self._gateway.config)
        return ids


async def _vectors(served: "Served", body: UpsertRequest, images: Mapping[int, bytes]) -> Vectors:
    """A vector `(N, D)` of each item."""
    engine, about = served.engine, served.about
    found = np.empty((len(body.items), about.dim), np.float32)
    given = [i for i, item in enumerate(body.items) if item.vector is not None]
    if given:
        rows = [body.items[i].vector or [] for i in given]
        names = [f"items.{i}.vector" for i in given]
        found[given] = checked_vectors(rows, names, body.model, about)
    texts = [i for i, item in enumerate(body.items) if item.text is not None]
    if texts:
        found[texts], _ = await engine.embed_documents([body.items[i].text or "" for i in texts])
    # One by one, so that it is known which one is no picture; the encoder takes them together all the same.
    calls = [engine.embed_images([image]) for image in images.values()]
    for i, result in zip(images, await asyncio.gather(*calls, return_exceptions=True), strict=True):
        if isinstance(result, ImageError):
            status = 413 if result.reason == "too_large" else 422
            kind = "too_large" if status == 413 else "invalid_image"
            raise ApiError(status, kind, result.what, f"items.{i}.image") from result
        if isinstance(result, BaseException):
            raise result
        found[i] = result[0]
    return found


def _about(request: Request, served: "Served", version: int) -> dict[str, Any]:
    return {"version": version, "index_version": served.about.index_version, "request_id": request_id(request.scope)}


async def _fields(request: Request) -> dict[str, Any]:
    kind = content_type(request)
    if kind != JSON:
        raise ApiError(415, "unsupported_media_type", f"send {JSON}, not {kind or 'nothing'}", "content-type")
    return await json_object(request)


def _checked(body: UpsertRequest, config: ServeConfig, about: Description) -> dict[int, bytes]:
    """The images of a request that is well formed, by the place of their items. Raises ApiError."""
    _check_count(len(body.items), "items", config)
    images: dict[int, bytes] = {}
    for i, item in enumerate(body.items):
        given = [name for name in ("text", "image", "vector") if getattr(item, name) is not None]
        if len(given) != 1:
            raise ApiError(422, "invalid_request", "give one of text, image and vector", f"items.{i}")
        if item.text is not None:
            check_text(item.text, f"items.{i}.text", config)
        if item.image is not None:
            check_image_size(len(item.image) * 3 // 4 - 2, config)
            try:
                images[i] = base64.b64decode(item.image, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ApiError(422, "invalid_request", "the image is not base64", f"items.{i}.image") from error
            if not images[i]:
                raise ApiError(422, "invalid_request", "the image is empty", f"items.{i}.image")
        if unknown := [name for name in item.payload if name not in about.payload_columns]:
            there = ", ".join(about.payload_columns) or "none"
            told = f"there is no such field; fields: {there}"
            raise ApiError(422, "invalid_request", told, f"items.{i}.payload.{unknown[0][:100]}")
    return images


def _check_count(count: int, name: str, config: ServeConfig) -> None:
    if count > config.max_queries:
        raise ApiError(422, "invalid_request", f"at most {config.max_queries} at once, got {count}", name)


def _payload(item: Item, about: Description) -> dict[str, Any]:
    known: Sequence[str] = about.payload_columns
    text = {_TEXT: item.text} if item.text is not None and _TEXT in known else {}
    return {**text, **item.payload}


def _refuse(error: Exception, config: ServeConfig) -> NoReturn:
    """What a client is told of a write that was not acknowledged."""
    if isinstance(error, UpdateError):
        field = error.where.replace("[", ".").replace("]", "")
        raise ApiError(422, "invalid_request", f"{error.what}{f'; {error.fix}' if error.fix else ''}", field) from error
    headers = {"Retry-After": str(config.retry_after_s)}
    if isinstance(error, UpdatesFullError):
        raise ApiError(503, "updates_full", f"{error.what}: compact them first", headers=headers) from error
    if isinstance(error, StorageError):
        told = "the store of the updates does not answer, and nothing is known to be written; searches go on"
        raise ApiError(503, "storage_unavailable", told, headers=headers) from error
    raise ApiError(503, "compacted", "the updates are in a newer index, which is to be served first") from error
