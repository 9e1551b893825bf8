"""Run the steps of a recipe, as a Ray job; submitted again, it goes on where it was stopped.

`ray job submit --working-dir . -- python jobs/recipe.py jobs/configs/recipe.yaml [key=value ...]`
"""

import sys

from rayemb.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["recipe"]
    main()
