"""Images that a row names by URI: fetched from below one root, and from nowhere else."""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from rayemb import storage
from rayemb.data.sources.base import RawRow

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
THREADS = 16
MAX_BYTES = 1 << 28
"""An image (or a member of a tar) beyond this is not read at all: it bounds the memory of a row."""


class ForbiddenError(Exception):
    """A URI that leads out of the image root."""


def locate(root: str, uri: str, *, links: bool = False) -> str:
    """Where `uri` lies: relative ones start at `root`. Raises ForbiddenError for what is not below it.

    A link inside the root that leads out of it counts as outside, unless `links` are somebody's own.
    """
    root = storage.normalise(root)
    absolute = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) or uri.startswith(("/", "\\"))
    if "\0" in uri:
        raise ForbiddenError("it holds a NUL")
    try:
        whole = storage.normalise(uri) if absolute else f"{root}/{uri}"
    except storage.StorageError as error:
        raise ForbiddenError(error.what) from error
    if not whole.startswith(f"{root}/"):
        raise ForbiddenError("it is not below the image root")
    if ".." in whole.removeprefix(f"{root}/").split("/"):
        raise ForbiddenError("it climbs with `..`")
    if links or root.startswith("s3://"):
        return whole
    real = os.path.realpath(whole)
    if not real.startswith(f"{os.path.realpath(root).rstrip('/')}/"):
        raise ForbiddenError("a link leads out of the image root")
    return real


def fetch(root: str | None, uri: str, links: bool = False) -> bytes | tuple[str, str]:
    """The image at `uri`, or why there is none, as (reason, sentence). Raises StorageError if the store fails."""
    if root is None:
        return "missing_image", f"the row names {uri[:200]!r}, and no image_root is set"
    try:
        place = locate(root, uri, links=links)
        if not place.startswith("s3://") and os.path.exists(place) and not os.path.isfile(place):
            return "missing_image", f"{uri[:200]!r} is no file"  # a pipe would be waited for
        data = storage.read_bytes(place, MAX_BYTES + 1)
    except ForbiddenError as error:
        return "forbidden_uri", f"{uri[:200]!r}: {error}"
    except (storage.MissingError, storage.UnreadableError) as error:
        return "missing_image", f"{uri[:200]!r}: {error.what}"
    if len(data) > MAX_BYTES:
        return "too_large_image", f"{uri[:200]!r} has over {MAX_BYTES:,} bytes"
    return data


def with_images(
    rows: Iterable[tuple[RawRow, str | None]], root: str | None, *, links: bool = False
) -> Iterator[RawRow]:
    """The rows in their order, each with the image that its URI names; several are fetched at once."""
    pending = iter(rows)
    with ThreadPoolExecutor(THREADS) as pool:  # its threads start at the first fetch
        while batch := list(islice(pending, THREADS)):
            found = [uri and pool.submit(fetch, root, uri, links) for _, uri in batch]
            for (row, _), future in zip(batch, found, strict=True):
                if not future:
                    yield row
                    continue
                result = future.result()
                yield replace(row, image=result) if isinstance(result, bytes) else replace(row, problem=result)
