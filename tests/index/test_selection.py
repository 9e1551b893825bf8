from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.index import selection as selection_module
from rayemb.index.payload import Payload
from rayemb.index.selection import Selection, Selections

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


@given(st.data())
def test_what_is_left_of_selections_is_what_their_masks_say(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 70))
    masks = st.lists(st.booleans(), min_size=rows, max_size=rows).map(np.array)
    one, two = data.draw(masks), data.draw(masks)
    gone = np.array(data.draw(st.lists(st.integers(0, rows - 1))), np.int64)
    without = one.copy()
    without[gone] = False
    for found, mask in ((Selection(one).without(gone), without), (Selection(one).both(Selection(two)), one & two)):
        assert found.mask().tolist() == mask.tolist()
        assert (found.count, found.rows) == (mask.sum(), rows)
        assert found.has(np.arange(rows)).tolist() == mask.tolist()
