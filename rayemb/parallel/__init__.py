"""Cross-device negatives, exact at any world size. Plain torch.distributed; knows no Ray."""

from rayemb.parallel.gather import GatheredRows, gather_rows, mean_over_ranks

__all__ = ["GatheredRows", "gather_rows", "mean_over_ranks"]
