"""What /openapi.json says of the bodies of requests: exactly what is taken, so far as a schema can say it."""

from typing import Any

from pydantic import BaseModel

from rayemb.serve.api import EmbeddingsRequest, SearchRequest
from rayemb.serve.batch import ARROW, LEAST, BatchRequest
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description
from rayemb.serve.filter_schema import FILTER, REF, filter_schemas
from rayemb.serve.items import IdsRequest, UpsertRequest

BINARY = {"type": "string", "format": "binary"}
_FLOAT32_MAX = 3.4028234663852886e38
_NULL = {"type": "null"}
# What a payload column takes.
_PAYLOAD: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "timestamp": {"type": "string", "format": "date-time"},
}
_GROUPS = ("string", "integer", "boolean")
_ARROW_TEXT = (
    "An Arrow stream of one column, `texts` (strings) or `vectors` (lists of floats of fixed size), with the other "
    "fields as JSON in the schema's metadata under `rayemb`. The answer then is one too: columns `ids`, `scores` and, "
    "if asked for, `payload` (JSON), a list for each query, and the rest as JSON in the metadata under `rayemb`."
)


def search_body(config: ServeConfig, about: Description | None) -> dict[str, Any]:
    """The body of POST /v1/search: JSON, or a form with a file."""
    schema = _schema(SearchRequest, config, about)
    fields = schema["properties"]
    _either(fields["text"], _text(config))
    # In base64, and never shorter than the smallest picture.
    _either(fields["image"], {"minLength": 4, "contentEncoding": "base64"})
    fields["group_size"]["maximum"] = config.max_k
    _either(fields["rerank"], {"maximum": config.max_k})
    if config.reranker is None:
        fields["rerank"] = _NULL
    if about is not None:
        if about.words is None:
            fields["hybrid"] = _NULL
        groups = [name for name, kind in about.payload_types.items() if kind in _GROUPS]
        fields["group_by"] = {"enum": [*groups, None], "description": fields["group_by"]["description"]}
    # One of the three at least: not all of them absent, null or empty.
    schema["not"] = {"properties": {"text": _NULL, "image": _NULL, "positive": {"maxItems": 0}}}
    form = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "text": {"type": "string", "description": "what to look for, in words", **_text(config)},
            "image": {**BINARY, "description": "an encoded picture"},
            "k": {"type": "integer", "minimum": 1, "maximum": config.max_k, "default": 10},
            "filter": {**FILTER, "description": "the filter, as JSON"},
        },
    }
    body = _json(schema)
    encoding = {"filter": {"contentType": "application/json"}, "image": {"contentType": "image/*"}}
    body["content"]["multipart/form-data"] = {"schema": form, "encoding": encoding}
    return body


def batch_body(config: ServeConfig, about: Description | None) -> dict[str, Any]:
    """The body of POST /v1/search/batch: JSON, or an Arrow stream."""
    schema = _schema(BatchRequest, config, about)
    fields = schema["properties"]
    text = {"type": "string", **_text(config)}
    _either(fields["texts"], {"minItems": 1, "maxItems": config.max_batch, "items": text})
    _either(fields["vectors"], {"minItems": 1, "maxItems": config.max_queries, "items": _vector(about)})
    texts = {"required": ["texts"], "properties": {"texts": {"type": "array"}, "vectors": _NULL}}
    given = {"vectors": {"type": "array"}, "model": {"type": "string"}, "texts": _NULL}
    schema["oneOf"] = [texts, {"required": ["vectors", "model"], "properties": given}]
    body = _json(schema)
    body["content"][ARROW] = {"schema": {**BINARY, "description": _ARROW_TEXT}}
    return body


def embeddings_body(config: ServeConfig, about: Description | None) -> dict[str, Any]:
    """The body of POST /v1/embeddings."""
    schema = EmbeddingsRequest.model_json_schema()
    fields = schema["properties"]
    text = {"type": "string", **_text(config)}
    fields["input"]["anyOf"] = [text, {"type": "array", "items": text, "minItems": 1, "maxItems": config.max_batch}]
    if about is not None:
        _either(fields["dimensions"], {"enum": [about.dim]})
    return _json(schema)


def items_body(config: ServeConfig, about: Description | None) -> dict[str, Any]:
    """The body of POST /v1/items."""
    schema = UpsertRequest.model_json_schema()
    item = schema.pop("$defs")["Item"]
    fields = item["properties"]
    _either(fields["text"], _text(config))
    _either(fields["image"], {"minLength": 4, "contentEncoding": "base64"})
    _either(fields["vector"], _vector(about))
    if about is not None:
        names = about.payload_types
        columns = {name: {"anyOf": [_PAYLOAD.get(kind, {}), _NULL]} for name, kind in names.items()}
        fields["payload"] |= {"properties": columns, "additionalProperties": False}
    kinds = {"text": {"type": "string"}, "image": {"type": "string"}, "vector": {"type": "array"}}
    item["oneOf"] = [
        {"required": [name], "properties": {**dict.fromkeys(kinds, _NULL), name: kind}} for name, kind in kinds.items()
    ]
    schema["properties"]["items"] |= {"items": item, "maxItems": config.max_queries}
    return _json(schema)


def ids_body(config: ServeConfig) -> dict[str, Any]:
    """The body of POST /v1/items/delete and of /v1/items/get."""
    schema = IdsRequest.model_json_schema()
    schema["properties"]["ids"]["maxItems"] = config.max_queries
    return _json(schema)


def _text(config: ServeConfig) -> dict[str, Any]:
    return {"minLength": 1, "maxLength": config.max_text_chars, "pattern": r"\S"}


def _vector(about: Description | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "type": "array",
        "items": {"type": "number", "minimum": -_FLOAT32_MAX, "maximum": _FLOAT32_MAX},
        "contains": {"anyOf": [{"minimum": LEAST}, {"maximum": -LEAST}]},
    }
    return numbers if about is None else {**numbers, "minItems": about.dim, "maxItems": about.dim}


def components(about: Description | None) -> dict[str, Any]:
    """What the bodies refer to, for the document's schemas."""
    found = SearchRequest.model_json_schema(ref_template=REF)["$defs"]
    del found["JsonValue"]
    return {**found, **filter_schemas(about.payload_types if about else None)}


def _schema(model: type[BaseModel], config: ServeConfig, about: Description | None) -> dict[str, Any]:
    """What searches of one query and of many have in common."""
    schema = model.model_json_schema(ref_template=REF)
    del schema["$defs"]
    fields = schema["properties"]
    fields["k"]["maximum"] = config.max_k
    fields["filter"]["anyOf"][0] = FILTER
    if not config.live:
        fields["at_least"] = _NULL
    if about is not None:
        reached = max((point["recall"] for point in about.curve), default=None)
        if reached is None:
            fields["recall"] = _NULL
        else:
            _either(fields["recall"], {"maximum": reached})
    given = {"recall": {"type": "number"}, "effort": {"type": "object"}}
    schema["allOf"] = [{"not": {"required": list(given), "properties": given}}]
    return schema


def _either(field: dict[str, Any], more: dict[str, Any]) -> None:
    """Narrows the one kind of a field that is not null."""
    field["anyOf"][0].update(more)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}
