"""The error of evaluations: data, suites and comparisons that have no honest figure."""

from rayemb.errors import RayembError


class EvaluateError(RayembError):
    """Nothing can be judged: files, ids, labels or requirements that do not fit."""
