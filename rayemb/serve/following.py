"""A thread that keeps an engine up with what others wrote: updates in the log, a new version of the index."""

import logging
import threading
import weakref
from typing import Protocol

from rayemb.errors import RayembError

logger = logging.getLogger(__name__)


class Behind(Protocol):
    """What others get ahead of."""

    def catch_up(self) -> None:
        """Takes in what is new. Raises RayembError."""
        ...


class Following:
    """Lets `target` catch up every `every_s` seconds for as long as somebody else holds it.

    A store that does not answer is logged once, and asked again: searches go on with what is known.
    """

    def __init__(self, target: Behind, every_s: float) -> None:
        self._target = weakref.ref(target)
        self._failed = False
        threading.Thread(target=self._run, args=(every_s,), name="rayemb-following", daemon=True).start()

    def _run(self, every_s: float) -> None:
        pause = threading.Event()
        while not pause.wait(every_s):
            target = self._target()
            if target is None:
                return
            try:
                target.catch_up()
                self._failed = False
            except RayembError as error:
                if not self._failed:
                    logger.warning("updates cannot be followed: %s", error)
                self._failed = True
            del target
