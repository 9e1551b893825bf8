"""Rows of a shard that are gone, each from some version of the log on."""

import bisect

import numpy as np

from rayemb.index.selection import Selection


class Tombstones:
    """What of a shard's R rows is gone, at any version: a row goes once and never comes back.

    One thread adds, after which others may ask for any version that was added before.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._since: dict[int, int] = {}
        self._positions: list[int] = []
        self._versions: list[int] = []
        # The latest that was asked for, with the number of rows that are gone in it.
        self._latest: tuple[int, Selection | None] = (0, None)

    def add(self, position: int, version: int) -> None:
        """The row at `position` is gone from `version` on. Versions do not fall."""
        if position not in self._since:
            self._since[position] = version
            self._versions.append(version)
            self._positions.append(position)

    def gone(self, position: int, version: int) -> bool:
        """Whether the row at `position` is gone at `version`."""
        return self._since.get(position, version + 1) <= version

    def alive(self, version: int) -> Selection | None:
        """The rows that are there at `version`; None: all of them."""
        count = bisect.bisect_right(self._versions, version)
        known, selection = self._latest
        if known == count:
            return selection
        if known > count or selection is None:
            known, selection = 0, None
        if not count:
            return None
        found = (selection or Selection(np.ones(self.rows, np.bool_))).without(
            np.array(self._positions[known:count], np.int64)
        )
        self._latest = count, found
        return found
