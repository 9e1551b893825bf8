"""Memory that does not grow with the corpus, measured in processes of their own (1M rows: jobs/bench)."""

import subprocess
import sys

PROBE = """
import sys
import numpy as np
from rayemb.evaluate.exact import exact_search
from rayemb.evaluate.exact_ranks import exact_ranks

class Rows:
    rows = int(sys.argv[1])
    def read(self, start, stop):
        return np.random.default_rng(start).standard_normal((stop - start, 64), np.float32)

corpus = Rows()
queries = corpus.read(0, 20_000)[:16]
found = exact_search(queries, corpus, 10, block=20_000)
assert found.rows[:, 0].tolist() == list(range(16))
exact_ranks(queries, corpus, np.arange(16), np.arange(corpus.rows), block=20_000)
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def test_memory_is_a_block_whatever_the_rows() -> None:
    """Ten times the rows would be 180 MB more of vectors; their groups, which the ranks are given, are 6 MB."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", PROBE, str(rows)], check=True, capture_output=True, text=True).stdout)
        for rows in (80_000, 800_000)
    ]
    assert peaks[1] < peaks[0] + 40_000, peaks
