"""The filter language: JSON conditions on payload columns, checked strictly, answered as a mask over rows.

    {"source": "openmoji", "size": {"gte": 64}}                   all of them hold
    {"colour": {"in": ["red", "blue"]}, "text": {"prefix": "he"}}
    {"or": [{"sold": true}, {"not": {"price": {"gt": 5}}}]}
    {"added": {"gte": "2026-01-01", "lt": "2026-02-01T12:00Z"}}   timestamps, ISO 8601; UTC where no zone is given
    {"text": null}, {"text": {"exists": true}}                    missing, and not
    {"place": {"within": {"lat": 52.5, "lon": 13.4, "km": 5}}}

A missing value meets no condition but null, so `not` finds it. Of a list column, one element has to meet a condition.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rayemb.index.columns import Column
from rayemb.index.errors import FilterError

Filter = Mapping[str, Any]
Mask = NDArray[np.bool_]

MAX_DEPTH = 16
MAX_CONDITIONS = 256
MAX_VALUES = 10_000
AND, OR, NOT = "and", "or", "not"
_WHOLE = 2.0**63


def _exact(value: Any) -> Any:
    # A whole number of more than 64 bits comes out of a JSON parser as a float; it is one all the same.
    return int(value) if isinstance(value, float) and abs(value) >= _WHOLE and value.is_integer() else value


def _plain(value: Any) -> Any:
    # One readable error for a value of another kind, instead of one for each member of a union.
    if isinstance(value, str | bool | int | float):
        return _exact(value)
    raise ValueError("a value is a text, a number or a boolean")


def _bound(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError("a bound is a finite number, or a timestamp as text")


Value = Annotated[str | int | float | bool, BeforeValidator(_plain)]
Bound = Annotated[int | float | str, BeforeValidator(_bound)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Circle(_Strict):
    """A point and a distance from it."""

    lat: float = Field(ge=-90, le=90, description="latitude in degrees")
    lon: float = Field(ge=-180, le=180, description="longitude in degrees")
    km: float = Field(gt=0, description="radius in km")


class Condition(_Strict):
    """What a column's value must be; several together must all hold."""

    in_: list[Value] | None = Field(None, alias="in", max_length=MAX_VALUES, description="one of these values")
    gt: Bound | None = Field(None, description="greater than: numbers; timestamps as ISO 8601 texts")
    gte: Bound | None = Field(None, description="at least")
    lt: Bound | None = Field(None, description="less than")
    lte: Bound | None = Field(None, description="at most")
    prefix: str | None = Field(None, description="a text that begins so, letter for letter")
    exists: bool | None = Field(None, description="true: the item has a value; false: it has none")
    within: Circle | None = Field(None, description="a point (a struct of lat and lon) no further than this")


_OPERATORS = [info.alias or name for name, info in Condition.model_fields.items()]


@dataclass(frozen=True)
class Leaf:
    """A condition on one column; a plain value stands for equality, None for a missing value."""

    column: str
    test: Condition | str | int | float | bool | None
    path: str


@dataclass(frozen=True)
class Tree:
    """`and`, `or` or `not` over `parts`; `not` has one."""

    operator: str
    parts: tuple["Tree | Leaf", ...]


@dataclass
class _Budget:
    conditions: int = field(default=0)

    def spend(self, path: str) -> None:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise FilterError(f"more than {MAX_CONDITIONS} conditions", where=path)


def parse_filter(document: object) -> Tree:
    """The filter in a JSON document. Raises FilterError naming the path of what is wrong."""
    return _object(document, "filter", 1, _Budget())


def canonical(document: object) -> str:
    """One text for a filter, whatever the order of its keys. Raises FilterError for what is not JSON."""
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise FilterError("a filter is a JSON object", where="filter") from error
    except RecursionError as error:
        raise FilterError(f"nested deeper than {MAX_DEPTH}", where="filter") from error


def evaluate(part: Tree | Leaf, columns: Mapping[str, Column], rows: int) -> Mask:
    """The rows that pass, bool `(rows,)`. Raises FilterError for an unknown column or a value of another type."""
    if isinstance(part, Leaf):
        return _leaf(part, columns)
    if part.operator == NOT:
        return ~evaluate(part.parts[0], columns, rows)
    join = np.logical_or if part.operator == OR else np.logical_and
    mask = np.full(rows, part.operator == AND, np.bool_)
    for inner in part.parts:
        join(mask, evaluate(inner, columns, rows), out=mask)
    return mask


# -- parsing -------------------------------------------------------------------------------------------------


def _object(document: object, path: str, depth: int, budget: _Budget) -> Tree:
    if depth > MAX_DEPTH:
        raise FilterError(f"nested deeper than {MAX_DEPTH}", where=path)
    if not isinstance(document, Mapping) or not all(isinstance(key, str) for key in document):
        raise FilterError("expected an object of columns and conditions", where=path, fix='such as {"column": "value"}')
    if not document and depth > 1:
        raise FilterError("expected at least one condition", where=path)
    parts: list[Tree | Leaf] = []
    for key, value in document.items():
        here = f"{path}.{key}"
        if key in (AND, OR):
            if not isinstance(value, list) or not value:
                raise FilterError("expected a list of one or more filters", where=here)
            inner = [_object(each, f"{here}[{i}]", depth + 1, budget) for i, each in enumerate(value)]
            parts.append(Tree(key, tuple(inner)))
        elif key == NOT:
            parts.append(Tree(NOT, (_object(value, here, depth + 1, budget),)))
        else:
            budget.spend(here)
            parts.append(Leaf(key, _test(value, here), here))
    return Tree(AND, tuple(parts))


def _test(value: object, path: str) -> Condition | str | int | float | bool | None:
    if value is None or isinstance(value, str | bool | int | float):
        plain: str | int | float | bool | None = _exact(value)
        return plain
    if not isinstance(value, Mapping):
        raise FilterError(
            "expected a value or an object of operators", where=path, fix='to find one of several: {"in": [...]}'
        )
    if not value:
        raise FilterError("expected at least one operator", where=path, fix=f"operators: {', '.join(_OPERATORS)}")
    for operator, operand in value.items():
        if operator not in _OPERATORS:
            fix = f"operators: {', '.join(_OPERATORS)}; equality is the plain value"
            raise FilterError("there is no such operator", where=f"{path}.{operator}", fix=fix)
        if operand is None:
            raise FilterError("expected a value, got null", where=f"{path}.{operator}")
    try:
        return Condition.model_validate(dict(value))
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]
                         if part in _OPERATORS or isinstance(part, int) or part in Circle.model_fields)  # fmt: skip
        raise FilterError(item["msg"].removeprefix("Value error, "), where=path + inside) from error


# -- answering -----------------------------------------------------------------------------------------------


def _leaf(leaf: Leaf, columns: Mapping[str, Column]) -> Mask:
    if leaf.column not in columns:
        there = ", ".join(columns) or "none"
        raise FilterError("there is no such field", where=leaf.path, fix=f"fields: {there}")
    column, test = columns[leaf.column], leaf.test
    if test is None:
        return ~column.exists()
    if not isinstance(test, Condition):
        return column.equal(_values(column, [test], [leaf.path], leaf))
    mask: Mask | None = None
    for found in _conditions(column, test, leaf):
        mask = found if mask is None else mask & found
    assert mask is not None
    return mask


def _conditions(column: Column, test: Condition, leaf: Leaf) -> list[Mask]:
    found: list[Mask] = []
    if test.in_ is not None:
        paths = [f"{leaf.path}.in[{i}]" for i in range(len(test.in_))]
        found.append(column.equal(_values(column, test.in_, paths, leaf)))
    bounds = {name: getattr(test, name) for name in ("gt", "gte", "lt", "lte")}
    # One interval at a time, open and closed bounds apart: {"gt": 1, "gte": 2} is odd, and means both.
    for low, high, is_open in (("gt", "lt", True), ("gte", "lte", False)):
        ends = [_end(column, bounds[name], f"{leaf.path}.{name}", leaf) for name in (low, high)]
        if any(end is not None for end in ends):
            closed = {"open_low": is_open and ends[0] is not None, "open_high": is_open and ends[1] is not None}
            found.append(column.between(ends[0], ends[1], **closed))
    if test.prefix is not None:
        if _element(column) != "string":
            raise FilterError(f"a prefix is of texts, and this column is {column.kind}", where=f"{leaf.path}.prefix")
        found.append(column.starts_with(test.prefix))
    if test.exists is not None:
        there = column.exists()
        found.append(there if test.exists else ~there)
    if test.within is not None:
        if column.kind != "point":
            fix = "a point is a struct of lat and lon"
            raise FilterError(f"this column is {column.kind}, no point", where=f"{leaf.path}.within", fix=fix)
        found.append(column.around(test.within.lat, test.within.lon, test.within.km))
    return found


def _element(column: Column) -> str:
    return column.kind.removeprefix("list of ")


def _values(column: Column, values: Sequence[Any], paths: Sequence[str], leaf: Leaf) -> list[Any]:
    return [_value(column, value, path, leaf) for value, path in zip(values, paths, strict=True)]


def _value(column: Column, value: Any, path: str, leaf: Leaf) -> Any:
    """`value` as the column compares it. Raises FilterError if it is of another type."""
    kind = _element(column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "string" and isinstance(value, str):
        return value
    if kind == "boolean" and isinstance(value, bool):
        return value
    if kind == "integer" and is_number and isinstance(value, int):
        return value
    if kind == "number" and is_number and math.isfinite(value):
        return _finite(value)
    if kind == "timestamp" and isinstance(value, str):
        return _moment(value, path)
    if kind in ("other", "point"):
        raise FilterError(
            f"a column of type {kind} cannot be compared",
            where=leaf.path,
            fix="filter by a column of texts, whole numbers, numbers, booleans or timestamps",
        )
    raise FilterError(f"expected {_EXPECTED[kind]}, got {_short(value)}", where=path)


def _end(column: Column, value: Any, path: str, leaf: Leaf) -> Any:
    """A bound as the column compares it; a fraction may bound whole numbers."""
    if value is None:
        return None
    kind = _element(column)
    if kind in ("string", "boolean"):
        raise FilterError(f"a column of {kind}s has no range", where=path, fix='use {"in": [...]} or {"prefix": ...}')
    if kind == "integer" and isinstance(value, float) and math.isfinite(value):
        return value
    return _value(column, value, path, leaf)


def _finite(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _moment(text: str, path: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        fix = "write 2026-01-31 or 2026-01-31T12:00:00Z"
        raise FilterError(f"{_short(text)} is no timestamp of ISO 8601", where=path, fix=fix) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_EXPECTED = {
    "string": "a text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a finite number",
    "timestamp": "a timestamp as text",
}
