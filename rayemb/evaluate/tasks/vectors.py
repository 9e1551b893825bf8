"""What tasks ask of an encoder, and what they look at in its vectors."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.errors import RayembError
from rayemb.evaluate.diagnostics import DIAGNOSTICS, Inputs
from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import MetricError

logger = logging.getLogger(__name__)

DIAGNOSED = 4096
"""Rows at most: several diagnostics look at all pairs of them."""


def text_vectors(
    encoder: Encoder, texts: Sequence[str], where: str, *, kind: Side = "text", names: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """The vectors `(N, D)` of texts. Raises EvaluateError naming the first that has none (`names`: ids, to name it)."""
    return _checked(encoder.texts(texts, kind=kind), encoder, where, names or [repr(text[:60]) for text in texts])


def image_vectors(encoder: Encoder, images: Sequence[bytes], where: str, names: Sequence[str]) -> NDArray[np.float32]:
    """The vectors `(N, D)` of pictures; as `text_vectors`."""
    try:
        return _checked(encoder.images(images), encoder, where, names)
    except EvaluateError:
        raise
    except RayembError as error:
        raise EvaluateError(f"{encoder.name} cannot encode the pictures: {error.what}", where=where) from error


def _checked(found: Any, encoder: Encoder, where: str, names: Sequence[str]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = np.asarray(found, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise EvaluateError(f"{encoder.name} gives {vectors.shape} for {len(names):,} inputs", where=where)
    good = np.isfinite(vectors).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise EvaluateError(f"{encoder.name} gives a vector that is not finite for {names[row]}", where=where)
    return vectors


def diagnose(
    names: Sequence[str],
    *,
    seed: int,
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64] | None = None,
    pairs: NDArray[np.float32] | None = None,
    texts: Sequence[str] | None = None,
) -> dict[str, float]:
    """The figures of diagnostics by name, on at most 4,096 rows by seed.

    One that has no figure for these vectors (a constant encoder's, say) is left out, with a line in the log.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:DIAGNOSED])
    inputs = Inputs(
        vectors=vectors[rows],
        labels=None if labels is None else labels[rows],
        pairs=None if pairs is None else pairs[rows],
        texts=None if texts is None else tuple(texts[row] for row in rows),
    )
    figures: dict[str, float] = {}
    for name in names:
        try:
            figures |= DIAGNOSTICS[name].run(inputs)
        except MetricError as error:
            logger.warning("no %s: %s", name, error)
    return figures


def numbered(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct names in the order of the alphabet, and each one's number `(N,)`."""
    known, numbers = np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)
    return known.tolist(), numbers.astype(np.int64)
