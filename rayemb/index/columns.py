"""Payload columns as ordered numbers: every condition on one is a few intervals, found by binary search."""

import bisect
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

# Units of arrow's timestamps in a second; a day is one 86,400th of a unit each second.
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Below this share of the rows, setting them one by one is faster than comparing all of them.
_SCATTER_SHARE = 16
_EARTH_KM = 6371.0088


def kind_of(kind: pa.DataType) -> str:
    """What a column holds, for filters: string, integer, number, boolean, timestamp, point, `list of ...`, other."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind_of(kind.value_type)
        return "other" if inner in ("other", "point") or inner.startswith("list") else f"list of {inner}"
    if pa.types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        is_point = set(names) == {"lat", "lon"} and all(map(pa.types.is_floating, names.values()))
        return "point" if is_point else "other"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "timestamp"
    return "number" if pa.types.is_floating(kind) else "other"


class Column:
    """One column of R rows. Sorted on first use: ~0.1 s a million rows, then a rare value costs its rows.

    Args:
        array: a column as `Payload` holds it: whole, texts dictionary-encoded.
    """

    def __init__(self, array: pa.Array) -> None:
        self.kind = kind_of(array.type)
        self._array, self._rows = array, len(array)
        self._lock = threading.Lock()
        self._ready: _Sorted | None = None
        self._elements: tuple[Column, NDArray[np.int64]] | None = None

    def exists(self) -> Mask:
        """The rows that are not null, `(R,)`."""
        found: Mask = self._array.is_valid().to_numpy(zero_copy_only=False)
        return found

    def equal(self, values: Sequence[Any]) -> Mask:
        """The rows that equal one of `values`, of this column's kind; of a list, those of which an element does."""
        if self._is_list:
            return self._any_element("equal", values)
        data = self._data()
        found = [interval for value in values for interval in data.where(value, value)]
        return data.within(found)

    def between(self, low: Any, high: Any, *, open_low: bool, open_high: bool) -> Mask:
        """The rows from `low` to `high`, None for no bound, without the bounds themselves where open."""
        if self._is_list:
            return self._any_element("between", low, high, open_low=open_low, open_high=open_high)
        data = self._data()
        return data.within(data.where(low, high, open_low, open_high))

    def starts_with(self, prefix: str) -> Mask:
        """The rows whose text begins with `prefix`."""
        if self._is_list:
            return self._any_element("starts_with", prefix)
        data = self._data()
        return data.within(data.prefixed(prefix))

    def around(self, lat: float, lon: float, km: float) -> Mask:
        """The rows whose point lies within `km` of `lat`, `lon` (degrees) on a sphere of the Earth's mean radius."""
        mask = np.zeros(self._rows, np.bool_)
        lats, lons = (pc.struct_field(self._array, name).cast(pa.float64()) for name in ("lat", "lon"))
        lat_R, lon_R = (each.fill_null(np.nan).to_numpy(zero_copy_only=False) for each in (lats, lons))
        # One degree of latitude is as long everywhere: the trigonometry is for the rows of the right band.
        near = np.flatnonzero(np.abs(lat_R - lat) <= np.degrees(km / _EARTH_KM) + 1e-9)
        a, b = np.radians(lat), np.radians(lat_R[near])
        angle = np.radians(lon_R[near] - lon)
        chord = np.sin((b - a) / 2) ** 2 + np.cos(a) * np.cos(b) * np.sin(angle / 2) ** 2
        mask[near] = 2 * _EARTH_KM * np.arcsin(np.sqrt(np.clip(chord, 0, 1))) <= km
        return mask

    @property
    def _is_list(self) -> bool:
        return self.kind.startswith("list of")

    def _any_element(self, what: str, *args: Any, **named: Any) -> Mask:
        with self._lock:
            if self._elements is None:
                lengths = pc.list_value_length(self._array).fill_null(0).to_numpy(zero_copy_only=False)
                ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
                self._elements = Column(encoded(self._array.flatten())), ends
        elements, ends = self._elements
        passed = np.concatenate([[0], np.cumsum(getattr(elements, what)(*args, **named))])
        found: Mask = passed[ends[1:]] > passed[ends[:-1]]
        return found

    def _data(self) -> "_Sorted":
        if self._ready is None:
            with self._lock:
                if self._ready is None:
                    self._ready = _Sorted(self._array, self.kind)
        return self._ready


class _Sorted:
    """The values of a column as numbers, and the order of its rows by them, nulls and NaN left out."""

    def __init__(self, array: pa.Array, kind: str) -> None:
        self._kind, self._type, self._rows = kind, array.type, len(array)
        self._texts: pa.Array | None = None
        valid: Mask = array.is_valid().to_numpy(zero_copy_only=False)
        if kind == "string":
            # Codes that are ranks of the texts: a prefix is an interval.
            by_text = pc.sort_indices(array.dictionary).to_numpy()
            self._texts = array.dictionary.take(pa.array(by_text))
            ranks = np.empty(len(by_text) + 1, np.int32)
            ranks[by_text] = np.arange(len(by_text), dtype=np.int32)
            numbers = ranks[array.indices.fill_null(0).to_numpy(zero_copy_only=False)]
        else:
            if kind == "timestamp":
                array = array.cast(pa.int32() if pa.types.is_date32(array.type) else pa.int64())
            filled = array.fill_null(False if kind == "boolean" else 0)
            numbers = filled.to_numpy(zero_copy_only=False)
            numbers = numbers.astype(np.uint8) if kind == "boolean" else numbers
        if kind == "number":
            valid &= ~np.isnan(numbers)
        positions = np.flatnonzero(valid)
        order = positions[np.argsort(numbers[positions], kind="stable")]
        self._order = order.astype(np.int32 if self._rows < 2**31 else np.int64)
        self._ordered = numbers[order]
        self._numbers, self._valid = numbers, None if valid.all() else valid

    def where(
        self, low: Any, high: Any, open_low: bool = False, open_high: bool = False
    ) -> list[tuple[np.generic, np.generic]]:
        """The closed interval of this column's own numbers from `low` to `high`; none if there is no such number."""
        if self._kind == "string":
            at = self._rank(low)
            held = self._texts is not None and at < len(self._texts) and self._texts[at].as_py() == low
            return [(np.int32(at), np.int32(at))] if held else []
        dtype = self._numbers.dtype
        if self._kind == "number":
            with np.errstate(over="ignore"):  # beyond the column's range is infinite, and that is right
                # In the column's type: 0.1 as float32 is not 0.1 as float64, and nobody means that difference.
                first, last = (dtype.type(each) for each in (-np.inf if low is None else low,
                                                             np.inf if high is None else high))  # fmt: skip
            first = np.nextafter(first, dtype.type(np.inf)) if open_low else first
            last = np.nextafter(last, dtype.type(-np.inf)) if open_high else last
            return [(first, last)] if first <= last else []
        least, most = (0, 1) if self._kind == "boolean" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        start, stop = int(least), int(most)
        if low is not None:
            exact = self._exact(low)
            start = max(start, exact.__floor__() + 1 if open_low else exact.__ceil__())
        if high is not None:
            exact = self._exact(high)
            stop = min(stop, exact.__ceil__() - 1 if open_high else exact.__floor__())
        return [(dtype.type(start), dtype.type(stop))] if start <= stop else []

    def prefixed(self, prefix: str) -> list[tuple[np.generic, np.generic]]:
        """The interval of the texts that begin with `prefix`."""
        texts = self._texts
        assert texts is not None
        start = self._rank(prefix)
        rest = range(start, len(texts))
        length = bisect.bisect_left(rest, True, key=lambda at: not texts[at].as_py().startswith(prefix))
        return [(np.int32(start), np.int32(start + length - 1))] if length else []

    def within(self, intervals: Sequence[tuple[np.generic, np.generic]]) -> Mask:
        """The rows whose number lies in one of the closed `intervals`."""
        mask: Mask = np.zeros(self._rows, np.bool_)
        if not intervals:
            return mask
        lows, highs = (np.array(side, self._numbers.dtype) for side in zip(*intervals, strict=True))
        starts, stops = np.searchsorted(self._ordered, lows, "left"), np.searchsorted(self._ordered, highs, "right")
        if len(intervals) == 1 and (stops[0] - starts[0]) * _SCATTER_SHARE > self._rows:
            mask = (self._numbers >= lows[0]) & (self._numbers <= highs[0])
            return mask if self._valid is None else mask & self._valid
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            mask[self._order[start:stop]] = True
        return mask

    def _rank(self, text: str) -> int:
        texts = self._texts
        assert texts is not None
        return bisect.bisect_left(range(len(texts)), text, key=lambda at: texts[at].as_py())

    def _exact(self, value: Any) -> Fraction:
        """A number, a boolean or a moment in units of the column, without rounding."""
        if self._kind != "timestamp":
            return Fraction(value)
        moment: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        passed = moment - _EPOCH
        microseconds = (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds
        if pa.types.is_date32(self._type):
            return Fraction(microseconds, 86_400_000_000)
        unit = "ms" if pa.types.is_date64(self._type) else self._type.unit
        return Fraction(microseconds * _PER_SECOND[unit], 1_000_000)


def encoded(array: pa.Array) -> pa.Array:
    """`array` with texts dictionary-encoded (large strings), halves as floats, all else as it is."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_float16(array.type):
        return array.cast(pa.float32())  # arrow compares no halves
    if pa.types.is_string(array.type):
        array = array.cast(pa.large_string())  # one string array ends at 2 GiB
    return array.dictionary_encode() if pa.types.is_large_string(array.type) else array
