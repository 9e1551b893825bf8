"""Where a method comes from, read off its docstrings."""

import importlib
import re
import sys
from dataclasses import dataclass

_PAPER = re.compile(r"\(([^()]*\d{4}[^()]*)\)")


@dataclass(frozen=True)
class Literature:
    """The paper of a method, e.g. "Oord et al., 2018", and the id of its card; empty where the module names none."""

    source: str
    card: str


def literature(config: type) -> Literature:
    """What the module of a method's config says of its paper; of several in a module, what the config itself says."""
    module = sys.modules.get(config.__module__) or importlib.import_module(config.__module__)
    headline, own = (" ".join((each.__doc__ or "").split("\n\n")[0].split()) for each in (module, config))
    card = re.search(r"\bS\d{3}\b", headline)
    source = ", ".join(_PAPER.findall(headline) or _PAPER.findall(own))
    return Literature(re.sub(r"[;,]?\s*card S\d{3}", "", source), card.group() if card else "")
