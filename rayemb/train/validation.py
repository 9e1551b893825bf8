"""Recall on held-out pairs while a training runs, over all ranks."""

from typing import Any

import numpy as np
import torch

from rayemb.data.decode import ColumnReader, Decoder, DecodeSettings, Member, Piece
from rayemb.evaluate.metrics import ranks, recall_at
from rayemb.parallel import Exchange
from rayemb.train.objective import Objective, embed_pairs


def validation_rows(
    member: Member | None, decode: DecodeSettings, most: int, rank: int, world: int, device: torch.device
) -> dict[str, Any] | None:
    """This rank's share of the validation pairs, the same number on every rank."""
    share = min(most, sum(group.rows for group in member.groups)) // world if member else 0
    if member is None or not share:
        return None
    # Rank order after the gather: rank 0's rows, then rank 1's, ...
    mine = np.arange(rank * share, (rank + 1) * share)
    arrays, bad = Decoder([member], decode)(Piece(0, ((0, mine),)))
    if bad:
        raise RuntimeError(f"a validation row cannot be used: {bad[0].source}: {bad[0].what}")
    return {
        "batch": {name: torch.from_numpy(values).to(device) for name, values in arrays.items()},
        "groups": ColumnReader(member)(member.groups, "concept")[: share * world],
    }


def validate(engine: Any, objective: Objective, validation: dict[str, Any], exchange: Exchange) -> float:
    """Recall@1, the mean of both directions, over all ranks' validation pairs."""
    engine.eval()
    queries, documents = embed_pairs(objective, validation["batch"], exchange)
    engine.train()
    query, document, groups = queries.float().cpu().numpy(), documents.float().cpu().numpy(), validation["groups"]
    forward, backward = ranks(query, document, groups, groups), ranks(document, query, groups, groups)
    return (recall_at(forward, 1) + recall_at(backward, 1)) / 2
