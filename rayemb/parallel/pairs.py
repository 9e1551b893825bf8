"""The idea that holds the house together: an objective is a choice of pairs.

Of each anchor, a candidate is a positive, a negative, or left out. Who is what is said once, by rows and keys, and
worked out tile by tile: nothing here is ever (anchors x candidates) large unless the caller brought it so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Duplicates = Literal["positive", "ignore", "negative"]

NO_KEY = torch.iinfo(torch.int64).min
"""The key that equals none, not even itself."""


@dataclass(frozen=True)
class Veto:
    """Takes a candidate out of an anchor's negatives where it looks too much like a positive.

    That is where `similarity > above` (strict): the product of the guide's rows `(B, G)` and `(C, G)`, or, without a
    guide, of the anchors and candidates themselves. `column_above` (columns,) is the threshold when the candidate is
    the anchor (document to query); where it is None, `above` (B,) holds there too. Positives are never taken out.
    """

    above: Tensor
    column_above: Tensor | None = None
    anchors: Tensor | None = None
    candidates: Tensor | None = None

    def problem(self, anchors: int, candidates: int, columns: int) -> str | None:
        """What is wrong with this veto for so many anchors, candidates and column anchors; None if nothing."""
        for name, vector, size in (("above", self.above, anchors), ("column_above", self.column_above, columns)):
            if vector is not None and vector.shape != (size,):
                return f"{name} has shape {tuple(vector.shape)}, not ({size},)"
        if (self.anchors is None) != (self.candidates is None):
            return "anchors and candidates must be given together"
        if self.anchors is None or self.candidates is None:
            return None
        for name, rows, size in (("anchors", self.anchors, anchors), ("candidates", self.candidates, candidates)):
            if rows.ndim != 2 or rows.shape[0] != size:
                return f"{name} have shape {tuple(rows.shape)}, not ({size}, G)"
        if self.anchors.shape[1] != self.candidates.shape[1]:
            return f"anchors have {self.anchors.shape[1]} dimensions, candidates {self.candidates.shape[1]}"
        return None


@dataclass(frozen=True)
class Pairs:
    """What the candidates are to this rank's B anchors: positives, negatives, or left out.

    Rows and columns refer to this rank's own C candidates; those of other ranks are negatives, unless a key says
    otherwise.

    own:        `(B,)` int64, the index of each anchor's own positive; -1 for none.
    itself:     `(B,)` int64, the candidate that is the anchor itself and is left out; -1 for none.
    weights:    `(B, C)` dense or sparse, >= 0: positives with their weights (soft labels, several captions).
    ignore:     `(B, C)` bool, dense or sparse: left out.
    keys:       int64 `(B,)` and `(C,)`, or `(B, K)` and `(C, K)`: pairs equal in any of K keys, on any rank, are
                `duplicates`: further positives of weight 1, ignored, or negatives after all. `NO_KEY` equals nothing.
    vetoes:     see `Veto`.
    """

    own: Tensor | None = None
    itself: Tensor | None = None
    weights: Tensor | None = None
    ignore: Tensor | None = None
    keys: tuple[Tensor, Tensor] | None = None
    duplicates: Duplicates = "ignore"
    vetoes: tuple[Veto, ...] = field(default=())

    def problem(self, anchors: int, candidates: int, columns: int = 0) -> str | None:
        """What is wrong with these pairs for so many anchors and candidates, naming the argument; None if nothing."""
        for name, index in (("own", self.own), ("itself", self.itself)):
            if index is not None and index.shape != (anchors,):
                return f"pairs.{name} has shape {tuple(index.shape)}, the anchors are {anchors}"
            if index is not None and bool(((index >= candidates) | (index < -1)).any()):
                row = int(((index >= candidates) | (index < -1)).nonzero()[0])
                return f"pairs.{name}[{row}] is {int(index[row])}: outside the {candidates} candidates"
        for name, table in (("weights", self.weights), ("ignore", self.ignore)):
            if table is not None and table.shape != (anchors, candidates):
                return f"pairs.{name} has shape {tuple(table.shape)}, not ({anchors}, {candidates})"
        if self.keys is not None:
            found = tuple(tuple(keys.shape) for keys in self.keys)
            if [shape[:1] for shape in found] != [(anchors,), (candidates,)] or found[0][1:] != found[1][1:]:
                return f"pairs.keys have shapes {found}, not ({anchors}, ...) and ({candidates}, ...) of as many keys"
            if any(keys.ndim > 2 or keys.dtype != torch.int64 for keys in self.keys):
                return f"pairs.keys are {self.keys[0].dtype} of shape {found[0]}, not int64 (B,) or (B, K)"
        for number, veto in enumerate(self.vetoes):
            wrong = veto.problem(anchors, candidates, columns)
            if wrong:
                return f"pairs.vetoes[{number}].{wrong}"
        values = _entries(self.weights)[2] if self.weights is not None else None
        if values is not None and not bool((torch.isfinite(values) & (values >= 0)).all()):
            return "pairs.weights has a negative or non-finite weight"
        return self._contradiction(candidates)

    def _contradiction(self, candidates: int) -> str | None:
        out = [_entries(self.ignore)[:2]] if self.ignore is not None else []
        if self.itself is not None:
            out.append(_pointed(self.itself))
        kept = [_entries(self.weights)[:2]] if self.weights is not None else []
        if self.own is not None:
            kept.append(_pointed(self.own))
        if not out or not kept:
            return None
        flat_out, flat_kept = (torch.cat([i * candidates + j for i, j in side]) for side in (out, kept))
        both = flat_kept[torch.isin(flat_kept, flat_out)]
        if not both.numel():
            return None
        row, column = divmod(int(both[0]), candidates)
        return f"pairs.ignore takes out candidate {column} of anchor {row}, which is its positive"


def _pointed(index: Tensor) -> tuple[Tensor, Tensor]:
    rows = (index >= 0).nonzero().squeeze(1)
    return rows, index[rows]


def _entries(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the non-zeros, by row."""
    if table.is_sparse:
        table = table.coalesce()
        rows, columns = table.indices()
        values = table.values()
        keep = values != 0
        return rows[keep], columns[keep], values[keep]
    rows, columns = table.nonzero(as_tuple=True)
    return rows, columns, table[rows, columns]


class TilePairs(NamedTuple):
    """The pairs of one tile that are not plain negatives, as indices within the tile."""

    out_rows: Tensor  # positives and left out: neither is a negative
    out_columns: Tensor
    rows: Tensor  # positives
    columns: Tensor
    weights: Tensor


class PairFinder:
    """Finds a tile's exceptional pairs in O(tile) memory; `all_keys` are the candidates' keys of all ranks."""

    def __init__(self, pairs: Pairs, all_keys: Tensor | None, dtype: torch.dtype) -> None:
        self.duplicates, self.dtype = pairs.duplicates, dtype
        self.anchor_keys = self.all_keys = None
        if pairs.keys is not None and all_keys is not None and pairs.duplicates != "negative":
            self.anchor_keys, self.all_keys = _two_dims(pairs.keys[0]), _two_dims(all_keys)
        self.positives = _Entries.of(pairs.own, pairs.weights, dtype)
        self.ignored = _Entries.of(pairs.itself, pairs.ignore, dtype)

    def find(self, rows: slice, columns: slice, offset: int, mine: bool) -> TilePairs | None:
        """The exceptional pairs of a tile of a block that begins at candidate `offset` of all; None if there are none.

        `mine`: whether the block is this rank's own, of which `own`, `itself`, `weights` and `ignore` speak.
        """
        positive = self.positives.within(rows, columns) if mine and self.positives else None
        ignored = self.ignored.within(rows, columns) if mine and self.ignored else None
        same = self._same(rows, slice(offset + columns.start, offset + columns.stop), (positive, ignored))
        parts = [part for part in (positive, ignored, same) if part is not None]
        if not parts:
            return None
        positives = [positive] if positive is not None else []
        if same is not None and self.duplicates == "positive":
            positives.append(same)
        out_rows, out_columns, _ = (torch.cat(columns) for columns in zip(*parts, strict=True))
        if not positives:
            none = out_rows[:0]
            return TilePairs(out_rows, out_columns, none, none, none.to(self.dtype))
        i, j, w = (torch.cat(columns) for columns in zip(*positives, strict=True))
        return TilePairs(out_rows, out_columns, i, j, w)

    def _same(self, rows: slice, columns: slice, known: tuple[_Triple | None, ...]) -> _Triple | None:
        """Pairs of equal keys that are not already known to be something else."""
        if self.anchor_keys is None or self.all_keys is None:
            return None
        left, right = self.anchor_keys[rows], self.all_keys[columns]
        hit = torch.zeros(right.shape[0], dtype=torch.bool, device=right.device)
        for k in range(left.shape[1]):
            hit |= torch.isin(right[:, k], left[:, k]) & (right[:, k] != NO_KEY)
        # Most tiles share no key: only the columns that do are compared with every row.
        at = hit.nonzero().squeeze(1)
        if not at.numel():
            return None
        same = torch.zeros(left.shape[0], at.numel(), dtype=torch.bool, device=left.device)
        for k in range(left.shape[1]):
            same |= (left[:, k, None] == right[None, at, k]) & (left[:, k, None] != NO_KEY)
        place = torch.full((right.shape[0],), -1, dtype=torch.int64, device=left.device)
        place[at] = torch.arange(at.numel(), device=left.device)
        for triple in known:
            if triple is not None:
                where = place[triple[1]]
                same[triple[0][where >= 0], where[where >= 0]] = False
        i, h = same.nonzero(as_tuple=True)
        return (i, at[h], torch.ones(i.shape[0], dtype=self.dtype, device=i.device)) if i.numel() else None


_Triple = tuple[Tensor, Tensor, Tensor]


class _Entries:
    """Listed pairs sorted by row, so that those of a range of rows lie together."""

    def __init__(self, rows: Tensor, columns: Tensor, weights: Tensor) -> None:
        self.rows, self.columns, self.weights = rows, columns, weights

    @staticmethod
    def of(index: Tensor | None, table: Tensor | None, dtype: torch.dtype) -> _Entries | None:
        parts = []
        if table is not None:
            rows, columns, values = _entries(table)
            parts.append((rows, columns, values.to(dtype)))
        if index is not None:
            rows, columns = _pointed(index)
            if parts:  # a weight given for the own positive stands instead of 1
                width = table.shape[1] if table is not None else 0
                new = ~torch.isin(rows * width + columns, parts[0][0] * width + parts[0][1])
                rows, columns = rows[new], columns[new]
            parts.append((rows, columns, torch.ones(rows.shape[0], dtype=dtype, device=rows.device)))
        if not parts:
            return None
        rows, columns, weights = (torch.cat(side) for side in zip(*parts, strict=True))
        rows, order = rows.sort(stable=True)
        return _Entries(rows, columns[order], weights[order])

    def within(self, rows: slice, columns: slice) -> _Triple | None:
        """The entries inside a tile, with indices relative to it."""
        edges = torch.searchsorted(self.rows, torch.tensor([rows.start, rows.stop], device=self.rows.device))
        part = slice(int(edges[0]), int(edges[1]))
        i, j, w = self.rows[part], self.columns[part], self.weights[part]
        inside = (j >= columns.start) & (j < columns.stop)
        if not bool(inside.any()):
            return None
        return i[inside] - rows.start, j[inside] - columns.start, w[inside]


def _two_dims(keys: Tensor) -> Tensor:
    return keys[:, None] if keys.ndim == 1 else keys
