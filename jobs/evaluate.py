"""Judge the model on held-out pairs, or on a suite of tasks, as a Ray job.

`ray job submit --working-dir . -- python jobs/evaluate.py jobs/configs/demo.yaml [key=value ...]`
`ray job submit --working-dir . -- python jobs/evaluate.py --suite jobs/configs/suites/demo.yaml workers=4`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    main()
