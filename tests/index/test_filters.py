"""The filter language against Python's own comparisons, row by row."""

import json
import math
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.index import FilterError
from rayemb.index.filters import MAX_CONDITIONS, MAX_DEPTH, MAX_VALUES, Condition, canonical, parse_filter
from rayemb.index.payload import Payload

TEXTS = ["", "a", "ab", "abc", "b", "é", "éa", "😀", "a b"]
MOMENTS = [datetime(2026, 1, day, 12, 30, second, tzinfo=UTC) for day in (1, 2, 31) for second in (0, 1)]
TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), st.sampled_from(TEXTS)),
    "coded": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["x", "y"])),
    "small": (pa.int8(), st.integers(-128, 127)),
    "big": (pa.uint64(), st.sampled_from([0, 1, 2**53 + 1, 2**64 - 1])),
    "whole": (pa.int64(), st.integers(-5, 5)),
    "real": (pa.float64(), st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 5e-324, 0.1, 2.0, 1e300, math.nan])),
    "flag": (pa.bool_(), st.booleans()),
    "at": (pa.timestamp("s", tz="UTC"), st.sampled_from(MOMENTS)),
    "day": (pa.date32(), st.sampled_from([date(2025, 12, 31), date(2026, 1, 1), date(2026, 1, 2)])),
    "tags": (pa.list_(pa.string()), st.lists(st.sampled_from(TEXTS), max_size=3)),
    "sizes": (pa.large_list(pa.int32()), st.lists(st.integers(-3, 3), max_size=3)),
}
NUMBERS = ("small", "big", "whole", "real", "sizes")
BOUNDS = st.sampled_from([-129, -5, -1.5, 0, 0.5, 1, 2**53, 127, 2**63, 1e300, -1e300, 2**70])
TIMES = st.sampled_from(["2025-12-31", "2026-01-02", "2026-01-02T12:30:00Z", "2026-01-31T13:30:00.5+01:00"])


def _value(name: str) -> st.SearchStrategy[Any]:
    _kind, values = TYPES[name]
    if name in ("at", "day"):
        return TIMES
    inner = {"tags": st.sampled_from(TEXTS), "sizes": st.integers(-3, 3)}.get(name, values)
    return inner.filter(lambda value: not isinstance(value, float) or math.isfinite(value))


@st.composite
def _condition(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(TYPES)))
    choices: list[st.SearchStrategy[Any]] = [
        _value(name),
        st.none(),
        st.fixed_dictionaries({"in": st.lists(_value(name), max_size=4)}),
        st.fixed_dictionaries({"exists": st.booleans()}),
    ]
    if name in NUMBERS or name in ("at", "day"):
        bound = TIMES if name in ("at", "day") else BOUNDS
        ranges = st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), bound, min_size=1, max_size=4)
        choices += [ranges, ranges]
    if name in ("text", "coded", "tags"):
        choices.append(st.fixed_dictionaries({"prefix": st.sampled_from([*TEXTS, "x", "zz"])}))
    return {name: draw(st.one_of(choices))}


FILTERS = st.recursive(
    _condition(),
    lambda inner: (
        st.fixed_dictionaries({"and": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"or": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"not": inner})
        | st.tuples(inner, inner).map(lambda pair: {**pair[0], **pair[1]})
    ),
    max_leaves=5,
)


def _comparable(value: Any) -> Any:
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    return value


def _meets(name: str, held: Any, operator: str, operand: Any) -> bool:
    if operator == "exists":
        return (held is not None) == operand
    if held is None:
        return False
    if isinstance(held, list):
        return any(_meets(name, each, operator, operand) for each in held)
    moments = name in ("at", "day")
    left = _comparable(held) if moments else held
    if operator == "in":
        return any(left == (_comparable(each) if moments else each) for each in operand)
    if operator == "prefix":
        return bool(left.startswith(operand))
    right = _comparable(operand) if moments else operand
    return bool({"gt": left > right, "gte": left >= right, "lt": left < right, "lte": left <= right}[operator])


def _passes(row: dict[str, Any], document: dict[str, Any]) -> bool:
    for key, value in document.items():
        if key == "and":
            ok = all(_passes(row, each) for each in value)
        elif key == "or":
            ok = any(_passes(row, each) for each in value)
        elif key == "not":
            ok = not _passes(row, value)
        elif value is None:
            ok = row[key] is None
        elif isinstance(value, dict):
            ok = all(_meets(key, row[key], operator, operand) for operator, operand in value.items())
        else:
            ok = _meets(key, row[key], "in", [value])
        if not ok:
            return False
    return True


def _payload(rows: list[dict[str, Any]]) -> Payload:
    columns = {name: pa.array([row[name] for row in rows], kind) for name, (kind, _) in TYPES.items()}
    return Payload(pa.table({"id": pa.array([f"r{i}" for i in range(len(rows))], pa.string()), **columns}))


ROWS = st.lists(st.fixed_dictionaries({name: st.none() | values for name, (_, values) in TYPES.items()}), max_size=12)


@settings(max_examples=400, deadline=None)
@given(ROWS, FILTERS)
def test_a_mask_is_what_python_says_row_by_row(rows: list[dict[str, Any]], document: dict[str, Any]) -> None:
    # Through JSON, as a request brings it.
    mask = _payload(rows).mask(json.loads(json.dumps(document)))
    assert mask.dtype == np.bool_
    assert mask.tolist() == [_passes(row, document) for row in rows]


@settings(max_examples=30, deadline=None)
@given(FILTERS)
def test_what_is_common_is_compared_and_what_is_rare_is_looked_up_alike(document: dict[str, Any]) -> None:
    # Intervals of few rows and of many take different ways.
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [dict.fromkeys(TYPES)]
    for i in range(200):
        rows.append(
            {
                "text": TEXTS[i % 9], "coded": "xy"[i % 2], "small": int(rng.integers(-128, 128)), "big": i % 3,
                "whole": i % 3 - 1, "real": float(i % 4), "flag": i % 50 == 0, "at": MOMENTS[i % 6],
                "day": date(2026, 1, 1) + timedelta(i % 3), "tags": TEXTS[: i % 3], "sizes": [i % 7 - 3],
            }
        )  # fmt: skip
    assert _payload(rows).mask(document).tolist() == [_passes(row, document) for row in rows]


BAD: list[tuple[Any, str, str]] = [
    ([], "filter", "expected an object"),
    ("a", "filter", "expected an object"),
    ({"and": {}}, "filter.and", "a list of one or more filters"),
    ({"and": []}, "filter.and", "a list of one or more filters"),
    ({"or": [{"small": 1}, 5]}, "filter.or[1]", "expected an object"),
    ({"or": [{}]}, "filter.or[0]", "at least one condition"),
    ({"not": {}}, "filter.not", "at least one condition"),
    ({"not": [{"small": 1}]}, "filter.not", "expected an object"),
    ({"small": [1, 2]}, "filter.small", "expected a value or an object of operators"),
    ({"small": {}}, "filter.small", "at least one operator"),
    ({"small": {"eq": 1}}, "filter.small.eq", "no such operator.*equality is the plain value"),
    ({"small": {"$gt": 1}}, "filter.small.$gt", "operators: in, gt, gte, lt, lte, prefix, exists, within"),
    ({"small": {"gt": None}}, "filter.small.gt", "got null"),
    ({"small": {"gt": True}}, "filter.small.gt", "a bound is"),
    ({"small": {"gt": [1]}}, "filter.small.gt", "a bound is"),
    ({"small": {"in": 1}}, "filter.small.in", "valid list"),
    ({"small": {"in": [1, None]}}, "filter.small.in[1]", "a value is"),
    ({"small": {"in": [1] * (MAX_VALUES + 1)}}, "filter.small.in", "at most 10000"),
    ({"small": {"exists": 1}}, "filter.small.exists", "boolean"),
    ({"text": {"prefix": 1}}, "filter.text.prefix", "string"),
    ({"place": {"within": {"lat": 91.0, "lon": 0.0, "km": 1.0}}}, "filter.place.within.lat", "less than or equal"),
    ({"place": {"within": {"lat": 1.0, "lon": 0.0}}}, "filter.place.within.km", "required"),
    ({"nosuch": {"gt": 1}}, "filter.nosuch", "no such field. fields: text, coded"),
    ({"id": "r1"}, "filter.id", "no such field"),
    ({"text": 1}, "filter.text", "expected a text, got 1"),
    ({"small": True}, "filter.small", "expected a whole number, got True"),
    ({"small": 1.0}, "filter.small", "expected a whole number, got 1.0"),
    ({"small": {"in": [1, "2"]}}, r"filter.small.in[1]", "expected a whole number, got '2'"),
    ({"flag": 1}, "filter.flag", "expected true or false, got 1"),
    ({"real": "1"}, "filter.real", "expected a finite number, got '1'"),
    ({"real": math.nan}, "filter.real", "expected a finite number, got nan"),
    ({"real": {"gt": math.inf}}, "filter.real.gt", "finite"),
    ({"text": {"gt": "a"}}, "filter.text.gt", "has no range"),
    ({"flag": {"lt": 1}}, "filter.flag.lt", "has no range"),
    ({"at": 5}, "filter.at", "expected a timestamp as text, got 5"),
    ({"at": {"gte": "yesterday"}}, "filter.at.gte", "no timestamp of ISO 8601. write"),
    ({"small": {"gt": "2026-01-01"}}, "filter.small.gt", "expected a whole number"),
    ({"small": {"prefix": "a"}}, "filter.small.prefix", "a prefix is of texts"),
    ({"text": {"within": {"lat": 1.0, "lon": 1.0, "km": 1.0}}}, "filter.text.within", "no point"),
    ({"sizes": "a"}, "filter.sizes", "expected a whole number"),
]


@pytest.mark.parametrize(("document", "where", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named_with_its_path(document: Any, where: str, message: str) -> None:
    with pytest.raises(FilterError, match=message) as caught:
        _payload([]).mask(document)
    assert caught.value.where == where


def test_filter_bombs_are_refused_before_they_are_answered() -> None:
    deep: dict[str, Any] = {"small": 1}
    for _ in range(MAX_DEPTH):
        deep = {"not": deep}
    with pytest.raises(FilterError, match="nested deeper than 16"):
        parse_filter(deep)
    assert parse_filter(deep["not"])
    for _ in range(100_000):
        deep = {"not": deep}
    with pytest.raises(FilterError, match="nested deeper"):
        parse_filter(deep)
    with pytest.raises(FilterError, match="nested deeper"):
        canonical(deep)
    parse_filter({"or": [{"small": i} for i in range(MAX_CONDITIONS)]})
    with pytest.raises(FilterError, match="more than 256 conditions") as caught:
        parse_filter({"or": [{"small": i} for i in range(MAX_CONDITIONS + 1)]})
    assert caught.value.where == "filter.or[256].small"


def test_a_filter_without_conditions_passes_all_and_an_empty_list_of_values_none() -> None:
    payload = Payload(pa.table({"id": ["a", "b"], "n": [1, None]}))
    assert payload.mask({}).tolist() == [True, True]
    assert payload.mask({"n": {"in": []}}).tolist() == [False, False]


def test_the_canonical_text_tells_filters_apart_and_not_the_order_of_their_keys() -> None:
    assert canonical({"a": 1, "b": {"gt": 1, "lt": 2}}) == canonical({"b": {"lt": 2, "gt": 1}, "a": 1})
    different = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"a": math.nan}, {"not": {"a": 1}}]
    assert len({canonical(each) for each in different}) == len(different)
    with pytest.raises(FilterError, match="a JSON object"):
        canonical({"a": object()})


def test_points_within_a_distance_are_those_of_the_spherical_law_of_cosines() -> None:
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(-90, 90, 400), rng.uniform(-180, 180, 400)
    points = [{"lat": a, "lon": b} for a, b in zip(lat.tolist(), lon.tolist(), strict=True)]
    payload = Payload(
        pa.table({"id": [str(i) for i in range(402)],
                  "place": pa.array([*points, None, {"lat": None, "lon": 1.0}],
                                    pa.struct({"lat": pa.float64(), "lon": pa.float64()}))})
    )  # fmt: skip
    for at_lat, at_lon, km in [(52.5, 13.4, 3000.0), (0.0, 180.0, 5000.0), (90.0, 0.0, 2000.0), (-45.0, -170.0, 1.0)]:
        a, b = math.radians(at_lat), np.radians(lat)
        cosine = math.sin(a) * np.sin(b) + math.cos(a) * np.cos(b) * np.cos(np.radians(lon - at_lon))
        expected = (np.arccos(np.clip(cosine, -1, 1)) * 6371.0088 <= km).tolist()
        mask = payload.mask({"place": {"within": {"lat": at_lat, "lon": at_lon, "km": km}}})
        assert mask.tolist() == [*expected, False, False]


def test_columns_that_cannot_be_compared_are_still_there_or_not() -> None:
    payload = Payload(pa.table({"id": ["a", "b"], "odd": pa.array([{"x": 1}, None])}))
    assert payload.mask({"odd": None}).tolist() == [False, True]
    with pytest.raises(FilterError, match="cannot be compared"):
        payload.mask({"odd": "x"})


def test_every_operator_is_documented() -> None:
    properties = Condition.model_json_schema()["properties"]
    assert list(properties) == ["in", "gt", "gte", "lt", "lte", "prefix", "exists", "within"]
    assert all(each.get("description") for each in properties.values())
