"""Cross-device negatives, exact at any world size and batch size. Plain torch.distributed; knows no Ray."""

from rayemb.parallel.cache import Encoded, cut, gradient_cache, split
from rayemb.parallel.contrast import Side, contrast
from rayemb.parallel.divergence import divergence
from rayemb.parallel.exchange import (
    Alone,
    Exchange,
    ExchangeError,
    ExchangeName,
    Gather,
    Ring,
    exchange_named,
    mean_over_ranks,
)
from rayemb.parallel.pairs import NO_KEY, Duplicates, Pairs, Veto
from rayemb.parallel.tiles import Tiling, widened

__all__ = [
    "NO_KEY",
    "Alone",
    "Duplicates",
    "Encoded",
    "Exchange",
    "ExchangeError",
    "ExchangeName",
    "Gather",
    "Pairs",
    "Ring",
    "Side",
    "Tiling",
    "Veto",
    "contrast",
    "cut",
    "divergence",
    "exchange_named",
    "gradient_cache",
    "mean_over_ranks",
    "split",
    "widened",
]
