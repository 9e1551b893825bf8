import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.index import FilterError
from rayemb.index.payload import Payload

TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), st.sampled_from(["", "a", "b", "é", "a b"])),
    "coded": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["x", "y"])),
    "small": (pa.int8(), st.integers(-128, 127)),
    "big": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "half": (pa.float16(), st.sampled_from([0.0, 0.5, 1.0])),
    "single": (pa.float32(), st.sampled_from([0.1, 0.2, 1e30])),
    "flag": (pa.bool_(), st.booleans()),
}


@st.composite
def _table(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = draw(st.integers(0, 12))
    columns = {
        name: draw(st.lists(st.none() | values, min_size=rows, max_size=rows)) for name, (_, values) in TYPES.items()
    }
    named = draw(st.lists(st.sampled_from(sorted(TYPES)), unique=True, max_size=2))
    conditions = {name: draw(TYPES[name][1]) for name in named}
    return [{name: columns[name][i] for name in TYPES} for i in range(rows)], conditions


def _payload(rows: list[dict[str, Any]]) -> Payload:
    columns = {name: pa.array([row[name] for row in rows], kind) for name, (kind, _) in TYPES.items()}
    return Payload(pa.table({"id": pa.array([f"r{i}" for i in range(len(rows))], pa.string()), **columns}))


@settings(max_examples=100, deadline=None)
@given(_table())
def test_a_mask_is_equality_of_every_field(table: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    rows, conditions = table
    mask = _payload(rows).mask(conditions)
    assert mask.tolist() == [all(row[name] == value for name, value in conditions.items()) for row in rows]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nothing", 1, "no such field. fields: text, coded, small, big, half, single, flag"),
        ("id", "r1", "no such field"),
        ("text", 1, "expected a text, got 1"),
        ("text", None, "expected a text, got None"),
        ("small", True, "expected a whole number, got True"),
        ("small", 1.0, "expected a whole number, got 1.0"),
        ("flag", 1, "expected true or false, got 1"),
        ("single", "1", "expected a finite number, got '1'"),
        ("single", math.nan, "expected a finite number, got nan"),
    ],
)
def test_a_filter_that_does_not_fit_is_an_error_that_names_its_field(name: str, value: Any, message: str) -> None:
    with pytest.raises(FilterError, match=message) as caught:
        _payload([]).mask({name: value})
    assert caught.value.where == f"filter.{name}"


def test_a_column_of_lists_is_shown_but_not_filtered_by() -> None:
    payload = Payload(pa.table({"id": ["a"], "tags": [["x", "y"]]}))
    assert payload.take([0]) == [{"id": "a", "tags": ["x", "y"]}]
    with pytest.raises(FilterError, match="cannot be filtered by"):
        payload.mask({"tags": "x"})


@pytest.mark.parametrize(("name", "value"), [("small", 1000), ("big", -1), ("big", 2**70), ("half", 1e30)])
def test_a_value_beyond_the_columns_range_finds_nothing(name: str, value: Any) -> None:
    row = {"text": "a", "coded": "x", "small": 1, "big": 1, "half": 1.0, "single": 0.1, "flag": True}
    assert _payload([row]).mask({name: value}).tolist() == [False]


def test_ids_are_found_whatever_their_order_and_chunks() -> None:
    ids = [f"{(i * 7919) % 1000:03d}" for i in range(1000)]
    payload = Payload(pa.table({"id": pa.chunked_array([ids[:300], ids[300:]])}))
    assert [payload.position(row_id) for row_id in ids] == list(range(1000))
    assert payload.position("absent") is None
    assert payload.position("") is None
    assert payload.take([999, 0, 0]) == [{"id": ids[999]}, {"id": ids[0]}, {"id": ids[0]}]
