"""Pure metrics: NumPy arrays in, figures out. They know no model, no Ray and no storage."""

from rayemb.evaluate.metrics.bootstrap import Interval, bootstrap_interval, paired_bootstrap
from rayemb.evaluate.metrics.correlation import Correlation, correlation
from rayemb.evaluate.metrics.diagnostics import (
    Spread,
    alignment,
    collapse,
    mean_cosine,
    mean_cosine_of,
    negative_entropy,
    rankme,
    rankme_of,
    relative_penalties,
    spread,
    tolerance,
    uniformity,
    uniformity_sum,
)
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.knn import knn_hits
from rayemb.evaluate.metrics.retrieval import (
    chance_mrr,
    chance_recall_at,
    hits_at,
    mrr,
    ranks,
    recall_at,
    reciprocal_ranks,
)

__all__ = [
    "Correlation",
    "Interval",
    "MetricError",
    "Spread",
    "alignment",
    "bootstrap_interval",
    "chance_mrr",
    "chance_recall_at",
    "collapse",
    "correlation",
    "hits_at",
    "knn_hits",
    "mean_cosine",
    "mean_cosine_of",
    "mrr",
    "negative_entropy",
    "paired_bootstrap",
    "rankme",
    "rankme_of",
    "ranks",
    "recall_at",
    "reciprocal_ranks",
    "relative_penalties",
    "spread",
    "tolerance",
    "uniformity",
    "uniformity_sum",
]
