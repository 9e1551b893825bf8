"""Diagnostics: what a space looks like, mostly without labels. NumPy arrays in, figures out; no Ray, no model.

Each is a function of its own file. `DIAGNOSTICS` has those that need no more than a table of vectors and what belongs
to its rows, by name: `DIAGNOSTICS["rankme"].run(Inputs(vectors=x))`. `possible(inputs)` says which can run.
"""

from collections.abc import Mapping
from typing import Any

from rayemb.evaluate.diagnostics.cka import linear_cka
from rayemb.evaluate.diagnostics.collapse import collapse, mean_cosine, mean_cosine_of
from rayemb.evaluate.diagnostics.convergent import (
    Convergence,
    SparsePrediction,
    SpectralOverlap,
    UnitMatching,
    convergent_learning,
    sparse_prediction,
    spectral_overlap,
    unit_matching,
)
from rayemb.evaluate.diagnostics.graph_reconstruction import GraphReconstruction, Hop, graph_reconstruction
from rayemb.evaluate.diagnostics.hubness import Hubness, hubness
from rayemb.evaluate.diagnostics.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension
from rayemb.evaluate.diagnostics.label_sharpness import LabelSharpness, label_sharpness
from rayemb.evaluate.diagnostics.length_collapse import LengthCollapse, high_frequency, length_collapse
from rayemb.evaluate.diagnostics.lidar import lidar
from rayemb.evaluate.diagnostics.limit import LimitReport, LimitTask, limit_recall, limit_report, limit_task
from rayemb.evaluate.diagnostics.limit_free import (
    Free,
    critical_n,
    cyclic_embeddings,
    free_embeddings,
    limit_sets,
    reachable,
)
from rayemb.evaluate.diagnostics.modality_gap import ModalityGap, modality_gap
from rayemb.evaluate.diagnostics.mutual_knn import MutualKNN, mutual_knn
from rayemb.evaluate.diagnostics.off_the_shelf import (
    OffTheShelf,
    Processing,
    fit_processing,
    off_the_shelf,
    off_the_shelf_split,
    spatial_boxes,
    spatial_distances,
)
from rayemb.evaluate.diagnostics.rankme import Spread, rankme, rankme_of, spread
from rayemb.evaluate.diagnostics.registry import Diagnostic, Inputs, entry, registry
from rayemb.evaluate.diagnostics.schur import SchurEntropy, residual_map, residualize, schur_entropy
from rayemb.evaluate.diagnostics.svcca import SVCCA, svcca
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


def _two(inputs: Inputs, name: str) -> tuple[Any, Any]:
    return inputs.need("vectors"), inputs.need(name)


def _reconstruction(inputs: Inputs) -> GraphReconstruction:
    return graph_reconstruction(*_two(inputs, "graph"), sample=2000)  # of more nodes the mean hardly moves


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
    entry("cka", "vectors other", lambda i: linear_cka(*_two(i, "other")), "neither", "Kornblith et al., 2019"),
    entry("svcca", "vectors other", lambda i: svcca(*_two(i, "other")), "neither", "Raghu et al., 2017"),
    entry("mutual_knn", "vectors other", lambda i: mutual_knn(*_two(i, "other")), "neither", "Huh et al., 2024"),
    entry("convergent", "vectors other", lambda i: convergent_learning(*_two(i, "other")), "neither", "S090"),
    entry("off_the_shelf", "vectors labels", lambda i: off_the_shelf_split(*_two(i, "labels")), "higher", "S111"),
    entry("graph_reconstruction", "vectors graph", _reconstruction, "higher", "S184: Yip et al., 2023"),
)


def possible(inputs: Inputs) -> list[str]:
    """The names of the diagnostics whose needs `inputs` meets, in the registry's order."""
    given = inputs.given()
    return [name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.needs <= given]


__all__ = [
    "DIAGNOSTICS",
    "SVCCA",
    "Convergence",
    "Diagnostic",
    "Free",
    "GraphReconstruction",
    "Hop",
    "Hubness",
    "Inputs",
    "IntrinsicDimension",
    "LabelSharpness",
    "LengthCollapse",
    "LimitReport",
    "LimitTask",
    "ModalityGap",
    "MutualKNN",
    "OffTheShelf",
    "Processing",
    "SchurEntropy",
    "Separability",
    "SparsePrediction",
    "SpectralOverlap",
    "Spread",
    "UnitMatching",
    "Utilisation",
    "alignment",
    "collapse",
    "convergent_learning",
    "critical_n",
    "cyclic_embeddings",
    "fit_processing",
    "free_embeddings",
    "graph_reconstruction",
    "high_frequency",
    "hubness",
    "intrinsic_dimension",
    "label_sharpness",
    "length_collapse",
    "lidar",
    "limit_recall",
    "limit_report",
    "limit_sets",
    "limit_task",
    "linear_cka",
    "mean_cosine",
    "mean_cosine_of",
    "modality_gap",
    "mutual_knn",
    "negative_entropy",
    "off_the_shelf",
    "off_the_shelf_split",
    "persistence",
    "plateau",
    "possible",
    "rankme",
    "rankme_of",
    "reachable",
    "relative_penalties",
    "residual_map",
    "residualize",
    "schur_entropy",
    "separability",
    "sparse_prediction",
    "spatial_boxes",
    "spatial_distances",
    "spectral_overlap",
    "spread",
    "svcca",
    "tolerance",
    "uniformity",
    "uniformity_sum",
    "unit_matching",
    "utilisation",
]
