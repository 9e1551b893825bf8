"""Quality while serving: recall of sampled queries against exact search, drift of what is asked.

config.py   how much, and what is too far     exact.py   the process that searches exactly
drift.py    how far queries have moved        watch.py   what a gateway samples, and what it tells
"""

from rayemb.serve.watch.config import WatchConfig

__all__ = ["WatchConfig"]
