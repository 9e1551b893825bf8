"""Pure metrics: NumPy arrays in, figures out. They know no model, no Ray and no storage."""

from rayemb.evaluate.metrics.ann import ann_overlap_at, ann_recall_at, exact_scores
from rayemb.evaluate.metrics.bootstrap import Interval, bootstrap_interval, paired_bootstrap
from rayemb.evaluate.metrics.correlation import Correlation, correlation
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.ir import IR_MEASURES, Judged, Judgements, judge_lists, judge_run, judgements
from rayemb.evaluate.metrics.knn import knn_hits
from rayemb.evaluate.metrics.lists import Ties
from rayemb.evaluate.metrics.means import Mean, mean_over
from rayemb.evaluate.metrics.metric_learning import ClassRetrieval, class_retrieval, class_retrieval_of_lists
from rayemb.evaluate.metrics.pairs import PairClassification, pair_classification, pair_hits, pair_similarities
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
    "IR_MEASURES",
    "ClassRetrieval",
    "Correlation",
    "Interval",
    "Judged",
    "Judgements",
    "Mean",
    "MetricError",
    "PairClassification",
    "Ties",
    "ann_overlap_at",
    "ann_recall_at",
    "bootstrap_interval",
    "chance_mrr",
    "chance_recall_at",
    "class_retrieval",
    "class_retrieval_of_lists",
    "correlation",
    "exact_scores",
    "hits_at",
    "judge_lists",
    "judge_run",
    "judgements",
    "knn_hits",
    "mean_over",
    "mrr",
    "pair_classification",
    "pair_hits",
    "pair_similarities",
    "paired_bootstrap",
    "ranks",
    "recall_at",
    "reciprocal_ranks",
]
