"""Keys: 63-bit hashes by which equal contents are known to be equal, in every process and on every machine."""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def keys_of(contents: Iterable[str | bytes]) -> NDArray[np.int64]:
    """A key `(N,)` int64 >= 0 for each content; different contents share one with probability 2**-63."""
    raw = b"".join(
        hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=8).digest()
        for content in contents
    )
    return (np.frombuffer(raw, dtype="<u8") >> np.uint64(1)).astype(np.int64)


def text_keys(texts: Iterable[str]) -> NDArray[np.int64]:
    """Keys `(N,)` int64 of texts as a reader sees them: case, Unicode form and white space make no difference."""
    return keys_of(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
