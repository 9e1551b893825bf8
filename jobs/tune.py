"""Search the settings of the training with Ray Tune, as a Ray job.

`ray job submit --working-dir . -- python jobs/tune.py jobs/configs/demo.yaml [key=value ...]`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tune"]
    main()
