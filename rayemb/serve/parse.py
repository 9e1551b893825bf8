"""From a request's bytes to a query that can be answered, or to an error that names the wrong field."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from rayemb.index import Effort, FilterError, Fusion, Query, QueryError
from rayemb.index.filters import parse_filter
from rayemb.serve.api import EmbeddingsRequest, Filter, SearchEffort, SearchRequest
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description
from rayemb.serve.errors import ApiError
from rayemb.serve.limits import is_call
from rayemb.serve.rpc import messages
from rayemb.serve.rpc.messages import MESSAGE

M = TypeVar("M", bound=BaseModel)

JSON, MULTIPART = "application/json", "multipart/form-data"
_FORM_FIELDS = ("text", "image", "k", "filter")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Search:
    """A search that is well formed: `text`, `image` (an encoded file) or `wanted.positive` is there.

    `wanted` is complete but for `rerank`, the number of candidates, which needs a network.
    """

    text: str | None
    image: bytes | None
    wanted: Query
    rerank: int | None = None
    at_least: int | None = None


async def search_query(request: Request, config: ServeConfig, about: Description) -> Search:
    """The query in the body of POST /v1/search, JSON or multipart. Raises ApiError."""
    kind = content_type(request)
    if kind == MULTIPART:
        fields, image = await _form(request)
    elif kind == JSON:
        fields, image = await json_object(request), None
    elif kind == MESSAGE:
        fields = messages.fields_of(messages.read(messages.SearchRequest, await request.body()))
        image = fields.pop("image", None)
    else:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"send {JSON} or {MULTIPART}, not {kind or 'nothing'}",
            "content-type",
        )
    body = validated(SearchRequest, fields)
    if body.image is not None:
        image = _from_base64(body.image, config)
    if image is not None:
        check_image_size(len(image), config)
        if not image:
            raise ApiError(422, "invalid_request", "the image is empty", "image")
    if body.text is None and image is None and not body.positive:
        raise ApiError(422, "invalid_request", "give text, image, both, or positive", "text, image")
    if body.text is not None:
        check_text(body.text, "text", config)
    return Search(body.text, image, _wanted(body, config, about), body.rerank, body.at_least)


def _wanted(body: SearchRequest, config: ServeConfig, about: Description) -> Query:
    for name, value in (("k", body.k), ("group_size", body.k * body.group_size), ("rerank", body.rerank or 0)):
        if value > config.max_k:
            what = "k * group_size" if name == "group_size" else name
            raise ApiError(422, "invalid_request", f"{what} is at most {config.max_k}, got {value}", name)
    for name, given in (("hybrid", body.hybrid), ("rerank", body.rerank)):
        if given is not None and body.text is None:
            raise ApiError(422, "invalid_request", f"{name} is of words: give text", name)
    if body.rerank is not None and config.reranker is None:
        raise ApiError(422, "invalid_request", "no re-ranking is served here", "rerank")
    fusion = Fusion(body.text or "", body.hybrid.fusion, body.hybrid.weight) if body.hybrid else None
    try:
        if body.rerank is not None:  # it excludes what words exclude
            Query(diversity=body.diversity, group_by=body.group_by, min_score=body.min_score, fusion=Fusion(""))
        return Query(
            k=body.k,
            filter=checked_filter(body.filter),
            effort=checked_effort(body, about),
            recall=body.recall,
            min_score=body.min_score,
            positive=tuple(body.positive),
            negative=tuple(body.negative),
            diversity=body.diversity,
            group_by=body.group_by,
            group_size=body.group_size,
            fusion=fusion,
        )
    except QueryError as error:
        fix = f"; {error.fix}" if error.fix else ""
        raise ApiError(422, "invalid_request", f"{error.what}{fix}", error.where) from error


class Widened(Protocol):
    """A body that may say how wide to search."""

    @property
    def recall(self) -> float | None: ...  # noqa: D102

    @property
    def effort(self) -> SearchEffort | None: ...  # noqa: D102


def checked_effort(body: Widened, about: Description) -> Effort | None:
    """How wide a request wants to search, what it leaves out being the index's own; None if it does not say."""
    if body.effort is None:
        return None
    if body.recall is not None:
        raise ApiError(422, "invalid_request", "give effort or recall, not both", "effort")
    return Effort(**{**about.effort, **body.effort.model_dump(exclude_none=True)})


def checked_filter(filter: Filter | None) -> Filter | None:
    """The filter if it is well formed; None for none and for one that everything passes. Raises ApiError."""
    try:
        if filter:
            parse_filter(filter)
    except FilterError as error:
        fix = f"; {error.fix}" if error.fix else ""
        raise ApiError(422, "invalid_request", f"{error.what}{fix}", error.where) from error
    return filter or None


async def embeddings_request(request: Request, config: ServeConfig) -> tuple[EmbeddingsRequest, list[str]]:
    """The body of POST /v1/embeddings and its texts. Raises ApiError."""
    kind = content_type(request)
    if kind == MESSAGE:
        fields = messages.fields_of(messages.read(messages.EmbedRequest, await request.body()))
    elif kind == JSON:
        fields = await json_object(request)
    else:
        raise ApiError(415, "unsupported_media_type", f"send {JSON}, not {kind or 'nothing'}", "content-type")
    given = fields.get("input")
    if isinstance(given, list) and given and all(isinstance(item, int | list) for item in given):
        raise ApiError(
            400,
            "invalid_request",
            "token arrays are not taken, because tokens differ between models: send text",
            "input",
        )
    body = validated(EmbeddingsRequest, fields)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise ApiError(400, "invalid_request", "give at least one text", "input")
    if len(texts) > config.max_batch:
        raise ApiError(400, "invalid_request", f"at most {config.max_batch} texts, got {len(texts)}", "input")
    for position, text in enumerate(texts):
        check_text(text, "input" if isinstance(body.input, str) else f"input.{position}", config)
    return body, texts


def check_text(text: str, field: str, config: ServeConfig) -> None:
    """Raises ApiError for a text that is blank or too long."""
    if len(text) > config.max_text_chars:
        # Not 413: that is for bodies, and this is a limit that the schema has.
        told = f"the text has {len(text):,} characters, over {config.max_text_chars:,}"
        raise ApiError(422, "invalid_request", told, field)
    if not text.strip():
        raise ApiError(422, "invalid_request", "the text is empty", field)


def check_image_size(size: int, config: ServeConfig) -> None:
    """Raises ApiError for an encoded image of too many bytes."""
    if size > config.image.max_bytes:
        raise ApiError(413, "too_large", f"the image has {size:,} bytes, over {config.image.max_bytes:,}", "image")


def content_type(request: Request) -> str:
    """The media type of the body, without parameters; MESSAGE of a gRPC call, and of nothing else."""
    if is_call(request.scope):
        return MESSAGE
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises ApiError."""
    try:
        # orjson and not json: NaN, Infinity, 1e400 and lone surrogates are errors here, not later.
        document = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "malformed_json", f"the body is not JSON: {error}", "body") from error
    if not isinstance(document, dict):
        raise ApiError(422, "invalid_request", f"expected a JSON object, got {_kind(document)}", "body")
    return document


async def _form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a form as a JSON body would have them, and the uploaded picture."""
    try:
        form = await request.form(max_files=2, max_fields=16)
    except HTTPException as error:
        raise ApiError(400, "malformed_form", f"the form cannot be read: {error.detail}", "body") from error
    fields: dict[str, Any] = {}
    image: bytes | None = None
    for name, value in form.multi_items():
        if name in fields or (name == "image" and image is not None):
            raise ApiError(422, "invalid_request", "it is given twice", name)
        if isinstance(value, UploadFile) != (name == "image") and name in _FORM_FIELDS:
            expected = "a file" if name == "image" else "a plain field, not a file"
            raise ApiError(422, "invalid_request", f"{name} is {expected}", name)
        if isinstance(value, UploadFile):
            if name != "image":
                raise ApiError(422, "invalid_request", f"unknown field; known: {', '.join(_FORM_FIELDS)}", name)
            image = await value.read()
        elif name == "k":
            # A form knows only texts; what is no whole number goes on as text, for the validator to refuse.
            fields[name] = int(value) if _INTEGER.fullmatch(value) else value
        elif name == "filter":
            fields[name] = messages.filter_of(value)
        else:
            fields[name] = value
    return fields, image


def _from_base64(text: str, config: ServeConfig) -> bytes:
    # "data:image/png;base64,..." is what browsers make of a picture.
    if text.startswith("data:") and "," in text[:200]:
        text = text.split(",", 1)[1]
    check_image_size(len(text) * 3 // 4 - 2, config)  # before decoding; -2: the padding
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(422, "invalid_request", f"the image is not base64: {error}", "image") from error


def validated(model: type[M], fields: dict[str, Any]) -> M:
    """The request in `fields`. Raises ApiError naming the first field that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        # The first problem in full rather than all of them in short.
        item = error.errors(include_url=False)[0]
        known = ", ".join(model.model_fields)
        loc = [str(part) for part in item["loc"]]
        depth = (
            {"hybrid": 2, "effort": 2, "positive": 2, "negative": 2, "items": 4, "ids": 2}.get(loc[0], 1) if loc else 0
        )
        field = ".".join(loc[:depth])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown field; known: {known}" if len(loc) == 1 else "unknown field"
        elif loc[:1] == ["input"]:
            field, message = "input", "input is a text or a list of texts"
        raise ApiError(422, "invalid_request", message, field or "body") from error


def _kind(value: Any) -> str:
    names = {
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
