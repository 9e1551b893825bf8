"""A process that says how many of an index's hits an exact search finds: `python -m rayemb.serve.watch.exact`.

A process and not a thread: it runs when the machine has nothing else to do (SCHED_IDLE), and a thread of that priority
would keep Python's lock while it waits for a core, which would stop the gateway. A JSON object a line in and out; it
ends with its input.
"""

import contextlib
import json
import os
import subprocess
import sys
from typing import Any, TextIO

import numpy as np

from rayemb.errors import RayembError


class ExactProcess:
    """The process, started when it is first asked. One caller at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def recall(self, uri: str, version: int, vector: list[float], keys: list[int]) -> float:
        """The recall of `keys` for one query of the table `uri` at `version`. Blocks. Raises RayembError."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rayemb.serve.watch.exact"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin
        assert self._process.stdout
        asked = {"uri": uri, "version": version, "vector": vector, "keys": keys}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RayembError("the process of exact search ended", where="serve.watch") from error
        if "error" in answer:
            raise RayembError(answer["error"], where=uri)
        return float(answer["recall"])

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # it keeps nothing, and would be slow to end by itself: it gets no core when others work
            process.communicate()


def work(questions: TextIO, answers: TextIO) -> None:
    """Answers each line, until there are no more."""
    import faiss

    from rayemb.data.embeddings import EmbeddingsTable
    from rayemb.index import recall_of

    faiss.omp_set_num_threads(1)
    tables: dict[tuple[str, int], Any] = {}
    for line in questions:
        asked = json.loads(line)
        key = asked["uri"], asked["version"]
        try:
            if key not in tables:
                tables = {key: EmbeddingsTable.open(*key)}  # the last one only
            x_ND, keys = np.array([asked["vector"]], np.float32), np.array([asked["keys"]], np.int64)
            answer: dict[str, Any] = {"recall": recall_of(tables[key], x_ND, keys)}
        except (RayembError, OSError, ValueError) as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _last_in_line() -> None:
    """From now on this process runs when nothing else wants to."""
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        return
    with contextlib.suppress(OSError):
        os.nice(19)


if __name__ == "__main__":
    _last_in_line()
    # What a library prints must not be taken for an answer.
    out, sys.stdout = sys.stdout, sys.stderr
    work(sys.stdin, out)
