from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from rayemb.index import selection as selection_module
from rayemb.index.payload import Payload
from rayemb.index.selection import Selections

ROWS = 1000
PAYLOAD = Payload(pa.table({"id": [str(i) for i in range(ROWS)], "n": list(range(ROWS))}))


def test_a_filter_that_comes_again_is_not_answered_again() -> None:
    selections = Selections(PAYLOAD)
    first = selections({"n": {"lt": 10, "gte": 5}})
    assert selections({"n": {"gte": 5, "lt": 10}}) is first
    assert selections({"n": {"gte": 5, "lt": 11}}) is not first
    assert first.positions.tolist() == [5, 6, 7, 8, 9]
    assert (first.count, first.share) == (5, 0.005)
    assert first.mask().tolist() == [5 <= i < 10 for i in range(ROWS)]


def test_what_is_kept_is_bounded_and_the_latest_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    selections = Selections(PAYLOAD)
    each = selections({"n": 0}).bytes
    monkeypatch.setattr(selection_module, "_KEPT_BYTES", 10 * each)
    often = selections({"n": 1})
    for value in range(2, 100):
        selections({"n": value})
        assert selections({"n": 1}) is often
        assert selections._bytes == sum(kept.bytes for kept in selections._kept.values()) <= 10 * each
    # One that is larger than all room is answered and not kept.
    monkeypatch.setattr(selection_module, "_KEPT_BYTES", 1)
    assert selections({"n": 5}).count == 1
    assert not selections._kept
    assert selections._bytes == 0


def test_threads_share_the_selections() -> None:
    selections = Selections(PAYLOAD)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: selections({"n": {"lt": i % 50}}).positions.tolist(), range(400)))
    assert found == [list(range(i % 50)) for i in range(400)]
    assert np.isclose(selections._bytes, sum(kept.bytes for kept in selections._kept.values()))
