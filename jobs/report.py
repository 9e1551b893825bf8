"""Compare training runs whose folders lie where the cluster sees them, as a Ray job.

`ray job submit --working-dir . -- python jobs/report.py s3://bucket/runs [RUN ...] --out s3://bucket/report.html`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["report"]
    main()
