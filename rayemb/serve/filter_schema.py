"""The filter language as JSON schemas: exact for the columns that are served, so far as a schema can say it."""

from collections.abc import Mapping
from typing import Any

from rayemb.index.filters import AND, MAX_DEPTH, NOT, OR, Condition

REF = "#/components/schemas/{model}"
FILTER = {"$ref": REF.format(model="Filter")}
_RANGE = ("gt", "gte", "lt", "lte")
# Of each type of column: a value of it, a bound of it, and its operators beside `exists`.
_NUMBER = {"type": "number"}
_MOMENT = {"type": "string", "format": "date-time"}
_KINDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], tuple[str, ...]]] = {
    "string": ({"type": "string"}, {}, ("in", "prefix")),
    "integer": ({"type": "integer"}, _NUMBER, ("in", *_RANGE)),
    "number": (_NUMBER, _NUMBER, ("in", *_RANGE)),
    "boolean": ({"type": "boolean"}, {}, ("in",)),
    "timestamp": (_MOMENT, _MOMENT, ("in", *_RANGE)),
    "point": (None, {}, ("within",)),
    "other": (None, {}, ()),
}


def filter_schemas(columns: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """Schemas of the language for a document's components, by name; the filter's is `Filter`.

    `columns`: the type of each, as in `payload_types`, if it is known what is served.
    """
    condition = Condition.model_json_schema(ref_template=REF)
    found: dict[str, dict[str, Any]] = condition.pop("$defs")
    # Null is the default of what is left out, and no operand.
    condition["properties"] = {name: _operand(field) for name, field in condition["properties"].items()}
    condition["minProperties"] = 1
    plain: dict[str, Any] = {
        "type": "object",
        "description": "column: value (equality; null: missing) or column: condition; all of them hold",
    }
    if columns is None:
        found["Condition"] = condition
        scalar = {"type": ["string", "number", "boolean", "null"]}
        any_column = {"anyOf": [scalar, {"$ref": REF.format(model="Condition")}]}
        plain |= {"properties": {}, "additionalProperties": any_column}
    else:
        found |= {_name(kind): _condition(condition, kind) for kind in sorted({*columns.values()})}
        fields = {name: _column(kind) for name, kind in columns.items()}
        plain |= {"properties": fields, "additionalProperties": False}
    # Once and not by itself: tools that make examples of a schema go down without end.
    nested = {"$ref": REF.format(model="Conditions")}
    several = {"type": "array", "items": nested, "minItems": 1}
    found["Conditions"] = {**plain, "minProperties": 1}
    found["Filter"] = {**plain, "properties": {**plain["properties"], AND: several, OR: several, NOT: nested}}
    found["Filter"]["description"] += f". Filters nested up to {MAX_DEPTH} deep are taken"
    return found


def _operand(field: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in field["anyOf"] if kind != {"type": "null"}]
    return {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), "description": field["description"]}


def _element(kind: str) -> str:
    return kind.removeprefix("list of ")


def _name(kind: str) -> str:
    return f"{_element(kind).capitalize()}Condition"


def _column(kind: str) -> dict[str, Any]:
    value = _KINDS[_element(kind)][0]
    return {"anyOf": [*([value] if value else []), {"type": "null"}, {"$ref": REF.format(model=_name(kind))}]}


def _condition(condition: dict[str, Any], kind: str) -> dict[str, Any]:
    """`condition` with what a column of `kind` can be asked."""
    value, bound, operators = _KINDS[_element(kind)]
    fields = {name: dict(condition["properties"][name]) for name in (*operators, "exists")}
    if "in" in fields:
        fields["in"]["items"] = value
    for name in _RANGE:
        if name in fields:
            fields[name] = {"description": fields[name]["description"], **bound}
    return {**condition, "title": _name(kind), "properties": fields}
