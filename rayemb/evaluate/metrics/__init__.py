"""Pure metrics: NumPy arrays in, figures out. They know no model, no Ray and no storage."""

from rayemb.evaluate.metrics.bootstrap import Interval, bootstrap_interval, paired_bootstrap
from rayemb.evaluate.metrics.correlation import Correlation, correlation
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
    "bootstrap_interval",
    "chance_mrr",
    "chance_recall_at",
    "correlation",
    "hits_at",
    "knn_hits",
    "mrr",
    "paired_bootstrap",
    "ranks",
    "recall_at",
    "reciprocal_ranks",
]
