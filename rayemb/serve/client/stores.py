"""What the stores of frameworks want beyond the clients: conditions in the service's language, all items that pass."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from rayemb.serve.client.calls import Item
from rayemb.serve.client.sync import Client
from rayemb.serve.errors import ServeError

Filter = Mapping[str, Any]

_BOUNDS = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
# A search as wide as the service allows: then fewer hits than asked for are all that there are.
_WIDEST: Mapping[str, Any] = {"effort": {"nprobe": 65_536, "ef_search": 4096}}


def condition(column: str, operator: str, value: Any) -> Filter:
    """A comparison of a payload column, `==`, `!=`, `>`, `>=`, `<`, `<=`, `in` or `nin`, in the service's language.

    None stands for a missing value. Bounds are numbers or moments (datetime, or a text of ISO 8601).
    Raises ServeError for another operator or a value that it does not take.
    """
    if operator in _BOUNDS:
        # Nothing is more or less than what is missing.
        return {column: {"in": []} if value is None else {_BOUNDS[operator]: _bound(column, value)}}
    if operator in ("in", "nin"):
        if not isinstance(value, list):
            raise ServeError(f"`{operator}` takes a list, got {value!r}", where=column)
        found: Filter = {column: {"in": [_value(column, each) for each in value if each is not None]}}
        if None in value:
            found = {"or": [found, {column: None}]}
        return found if operator == "in" else {"not": found}
    if operator not in ("==", "!="):
        raise ServeError(f"the service has no operator `{operator}`", where=column)
    found = {column: None if value is None else _value(column, value)}
    return found if operator == "==" else {"not": found}


def joined(operator: str, parts: Sequence[Filter]) -> Filter:
    """`and` or `or` over one or more filters."""
    return parts[0] if len(parts) == 1 else {operator: list(parts)}


@contextlib.contextmanager
def endpoint() -> Iterator[None]:
    """Says what a 404 means here: a service that items cannot be written to."""
    try:
        yield
    except ServeError as error:
        if error.status != 404:
            raise
        raise ServeError(
            "this service takes no writes and gives no items by id",
            where=error.where,
            fix="serve it with serve.live=true",
            status=404,
            request_id=error.request_id,
        ) from error


def put(client: Client, items: Sequence[Item], model: str | None) -> None:
    """Puts items in, in as many requests as the service's `max_batch` makes of them; earlier ones stay if one fails."""
    most = client.index().max_batch if items else 1
    with endpoint():
        for start in range(0, len(items), most):
            client.upsert(items[start : start + most], model=model)


def take(client: Client, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The payloads of items by their ids; without those that there are not."""
    with endpoint():
        return client.get(ids) if ids else {}


def remove(client: Client, ids: Sequence[str]) -> int:
    """Takes items out; the number of those that there were."""
    with endpoint():
        return client.delete(ids) if ids else 0


def passing(client: Client, filter: Filter | None) -> dict[str, dict[str, Any]]:
    """The payloads of all items that pass, by their ids.

    The service lists nothing, so this is a search, and `max_k` or more items are too many. Raises ServeError for them.
    """
    found, whole = _page(client, filter)
    if not whole:
        told = f"{len(found)} items or more pass, and a search gives no more"
        raise ServeError(told, where="filter", fix="let fewer pass, or serve with a larger serve.max_k")
    return found


def remove_passing(client: Client, filter: Filter | None) -> int:
    """Takes all items out that pass, however many; their number."""
    count, whole = 0, False
    while not whole:
        found, whole = _page(client, filter)
        gone = remove(client, list(found))
        count += gone
        if found and not gone:
            raise ServeError("items are found that are not there to delete", where="filter", fix="try again")
    return count


def _page(client: Client, filter: Filter | None) -> tuple[dict[str, dict[str, Any]], bool]:
    """As many items that pass as one search gives, and whether they are all."""
    about = client.index()
    # Any direction does.
    vector = np.eye(1, about.dim, dtype=np.float32)
    found = client.search_batch(
        vector, model=about.model_digest, k=about.max_k, filter=filter or None, payload=True, **_WIDEST
    )
    if found.partial:
        raise ServeError("shards are missing, and what they have with them", where=", ".join(found.missing_shards))
    assert found.payload is not None  # asked for
    return dict(zip(found.ids[0], found.payload[0], strict=True)), len(found.ids[0]) < about.max_k


def _bound(column: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str):
        try:
            datetime.fromisoformat(value)
        except ValueError as error:
            raise ServeError(f"a bound is a number or a moment (ISO 8601), got {value!r}", where=column) from error
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ServeError(f"a bound is a number or a moment (ISO 8601), got {value!r}", where=column)
    return value


def _value(column: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if not isinstance(value, str | bool | int | float):
        raise ServeError(f"a value is a text, a number or a boolean, got {value!r}", where=column)
    return value
