"""The parts that softmax losses are made of."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.parallel import Duplicates, Exchange, Pairs, Side, Veto, contrast


def softmax_loss(side: Side, *, negatives: Tensor | None = None, positives: Tensor | None = None) -> Rows:
    """`log(sum over positives and negatives of exp(logit)) - weighted mean logit of the positives`, per anchor.

    With one positive that is the cross-entropy; with several, SupCon's L_out (Khosla et al., 2020). `negatives` and
    `positives` (n,) replace the side's own log-sum-exps where the denominator has further blocks.
    """
    counted = side.weight > 0
    negatives = side.negatives if negatives is None else negatives
    positives = torch.where(counted, side.positives if positives is None else positives, 0.0)
    pull = side.attraction / torch.where(counted, side.weight, 1.0)
    # F.softplus is linear above 20, and a loss far above its positive is exactly where gradients matter.
    losses = -F.logsigmoid(positives - negatives) + (positives - pull)
    return Rows(torch.where(counted, losses, 0.0), counted.to(losses.dtype))


def with_margin(side: Side, margin: Tensor | float) -> Side:
    """The side with `margin`, in logits `(1,)` or `(n,)`, taken off its positives' logits."""
    return Side(
        side.negatives,
        side.positives - margin,
        side.attraction - margin * side.weight,
        side.weight,
        side.count,
    )


def joined(*blocks: Tensor) -> Tensor:
    """Log-sum-exp over several blocks of candidates, each given by its own log-sum-exp `(n,)`."""
    return reduce(_log_add, blocks)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    # torch.logaddexp of two -inf has a nan gradient; here that is an anchor without any candidate.
    nothing = (a == float("-inf")) & (b == float("-inf"))
    total = torch.logaddexp(torch.where(nothing, 0.0, a), torch.where(nothing, 0.0, b))
    return torch.where(nothing, float("-inf"), total)


def concatenated(*parts: Rows) -> Rows:
    """The rows of several directions, as rows of one mean."""
    return Rows(torch.cat([part.losses for part in parts]), torch.cat([part.counted for part in parts]))


def among_queries(batch: Batch, scale: Tensor, duplicates: Duplicates, exchange: Exchange, *vetoes: Veto) -> Side:
    """Queries against the other queries of all ranks; none of them is a positive."""
    queries = unit(batch.queries)
    keys = (batch.keys, batch.keys) if batch.keys is not None else None
    pairs = Pairs(itself=batch.own, keys=keys, duplicates=_at_most_ignored(duplicates), vetoes=vetoes)
    return contrast(scaled(queries, scale), queries, pairs, exchange=exchange)[0]


def among_documents(
    batch: Batch, scale: Tensor, duplicates: Duplicates, exchange: Exchange, *vetoes: Veto, negatives: bool = True
) -> Side:
    """Each query's document against the other documents (and hard negatives and memory, unless `negatives=False`).

    A query's own hard negatives are left out: they are compared with the query itself already (GTE).
    """
    assert batch.documents is not None
    documents = unit(batch.documents)
    candidates = batch.candidates() if negatives else documents
    keys = batch.candidate_keys() if negatives else batch.keys
    own_negatives = None
    if negatives and batch.negatives is not None and batch.negative_rows is not None:
        column = torch.arange(batch.negatives.shape[0], device=documents.device) + documents.shape[0]
        index, ones = torch.stack([batch.negative_rows, column]), torch.ones_like(column, dtype=torch.bool)
        own_negatives = torch.sparse_coo_tensor(
            index, ones, (documents.shape[0], candidates.shape[0]), check_invariants=False
        )
    pairs = Pairs(
        itself=batch.own,
        ignore=own_negatives,
        keys=(batch.keys, keys) if batch.keys is not None and keys is not None else None,
        duplicates=_at_most_ignored(duplicates),
        vetoes=vetoes,
    )
    return contrast(scaled(documents, scale), candidates, pairs, exchange=exchange)[0]


def _at_most_ignored(duplicates: Duplicates) -> Duplicates:
    return "ignore" if duplicates == "positive" else duplicates
