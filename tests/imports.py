"""What an import brings with it."""

import subprocess
import sys
from collections.abc import Sequence


def loaded(statement: str, modules: Sequence[str]) -> list[str]:
    """Those of `modules` that a new process has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[module for module in {list(modules)} if module in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
