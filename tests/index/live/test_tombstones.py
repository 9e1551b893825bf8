"""Tombstones against a plain dictionary."""

from hypothesis import given
from hypothesis import strategies as st

from rayemb.index.live.tombstones import Tombstones

ROWS = 40


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.booleans(), st.integers(0, 30)), max_size=60))
def test_every_version_has_the_rows_that_had_not_gone_by_then(steps: list[tuple[int, bool, int]]) -> None:
    tombstones, since, version = Tombstones(ROWS), dict[int, int](), 1
    for position, is_new, asked in steps:
        version += is_new
        tombstones.add(position, version)
        since.setdefault(position, version)
        # In any order, also versions of before; not the one that is being added to.
        for wanted in (min(asked, version - 1), version - 1):
            expected = [since.get(row, wanted + 1) > wanted for row in range(ROWS)]
            alive = tombstones.alive(wanted)
            assert (alive is None) == all(expected)
            if alive is not None:
                assert alive.mask().tolist() == expected
            assert [not tombstones.gone(row, wanted) for row in range(ROWS)] == expected
