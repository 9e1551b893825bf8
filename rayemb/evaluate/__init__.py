"""Evaluation: pure metrics, the runner on Ray, and the report with its page."""

from rayemb.evaluate.config import EvaluateConfig
from rayemb.evaluate.report import Report, write_report
from rayemb.evaluate.run import Evaluation, evaluate

__all__ = ["EvaluateConfig", "Evaluation", "Report", "evaluate", "write_report"]
