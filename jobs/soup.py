"""Average the weights of several models, as a Ray job.

`ray job submit --working-dir . -- python jobs/soup.py RUN.yaml 'soup.models=[MODEL, MODEL]' [key=value ...]`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["soup"]
    main()
