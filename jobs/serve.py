"""Serve the index, as a Ray job that runs until it is stopped: `ray job submit --no-wait ... -- python jobs/serve.py`.

A cluster that serves for good rather takes `rayemb.serve:app` by `serve deploy` or a KubeRay RayService.
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    main()
