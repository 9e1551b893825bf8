"""What no log takes: each named by its item and field."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayemb.data.embeddings import embeddings_schema
from rayemb.index import UpdateError
from rayemb.index.live.items import MAX_ID_BYTES, deletes, upserts
from rayemb.index.live.log import DELETED

POINT = pa.struct([("lat", pa.float64()), ("lon", pa.float64())])
PAYLOAD = {
    "text": pa.string(),
    "size": pa.int32(),
    "big": pa.int64(),
    "price": pa.float32(),
    "sold": pa.bool_(),
    "added": pa.timestamp("us"),
    "tags": pa.list_(pa.string()),
    "place": POINT,
}
UNIT = np.eye(4, dtype=np.float32)


def schema(*, images: bool = False) -> pa.Schema:
    fields = [pa.field(name, kind) for name, kind in PAYLOAD.items()]
    whole = embeddings_schema(fields, 4, "digest", images=images)
    whole = whole.set(1, pa.field("vector", pa.list_(pa.float32(), 4)))
    return whole.insert(1, pa.field(DELETED, pa.bool_(), nullable=False))


def write(*payload: dict[str, Any], **given: Any) -> pa.Table:
    count = max(1, len(payload))
    ids, vectors = [f"i{i}" for i in range(count)], UNIT[:count]
    return upserts(schema(), given.get("ids", ids), given.get("vectors", vectors), payload or None, given.get("images"))


def test_values_come_out_as_they_went_in() -> None:
    row = {
        "text": "häuser\x00",
        "size": -(2**31),
        "big": 2**63 - 1,
        "price": 0.5,
        "sold": False,
        "added": "2026-01-31T12:00:00+02:00",
        "tags": ["a", None],
        "place": {"lat": 1, "lon": 2.5},
    }
    found = write(row, {"size": 3.0}).to_pylist()
    moment = datetime(2026, 1, 31, 10, tzinfo=UTC).replace(tzinfo=None)
    assert found[0] == {"id": "i0", DELETED: False, "vector": [1, 0, 0, 0], **row, "added": moment}
    assert found[1] == {"id": "i1", DELETED: False, "vector": [0, 1, 0, 0], **dict.fromkeys(row), "size": 3}


def test_vectors_are_scaled_to_unit_length_and_unit_vectors_are_left_alone() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    given = np.concatenate([x, x * [[1e-5], [3], [1e30]]])
    rows = write(*[{}] * 6, vectors=given)
    found = np.array(rows.column("vector").to_pylist(), np.float32)
    assert found[:3].tolist() == x.tolist()
    np.testing.assert_allclose(found[3:], x, atol=1e-6)


def test_of_an_id_that_comes_twice_the_last_counts_and_keeps_its_place() -> None:
    rows = write({"size": 0}, {"size": 1}, {"size": 2}, ids=["a", "b", "a"])
    assert [(row["id"], row["size"]) for row in rows.to_pylist()] == [("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ({"nobody": 1}, "nobody"),
        ({"text": 5}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"size": "5"}, "size"),
        ({"size": True}, "size"),
        ({"size": 1.5}, "size"),
        ({"size": 2**31}, "size"),
        ({"big": 2**63}, "big"),
        ({"big": 1e300}, "big"),
        ({"price": float("nan")}, "price"),
        ({"price": "1"}, "price"),
        ({"price": 10**400}, "price"),
        ({"price": 1e300}, "price"),
        ({"sold": 1}, "sold"),
        ({"added": "yesterday"}, "added"),
        ({"added": 5}, "added"),
        ({"tags": "a"}, "tags"),
        ({"tags": ["a", 1]}, r"tags\[1\]"),
        ({"place": {"lat": 1}}, "place"),
        ({"place": {"lat": 1, "lon": "2"}}, r"place\.lon"),
    ],
)
def test_a_payload_that_does_not_fit_is_named(payload: dict[str, Any], where: str) -> None:
    with pytest.raises(UpdateError, match=rf"^items\[1\]\.payload\.{where}: "):
        write({}, payload)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (UNIT[:2, :3], r"expected vectors of shape \(2, 4\), got \(2, 3\)"),
        (UNIT[:3], r"got \(3, 4\)"),
        ([[1, 2, 3, 4], [1, 2]], "rows of numbers"),
        ([[1, 2, 3, 4], ["a", 0, 0, 0]], "rows of numbers"),
        ([[1, 0, 0, 0], [0, 0, 0, 0]], r"items\[1\]\.vector: the vector is zero"),
        ([[1, 0, 0, 0], [0, np.nan, 0, 0]], r"items\[1\]\.vector: the vector holds NaN"),
        ([[1, 0, 0, 0], [0, np.inf, 0, 0]], r"items\[1\]\.vector: the vector holds NaN or infinity"),
        ([[1, 0, 0, 0], [1e300, 1e300, 0, 0]], r"items\[1\]\.vector: the vector is too long"),
    ],
)
def test_a_vector_that_cannot_be_compared_is_named(vectors: Any, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        write({}, {}, vectors=vectors)


@pytest.mark.parametrize("row_id", ["", 5, None, "\ud800", "x" * (MAX_ID_BYTES + 1), "ä" * MAX_ID_BYTES])
def test_an_id_that_is_none_is_named(row_id: Any) -> None:
    for attempt in (lambda ids: write({}, {}, ids=ids), lambda ids: deletes(schema(), ids)):
        with pytest.raises(UpdateError, match=r"^items\[1\]\.id: "):
            attempt(["a", row_id])
    assert deletes(schema(), ["a", "x" * MAX_ID_BYTES, "a"]).num_rows == 2


def test_nothing_at_all_and_images_that_are_not_kept_are_refused() -> None:
    for attempt in (lambda: deletes(schema(), []), lambda: upserts(schema(), [], np.zeros((0, 4)), None, None)):
        with pytest.raises(UpdateError, match="at least one item"):
            attempt()
    with pytest.raises(UpdateError, match="the embeddings keep no images"):
        write({}, images=[b"x"])
    with pytest.raises(UpdateError, match="payload: 1 for 2 ids"):
        upserts(schema(), ["a", "b"], UNIT[:2], [{}], None)
    kept = upserts(schema(images=True), ["a"], UNIT[:1], None, [b"x"], {"text"})
    assert (kept.column("image").to_pylist(), kept.column("text").to_pylist()) == ([b"x"], [""])
    with pytest.raises(UpdateError, match=r"items\[0\]\.payload\.size: a value is required"):
        upserts(schema(), ["a"], UNIT[:1], None, None, {"size"})
