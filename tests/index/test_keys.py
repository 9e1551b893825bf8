from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayemb.index.keys import Keys, read_keys, write_keys


@given(st.sets(st.integers(0, 60)), st.lists(st.integers(-1, 70), min_size=1))
def test_listed_keys_are_found_both_ways(members: set[int], asked: list[int]) -> None:
    listed = sorted(members)
    keys = Keys(0, len(listed), np.array(listed, np.int64))
    positions = keys.at(np.array(asked))
    assert positions.tolist() == [listed.index(key) if key in members else -1 for key in asked]
    assert keys.of(positions).tolist() == [key if key in members else -1 for key in asked]


@given(st.integers(0, 50), st.integers(0, 20), st.lists(st.integers(-1, 90), min_size=1))
def test_a_range_of_keys_is_the_list_of_them(start: int, rows: int, asked: list[int]) -> None:
    keys, listed = Keys(start, rows), Keys(0, rows, np.arange(start, start + rows))
    positions = keys.at(np.array(asked))
    assert positions.tolist() == listed.at(np.array(asked)).tolist()
    assert keys.of(positions).tolist() == listed.of(positions).tolist()


def test_keys_are_read_as_they_were_written_by_any_number_of_threads(tmp_path: Path) -> None:
    for rows in (0, 1, 1000):
        write_keys(str(tmp_path / str(rows)), np.arange(rows) * 2**40)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read_keys(str(tmp_path / ("0", "1", "1000")[i % 3])), range(600)))
    for i, keys in enumerate(found):
        assert (keys.tolist(), keys.dtype) == ([row * 2**40 for row in range((0, 1, 1000)[i % 3])], np.int64)
