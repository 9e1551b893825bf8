"""Take the live updates into the index, as a Ray job.

`ray job submit --working-dir . -- python jobs/compact.py jobs/configs/demo.yaml [key=value ...]`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["index", "compact"]
    main()
