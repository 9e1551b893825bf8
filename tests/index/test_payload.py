from typing import Any

import pyarrow as pa
import pytest

from rayemb.index.payload import Payload

TYPES = {"small": pa.int8(), "big": pa.uint64(), "half": pa.float16(), "single": pa.float32()}


def _payload(row: dict[str, Any]) -> Payload:
    columns = {name: pa.array([row[name]], kind) for name, kind in TYPES.items()}
    return Payload(pa.table({"id": ["r0"], **columns}))


@pytest.mark.parametrize(("name", "value"), [("small", 1000), ("big", -1), ("big", 2**70), ("half", 1e30)])
def test_a_value_beyond_the_columns_range_finds_nothing(name: str, value: Any) -> None:
    row = {"small": 1, "big": 1, "half": 1.0, "single": 0.1}
    assert _payload(row).mask({name: value}).tolist() == [False]


def test_a_number_is_compared_in_its_columns_precision() -> None:
    # 0.1 as float32 is not 0.1 as float64, and nobody means that difference.
    payload = _payload({"small": 1, "big": 1, "half": 0.1, "single": 0.1})
    assert payload.mask({"single": 0.1}).tolist() == [True]
    assert payload.mask({"single": {"gt": 0.1}}).tolist() == [False]
    assert payload.mask({"single": {"gte": 0.1}}).tolist() == [True]


def test_a_column_of_lists_is_shown_and_found_by_its_elements() -> None:
    payload = Payload(pa.table({"id": ["a", "b", "c"], "tags": [["x", "y"], [], ["z"]]}))
    assert payload.take([0]) == [{"id": "a", "tags": ["x", "y"]}]
    assert payload.mask({"tags": "y"}).tolist() == [True, False, False]


def test_ids_are_found_whatever_their_order_and_chunks() -> None:
    ids = [f"{(i * 7919) % 1000:03d}" for i in range(1000)]
    payload = Payload(pa.table({"id": pa.chunked_array([ids[:300], ids[300:]])}))
    assert [payload.position(row_id) for row_id in ids] == list(range(1000))
    assert payload.position("absent") is None
    assert payload.position("") is None
    assert payload.take([999, 0, 0]) == [{"id": ids[999]}, {"id": ids[0]}, {"id": ids[0]}]
