"""Diagnostics: what a space looks like, mostly without labels. NumPy arrays in, figures out; no Ray, no model.

Each is a function of its own file. `DIAGNOSTICS` has those that need no more than a table of vectors and what belongs
to its rows, by name: `DIAGNOSTICS["rankme"].run(Inputs(vectors=x))`. `possible(inputs)` says which can run.
"""

from collections.abc import Mapping

from rayemb.evaluate.diagnostics.collapse import collapse, mean_cosine, mean_cosine_of
from rayemb.evaluate.diagnostics.hubness import Hubness, hubness
from rayemb.evaluate.diagnostics.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension
from rayemb.evaluate.diagnostics.label_sharpness import LabelSharpness, label_sharpness
from rayemb.evaluate.diagnostics.length_collapse import LengthCollapse, high_frequency, length_collapse
from rayemb.evaluate.diagnostics.lidar import lidar
from rayemb.evaluate.diagnostics.modality_gap import ModalityGap, modality_gap
from rayemb.evaluate.diagnostics.rankme import Spread, rankme, rankme_of, spread
from rayemb.evaluate.diagnostics.registry import Diagnostic, Inputs, entry, registry
from rayemb.evaluate.diagnostics.schur import SchurEntropy, residual_map, residualize, schur_entropy
from rayemb.evaluate.diagnostics.topological import Separability, persistence, plateau, separability
from rayemb.evaluate.diagnostics.uniformity import (
    alignment,
    negative_entropy,
    relative_penalties,
    tolerance,
    uniformity,
    uniformity_sum,
)
from rayemb.evaluate.diagnostics.utilisation import Utilisation, utilisation

DIAGNOSTICS: Mapping[str, Diagnostic] = registry(
    # name, needs, measure (a float, or a NamedTuple with the main figure first), better, source
    entry("rankme", "vectors", lambda i: rankme(i.need("vectors")), "higher", "S066: Garrido et al., 2023"),
    entry("lidar", "views", lambda i: lidar(i.need("views")), "higher", "Thilak et al., 2023"),
    entry("uniformity", "vectors", lambda i: uniformity(i.unit()), "lower", "S046: Wang & Isola, 2020"),
    entry("alignment", "vectors pairs", lambda i: alignment(i.unit(), i.unit("pairs")), "lower", "S046"),
    entry("tolerance", "vectors labels", lambda i: tolerance(i.unit(), i.need("labels")), "higher", "S046"),
    entry("mean_cosine", "vectors", lambda i: mean_cosine(i.unit()), "lower", "Ethayarajh, 2019"),
    entry("hubness", "vectors", lambda i: hubness(i.unit()), "lower", "Radovanović et al., 2010"),
    entry("separability", "vectors", lambda i: separability(i.unit()), "higher", "S072: Ghalyan et al., 2023"),
    entry("intrinsic_dimension", "vectors", lambda i: intrinsic_dimension(i.unit()), "neither", "S070"),
    entry("label_sharpness", "vectors labels", lambda i: label_sharpness(i.unit(), i.need("labels")), "lower", "S070"),
    entry("modality_gap", "vectors pairs", lambda i: modality_gap(i.unit(), i.unit("pairs")), "lower", "Liang et al."),
    entry("schur_entropy", "vectors pairs", lambda i: schur_entropy(i.unit(), i.unit("pairs")), "neither", "S107"),
    entry("length_collapse", "vectors texts", lambda i: length_collapse(i.unit(), i.lengths()), "lower", "S183"),
    entry("utilisation", "vectors train", lambda i: utilisation(i.unit(), i.unit("train")), "lower", "S013"),
)


def possible(inputs: Inputs) -> list[str]:
    """The names of the diagnostics whose needs `inputs` meets, in the registry's order."""
    given = inputs.given()
    return [name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.needs <= given]


__all__ = [
    "DIAGNOSTICS",
    "Diagnostic",
    "Hubness",
    "Inputs",
    "IntrinsicDimension",
    "LabelSharpness",
    "LengthCollapse",
    "ModalityGap",
    "SchurEntropy",
    "Separability",
    "Spread",
    "Utilisation",
    "alignment",
    "collapse",
    "high_frequency",
    "hubness",
    "intrinsic_dimension",
    "label_sharpness",
    "length_collapse",
    "lidar",
    "mean_cosine",
    "mean_cosine_of",
    "modality_gap",
    "negative_entropy",
    "persistence",
    "plateau",
    "possible",
    "rankme",
    "rankme_of",
    "relative_penalties",
    "residual_map",
    "residualize",
    "schur_entropy",
    "separability",
    "spread",
    "tolerance",
    "uniformity",
    "uniformity_sum",
    "utilisation",
]
