"""Pure metrics: NumPy arrays in, figures out. They know no model, no Ray and no storage."""

from rayemb.evaluate.metrics.ann import ann_overlap_at, ann_recall_at, exact_scores
from rayemb.evaluate.metrics.bootstrap import Interval, bootstrap_interval, paired_bootstrap
from rayemb.evaluate.metrics.calibration import Calibration, ReliabilityBins, TopLabel, brier, calibration, top_label
from rayemb.evaluate.metrics.clustering import (
    ClusterAccuracy,
    ClusterScores,
    cluster_accuracy,
    cluster_scores,
    kmeans_clusters,
    matched_hits,
)
from rayemb.evaluate.metrics.correlation import Correlation, correlation
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.few_shot import Episodes, FewShot, draw_episodes, few_shot
from rayemb.evaluate.metrics.ir import IR_MEASURES, Judged, Judgements, judge_lists, judge_run, judgements
from rayemb.evaluate.metrics.knn import knn_hits
from rayemb.evaluate.metrics.lists import Ties
from rayemb.evaluate.metrics.means import Mean, mean_over
from rayemb.evaluate.metrics.metric_learning import ClassRetrieval, class_retrieval, class_retrieval_of_lists
from rayemb.evaluate.metrics.naive_bayes import ClassMoments, NaiveBayes, class_moments, merge_moments, naive_bayes
from rayemb.evaluate.metrics.pairs import PairClassification, pair_classification, pair_hits, pair_similarities
from rayemb.evaluate.metrics.probes import LearningCurves, Probe, bayes_probe, learning_curves, linear_probe
from rayemb.evaluate.metrics.retrieval import (
    chance_mrr,
    chance_recall_at,
    hits_at,
    mrr,
    ranks,
    recall_at,
    reciprocal_ranks,
)
from rayemb.evaluate.metrics.significance import (
    Comparison,
    Verdict,
    compare,
    holm,
    holm_corrected,
    minimum_detectable_difference,
    sign_flip_test,
)
from rayemb.evaluate.metrics.zero_shot import (
    ZeroShotScores,
    class_probabilities,
    class_vectors,
    fill_templates,
    zero_shot,
)

__all__ = [
    "IR_MEASURES",
    "Calibration",
    "ClassMoments",
    "ClassRetrieval",
    "ClusterAccuracy",
    "ClusterScores",
    "Comparison",
    "Correlation",
    "Episodes",
    "FewShot",
    "Interval",
    "Judged",
    "Judgements",
    "LearningCurves",
    "Mean",
    "MetricError",
    "NaiveBayes",
    "PairClassification",
    "Probe",
    "ReliabilityBins",
    "Ties",
    "TopLabel",
    "Verdict",
    "ZeroShotScores",
    "ann_overlap_at",
    "ann_recall_at",
    "bayes_probe",
    "bootstrap_interval",
    "brier",
    "calibration",
    "chance_mrr",
    "chance_recall_at",
    "class_moments",
    "class_probabilities",
    "class_retrieval",
    "class_retrieval_of_lists",
    "class_vectors",
    "cluster_accuracy",
    "cluster_scores",
    "compare",
    "correlation",
    "draw_episodes",
    "exact_scores",
    "few_shot",
    "fill_templates",
    "hits_at",
    "holm",
    "holm_corrected",
    "judge_lists",
    "judge_run",
    "judgements",
    "kmeans_clusters",
    "knn_hits",
    "learning_curves",
    "linear_probe",
    "matched_hits",
    "mean_over",
    "merge_moments",
    "minimum_detectable_difference",
    "mrr",
    "naive_bayes",
    "pair_classification",
    "pair_hits",
    "pair_similarities",
    "paired_bootstrap",
    "ranks",
    "recall_at",
    "reciprocal_ranks",
    "sign_flip_test",
    "top_label",
    "zero_shot",
]
