"""The one error of the metrics: input that has no honest figure."""

from rayemb.errors import RayembError


class MetricError(RayembError):
    """Arrays without a figure: wrong shapes, non-finite values, queries that nothing answers."""
