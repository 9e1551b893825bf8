"""Diagnostics: what a space looks like, mostly without labels. NumPy arrays in, figures out; no Ray, no model.

Each is a function of its own file. `DIAGNOSTICS` has those that need no more than a table of vectors and what belongs
to its rows, by name: `DIAGNOSTICS["rankme"].run(Inputs(vectors=x))`. `possible(inputs)` says which can run.
"""

from collections.abc import Mapping

from rayemb.evaluate.diagnostics.collapse import collapse, mean_cosine, mean_cosine_of
from rayemb.evaluate.diagnostics.rankme import Spread, rankme, rankme_of, spread
from rayemb.evaluate.diagnostics.registry import Diagnostic, Inputs, entry, registry
from rayemb.evaluate.diagnostics.uniformity import (
    alignment,
    negative_entropy,
    relative_penalties,
    tolerance,
    uniformity,
    uniformity_sum,
)

DIAGNOSTICS: Mapping[str, Diagnostic] = registry(
    # name, needs, measure (a float, or a NamedTuple with the main figure first), better, source
    entry("rankme", "vectors", lambda i: rankme(i.need("vectors")), "higher", "S066: Garrido et al., 2023"),
    entry("uniformity", "vectors", lambda i: uniformity(i.unit("vectors")), "lower", "S046: Wang & Isola, 2020"),
    entry("alignment", "vectors pairs", lambda i: alignment(i.unit("vectors"), i.unit("pairs")), "lower", "S046"),
    entry("tolerance", "vectors labels", lambda i: tolerance(i.unit("vectors"), i.need("labels")), "higher", "S046"),
    entry("mean_cosine", "vectors", lambda i: mean_cosine(i.unit("vectors")), "lower", "anisotropy: Ethayarajh, 2019"),
)


def possible(inputs: Inputs) -> list[str]:
    """The names of the diagnostics whose needs `inputs` meets, in the registry's order."""
    given = inputs.given()
    return [name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.needs <= given]


__all__ = [
    "DIAGNOSTICS",
    "Diagnostic",
    "Inputs",
    "Spread",
    "alignment",
    "collapse",
    "mean_cosine",
    "mean_cosine_of",
    "negative_entropy",
    "possible",
    "rankme",
    "rankme_of",
    "relative_penalties",
    "spread",
    "tolerance",
    "uniformity",
    "uniformity_sum",
]
