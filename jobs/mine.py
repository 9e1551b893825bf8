"""Mine hard negatives, as a Ray job.

`ray job submit --working-dir . -- python jobs/mine.py RUN.yaml [key=value ...]`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["mine"]
    main()
