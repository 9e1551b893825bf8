"""Evaluation while a model trains: tasks over all workers, a watch on the vectors, early stopping."""

from rayemb.train.evaluation.early_stopping import EarlyStopping, EarlyStoppingConfig
from rayemb.train.evaluation.run import EvaluationConfig, Evaluator, open_tasks

__all__ = ["EarlyStopping", "EarlyStoppingConfig", "EvaluationConfig", "Evaluator", "open_tasks"]
