"""Curate the corpus, as a Ray job.

`ray job submit --working-dir . -- python jobs/curate.py jobs/configs/curate.yaml [key=value ...]`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["curate", "run"]
    main()
