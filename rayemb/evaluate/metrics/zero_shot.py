"""Classification by the names of the classes: their vectors from many sentences, and who is nearest.

Suffixes: P sentences, C classes, N images, D dimensions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.retrieval import _k, hits_at, ranks

SMALLEST = 1e-12


class ZeroShotScores(NamedTuple):
    """`hits[k]` `(N,)` is 1 where the class is among the k nearest; `accuracy` their means; `chance` a random order's.

    `per_class` is the mean over classes of the accuracy within a class at the smallest k: for sets of unequal classes.
    """

    hits: dict[int, NDArray[np.float64]]
    accuracy: dict[int, float]
    per_class: float
    chance: dict[int, float]


def template_problem(templates: Sequence[str]) -> str | None:
    """What is wrong with the first template that has not exactly one `{}`; None where all have."""
    wrong = next((template for template in templates if template.count("{}") != 1), None)
    return None if wrong is None else f"{wrong!r} needs one {{}} for the name"


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The sentences of all classes, class by class, and the class `(P,)` int64 that each is of; P = C · templates.

    Raises MetricError for a template without exactly one `{}`, and where there is no name or no template.
    """
    if not len(names) or not len(templates):
        raise MetricError(f"{len(names)} names and {len(templates)} templates", where="names, templates")
    if problem := template_problem(templates):
        raise MetricError(problem, where="templates")
    # Not str.format: names may hold braces.
    texts = [template.replace("{}", name) for name in names for template in templates]
    return texts, np.repeat(np.arange(len(names), dtype=np.int64), len(templates))


def class_vectors(sentences: NDArray[np.float32], owners: NDArray[np.int64]) -> NDArray[np.float32]:
    """One unit vector a class `(C, D)` float32: each sentence normalised, their mean, normalised again.

    Radford et al. (2021), as CLIP's and open_clip's code have it. To normalise only once gives long vectors a louder
    voice and other figures. Summed in float64, in the order of the sentences.

    Args:
        sentences: `(P, D)` floats, finite; classes may have unequal numbers of them (prompt ensembles).
        owners: `(P,)` integers: the class of each sentence, of 0 .. C-1.

    A class whose sentences cancel, or are zero vectors, keeps the zero vector. Raises MetricError for wrong shapes,
    non-finite vectors, and a class between 0 and the last without a sentence; the message names it.
    """
    x_PD = _unit(as_vectors(sentences, "sentences"))
    owner_P = as_integers(owners, len(x_PD), "owners")
    if not len(x_PD):
        raise MetricError("there are no sentences", where="sentences")
    if owner_P.min() < 0:
        raise MetricError(f"classes count from 0, got {owner_P.min()}", where="owners")
    count_C = np.bincount(owner_P)
    if not count_C.all():
        raise MetricError(f"class {int(np.argmin(count_C > 0))} has no sentence", where="owners")
    starts_C = np.concatenate([[0], np.cumsum(count_C)[:-1]])
    sum_CD = np.add.reduceat(x_PD[np.argsort(owner_P, kind="stable")], starts_C, axis=0)
    vectors: NDArray[np.float32] = _unit(sum_CD / count_C[:, None]).astype(np.float32)
    return vectors


def zero_shot(
    images: NDArray[np.float32],
    classes: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    ks: Sequence[int] = (1, 5),
    block: int = 1024,
) -> ZeroShotScores:
    """Accuracy of images among classes by cosine. Ties count against the model, as in `ranks`.

    Args:
        images: `(N, D)` floats, finite; normalised here.
        classes: `(C, D)` floats: `class_vectors(...)`; normalised here.
        labels: `(N,)` integers in 0 .. C-1.
        ks: cut-offs. At k ≥ C everything is right, and `chance` is 1 too.
        block: images at a time; memory is O(block · C).

    Raises MetricError for wrong shapes, non-finite vectors, no images, one class, and labels that are no class.
    """
    x_ND, c_CD = _unit(as_vectors(images, "images")), _unit(as_vectors(classes, "classes"))
    y_N = as_integers(labels, len(x_ND), "labels")
    cuts = sorted({_k(k) for k in ks})
    if not cuts or not len(x_ND):
        raise MetricError(f"{len(cuts)} cut-offs, {len(x_ND)} images: there is no figure", where="ks, images")
    if len(c_CD) < 2:
        raise MetricError(f"{len(c_CD)} class is no choice", where="classes", fix="bring two classes or more")
    strange = np.flatnonzero((y_N < 0) | (y_N >= len(c_CD)))
    if len(strange):
        raise MetricError(
            f"{y_N[strange[0]]} in row {strange[0]} is no class", where="labels", fix=f"0 to {len(c_CD) - 1}"
        )
    # float64 vectors: `ranks` takes any float and sums in float64.
    rank_N = ranks(x_ND, c_CD, y_N, np.arange(len(c_CD)), block=block)  # type: ignore[arg-type]
    hits = {k: hits_at(rank_N, k) for k in cuts}
    _, class_N = np.unique(y_N, return_inverse=True)
    within = np.bincount(class_N, weights=hits[cuts[0]]) / np.bincount(class_N)
    return ZeroShotScores(
        hits,
        {k: float(hit.mean()) for k, hit in hits.items()},
        float(within.mean()),
        {k: min(1.0, k / len(c_CD)) for k in cuts},
    )


def class_probabilities(
    images: NDArray[np.float32], classes: NDArray[np.float32], *, scale: float = 100.0
) -> NDArray[np.float64]:
    """The softmax `(N, C)` float64 of `scale` · cosine, for the calibration of zero-shot predictions.

    CLIP's learned scale is 100; a model's own is the inverse of its temperature, and the figures depend on it. Images
    `(N, D)` and classes `(C, D)` are normalised here. Raises MetricError for wrong shapes and non-finite vectors.
    """
    x_ND, c_CD = _unit(as_vectors(images, "images")), _unit(as_vectors(classes, "classes"))
    if x_ND.shape[1] != c_CD.shape[1]:
        raise MetricError(f"images have {x_ND.shape[1]} dimensions, classes {c_CD.shape[1]}", where="classes")
    if not (np.isfinite(scale) and scale > 0) or not len(c_CD):
        raise MetricError(f"no probabilities of {len(c_CD)} classes at scale {scale}", where="scale, classes")
    s_NC = scale * (x_ND @ c_CD.T)
    e_NC = np.exp(s_NC - s_NC.max(axis=1, keepdims=True))
    return np.asarray(e_NC / e_NC.sum(axis=1, keepdims=True))


def _unit(x_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), SMALLEST))
