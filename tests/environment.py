"""What a process of a test's own starts with."""

import os


def off_cluster() -> dict[str, str]:
    """This process's environment without the cluster that it may be connected to."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
