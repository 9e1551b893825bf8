"""Of which class the nearest neighbours of each class are, as a table whose cells are coloured."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rayemb.evaluate.report import Confusion

MOST = 24
"""Classes shown at most; more cells than a person looks at, and a megabyte of page from a few hundred classes on."""
_TOLD = 3


class ConfusionTable(NamedTuple):
    """What is shown: a square of shares, and what stands out, in words."""

    labels: list[str]
    shares: list[list[float]]
    said: str


def confusion_table(found: "Confusion") -> ConfusionTable:
    """All classes, or of many the worst: those with the least of their own among their neighbours, in their order."""
    s_CC = np.array(found.shares, float)
    own_C = s_CC.diagonal()
    shown = np.sort(np.argsort(own_C, kind="stable")[:MOST])
    said = [f"Own class: {own_C.mean():.0%} on average, least for {found.labels[own_C.argmin()]} ({own_C.min():.0%})."]
    away_CC = s_CC - np.diag(own_C)
    pairs = [divmod(int(at), len(s_CC)) for at in np.argsort(-away_CC, axis=None, kind="stable")[:_TOLD]]
    mixed = [f"{found.labels[i]} → {found.labels[j]} ({away_CC[i, j]:.0%})" for i, j in pairs if away_CC[i, j] > 0]
    if mixed:
        said.append(f"Most often taken for another: {', '.join(mixed)}.")
    if len(shown) < len(s_CC):
        said.append(f"Shown: the {len(shown)} of {len(s_CC):,} classes with the fewest of their own.")
    return ConfusionTable(
        [found.labels[i] for i in shown],
        s_CC[np.ix_(shown, shown)].tolist(),
        " ".join([*said, *([found.note] if found.note else [])]),
    )
