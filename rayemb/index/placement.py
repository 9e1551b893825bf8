"""Where a row or a query belongs: rows in order, by the hash of their id, or by their coarse cell."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rayemb import storage
from rayemb.index.faiss_index import load_index, probed_lists
from rayemb.index.manifest import Manifest
from rayemb.index.shard import verified_path


def hashed_shards(ids: Iterable[str], shards: int) -> NDArray[np.int32]:
    """The shard of each id, `(R,)` int32: the same in every process, about equal numbers to each."""
    # Not Python's hash, which is another in each process; not CRC, which keeps the pattern of patterned ids.
    return np.fromiter((int(storage.sha256_bytes(each.encode())[:15], 16) % shards for each in ids), np.int32)


def cell_shards(centroids_CD: NDArray[np.float32], rows_C: NDArray[np.int64], shards: int) -> NDArray[np.int32]:
    """The shard of each cell, `(C,)` int32: about equal rows to each shard, and cells side by side together.

    The cells are halved across the direction in which they spread most (a k-d tree on principal axes; Sproull,
    1991) until there is a part for each shard, so that the lists a query probes lie in few shards. With fewer
    cells than shards, or one cell of most rows, some shards get none.
    """
    found = np.zeros(len(centroids_CD), np.int32)

    def split(cells: NDArray[np.int64], first: int, count: int) -> None:
        if count == 1 or not len(cells):
            found[cells] = first
            return
        spread = centroids_CD[cells] - centroids_CD[cells].mean(axis=0)
        axis = np.linalg.svd(spread, full_matrices=False)[2][0]
        # An axis has no sign, and LAPACK's choice differs between machines.
        ordered = cells[np.argsort(spread @ (axis * np.sign(axis[np.abs(axis).argmax()])), kind="stable")]
        left = count // 2
        reached = np.cumsum(rows_C[ordered])
        cut = int(np.argmin(np.abs(reached - reached[-1] * left / count))) + 1
        split(ordered[:cut], first, left)
        split(ordered[cut:], first + left, count - left)

    split(np.arange(len(centroids_CD)), 0, shards)
    return found


class Router:
    """The shards that a query has to be put to.

    By cell, a search looks into the `nprobe` lists nearest to the query, and each list lies in one shard: the
    others hold nothing that the search would find. Otherwise every shard is asked.

    `routes`: whether it is by cell; `all`: every shard.
    """

    def __init__(self, index_uri: str, manifest: Manifest) -> None:
        """Reads the quantiser, where there is one to route by. Raises IndexArtefactError if it is altered."""
        self.all = list(range(len(manifest.shards)))
        self.routes = bool(manifest.sharding.cells)
        self._shard_of_cell = np.array(manifest.sharding.cells, np.int64)
        self._trained = load_index(verified_path(index_uri, manifest.trained)) if self.routes else None

    def shards(self, x_ND: NDArray[np.float32], nprobe: int) -> list[int]:
        """The shards that hold a list which one of the queries probes, ascending."""
        if self._trained is None or not len(x_ND):
            return self.all
        # The whole batch at once, as the shards do it: BLAS rounds by the size of the batch.
        lists = probed_lists(self._trained, x_ND, nprobe)
        return sorted(set(self._shard_of_cell[lists[lists >= 0]].tolist()))
