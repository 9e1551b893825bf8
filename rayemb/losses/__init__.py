"""Objectives as functions of (anchors, candidates, positive weights, ignored). Plain torch; knows no Ray.

A new loss is one file here, one test beside its siblings, and one line in `AnyLoss`.
"""

from rayemb.losses.infonce import InfoNCE, InfoNCEConfig
from rayemb.losses.pairs import Pairs, pair_by_group

AnyLoss = InfoNCEConfig  # becomes a union, discriminated by `name`, with the second loss

__all__ = ["AnyLoss", "InfoNCE", "InfoNCEConfig", "Pairs", "pair_by_group"]
