"""What goes wrong with models."""

from rayemb.errors import RayembError


class ModelError(RayembError):
    """A model directory that is missing, incomplete, or not what its manifest says; a network that cannot be built."""
