"""Cross-device negatives, exact at any world size and batch size. Plain torch.distributed; knows no Ray."""

from rayemb.parallel.contrast import Side, contrast
from rayemb.parallel.exchange import Alone, Exchange, ExchangeError, ExchangeName, Gather, Ring, exchange_named
from rayemb.parallel.gather import GatheredRows, gather_rows, mean_over_ranks
from rayemb.parallel.pairs import NO_KEY, Duplicates, Pairs, Veto
from rayemb.parallel.tiles import Tiling, widened

__all__ = [
    "NO_KEY",
    "Alone",
    "Duplicates",
    "Exchange",
    "ExchangeError",
    "ExchangeName",
    "Gather",
    "GatheredRows",
    "Pairs",
    "Ring",
    "Side",
    "Tiling",
    "Veto",
    "contrast",
    "exchange_named",
    "gather_rows",
    "mean_over_ranks",
    "widened",
]
