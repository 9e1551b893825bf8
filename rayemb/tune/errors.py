"""What a sweep raises."""

from rayemb.errors import RayembError


class TuneError(RayembError):
    """A sweep that cannot start, or in which no trial reported anything."""
