"""A thread that takes in, from time to time, what others wrote to the log of updates."""

import logging
import threading
import weakref

from rayemb.errors import RayembError
from rayemb.index.live.follower import Follower

logger = logging.getLogger(__name__)


class Following:
    """Refreshes a follower every `every_s` seconds for as long as somebody else holds it.

    A store that does not answer is logged once, and asked again: searches go on with what is known.
    """

    def __init__(self, follower: Follower, every_s: float) -> None:
        self._follower = weakref.ref(follower)
        self._ended = threading.Event()
        self._failed = False
        threading.Thread(target=self._run, args=(every_s,), name="rayemb-following", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()

    def _run(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            follower = self._follower()
            if follower is None:
                return
            try:
                follower.refresh()
                self._failed = False
            except RayembError as error:
                if not self._failed:
                    logger.warning("updates cannot be followed: %s", error)
                self._failed = True
            del follower
