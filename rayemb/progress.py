"""How long work tells whoever started it how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is to do, and a line about it."""
