"""Anchors against the candidates of all ranks, tile by tile: exact, and linear in memory.

`contrast` gives, per anchor, what softmax and sigmoid losses need of its logits, and the same per candidate from the
same products, so that a symmetric loss costs one similarity matrix and not two. Nothing (anchors x candidates) large
is kept: forward keeps a log-sum-exp per row and column, backward computes each tile again. With B anchors a rank, C of
its candidates, M of all ranks: O(B M D) time a rank; O((B + C) D + tile) memory, and M D more with `Gather`.

Shape suffixes: B anchors, C this rank's candidates, M all ranks' candidates, D dimensions; a tile is (b, m).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayemb.parallel.exchange import Alone, Exchange, Visits
from rayemb.parallel.pairs import PairFinder, Pairs, TilePairs
from rayemb.parallel.tiles import Kernels, add_product, kernels_for, product, widened

Reduction = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Side:
    """What was found for each anchor (or for each candidate, seen as an anchor), fp32 or better, `(n,)` each.

    negatives:  softmax: log-sum-exp of the logits of its negatives, -inf where it has none;
                sigmoid: their sum of `log(1 + exp(logit))`
    positives:  softmax: log-sum-exp of the logits of its positives, -inf where it has none; sigmoid: zeros
    attraction: softmax: sum of `weight * logit` over its positives; sigmoid: of `weight * log(1 + exp(-logit))`
    weight:     sum of its positives' weights; no gradient
    count:      number of its negatives; no gradient
    """

    negatives: Tensor
    positives: Tensor
    attraction: Tensor
    weight: Tensor
    count: Tensor


def contrast(
    anchors_BD: Tensor,
    candidates_CD: Tensor,
    pairs: Pairs,
    *,
    exchange: Exchange | None = None,
    columns: int = 0,
    bias_C: Tensor | None = None,
    boost_B: Tensor | None = None,
    reduction: Reduction = "softmax",
) -> tuple[Side, Side | None]:
    """The anchors' side, and the side of this rank's first `columns` candidates (None if 0), over all ranks.

    The logit of a pair is `anchors_BD @ candidates_CD.T + bias_C`: put the scale (1 / temperature) into the anchors.
    `boost_B` (no gradient) multiplies the products of negatives, in value but not in gradient (hardness weighting).
    B and C may differ between ranks and may be zero. Every rank must call this, in the same order.

    Gradients are those of the *sum* over ranks of whatever each rank computes from its sides: average the parameters'
    gradients over ranks, as DDP and DeepSpeed do, and scale the loss accordingly (`share_of_mean`).

    Raises ExchangeError, on every rank, if one rank's arguments make no sense.
    """
    exchange = exchange or Alone()
    problem = _problem(anchors_BD, candidates_CD, pairs, columns, bias_C, boost_B, reduction)
    alike = "" if problem else _exchanged(anchors_BD, candidates_CD, pairs, bias_C, reduction)
    table = exchange.agree(problem, candidates_CD.shape[0], columns, alike=alike)
    work = _Work(
        pairs,
        exchange,
        sizes=[size for size, _ in table],
        columns=[number for _, number in table],
        boost=boost_B.detach() if boost_B is not None else None,
        reduction=reduction,
    )
    found = _Contrast.apply(  # type: ignore[no-untyped-call]
        anchors_BD, candidates_CD, bias_C, work
    )
    rows = Side(*found[:3], *found[6:8])
    return rows, Side(*found[3:6], *found[8:]) if any(work.columns) else None


def _problem(
    anchors: Tensor,
    candidates: Tensor,
    pairs: Pairs,
    columns: int,
    bias: Tensor | None,
    boost: Tensor | None,
    reduction: Reduction,
) -> str | None:
    for name, matrix in (("anchors", anchors), ("candidates", candidates)):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            return f"{name} are {matrix.dtype} of shape {tuple(matrix.shape)}, not floating-point (n, D)"
    if anchors.shape[1] != candidates.shape[1]:
        return f"anchors have {anchors.shape[1]} dimensions, candidates {candidates.shape[1]}"
    if not 0 <= columns <= candidates.shape[0]:
        return f"columns ({columns}) is more than the {candidates.shape[0]} candidates"
    for name, vector, rows in (("bias", bias, candidates.shape[0]), ("boost", boost, anchors.shape[0])):
        if vector is not None and vector.shape != (rows,):
            return f"{name} has shape {tuple(vector.shape)}, not ({rows},)"
    if columns and reduction == "sigmoid":
        return "columns: a sigmoid loss has no side of its columns; its sum over rows is the whole"
    return pairs.problem(anchors.shape[0], candidates.shape[0], columns)


def _exchanged(anchors: Tensor, candidates: Tensor, pairs: Pairs, bias: Tensor | None, reduction: Reduction) -> str:
    """What has to be alike on all ranks, in words."""
    words = [f"vectors of {candidates.shape[1]} dimensions ({anchors.dtype}, {candidates.dtype})", reduction]
    # Backward exchanges, too: a rank that does not come to it would leave the others waiting.
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (anchors, candidates, bias))
    words.append("a graph" if graph else "no graph")
    words += ["frozen candidates"] if graph and not candidates.requires_grad else []
    words.append(
        "no keys" if pairs.keys is None else f"keys of shape (n, {', '.join(map(str, pairs.keys[1].shape[1:]))})"
    )
    words += ["a bias"] if bias is not None else []
    for veto in pairs.vetoes:
        guide = veto.candidates
        words.append("a veto" if guide is None else f"a veto by {guide.shape[1]} dimensions ({guide.dtype})")
        words += ["thresholds of columns"] if veto.column_above is not None else []
    return ", ".join(words)


class _Tile(NamedTuple):
    """One tile: where it lies, its logits, and its exceptional pairs."""

    rows: slice
    columns: slice  # within the block
    facing: slice  # the same columns among all column anchors; empty where they are none
    logits: Tensor  # (b, m) of negatives, all else -inf
    column_logits: Tensor  # the same, masked as the columns see it
    pairs: TilePairs | None
    positives: Tensor | None  # logits of pairs.rows, pairs.columns
    vetoed: bool


class _Work:
    """One contrast: what forward and backward share."""

    def __init__(
        self,
        pairs: Pairs,
        exchange: Exchange,
        sizes: list[int],
        columns: list[int],
        boost: Tensor | None,
        reduction: Reduction,
    ) -> None:
        self.pairs, self.exchange, self.sizes, self.columns = pairs, exchange, sizes, columns
        self.boost, self.reduction, self.tiling = boost, reduction, exchange.tiling
        self.offset = [sum(sizes[:rank]) for rank in range(len(sizes))]
        self.facing = [sum(columns[:rank]) for rank in range(len(columns))]
        self.own_columns = slice(self.facing[exchange.rank], self.facing[exchange.rank] + columns[exchange.rank])

    def prepare(self, anchors: Tensor, candidates: Tensor, bias: Tensor | None) -> None:
        """Exchanges what is small, once: keys, biases and thresholds, O(M) numbers."""
        self.dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
        self.device = anchors.device
        self.kernels: Kernels = kernels_for(self.tiling.kernels, self.device)
        share = self.exchange.share
        keys = share(self.pairs.keys[1], self.sizes) if self.pairs.keys is not None else None
        self.finder = PairFinder(self.pairs, keys, self.dtype)
        self.bias = share(bias.detach().to(self.dtype), self.sizes) if bias is not None else None
        self.column_above = [
            share(veto.column_above.to(self.dtype), self.columns) if veto.column_above is not None else None
            for veto in self.pairs.vetoes
        ]
        guides = tuple(veto.candidates for veto in self.pairs.vetoes if veto.candidates is not None)
        self.visits: Visits = self.exchange.visits((candidates.detach(), *guides), self.sizes)

    def boosted(self, anchors: Tensor) -> Tensor:
        """The anchors as they face negatives."""
        return anchors if self.boost is None else widened(anchors) * self.boost[:, None]

    def tiles(self, owner: int, block: tuple[Tensor, ...], anchors: Tensor) -> Iterator[_Tile]:
        """The tiles of one rank's candidates; `anchors` as they face negatives (boosted)."""
        height, width = self.tiling.sizes(self.device)
        candidates, guides = block[0], block[1:]
        for start in range(0, candidates.shape[0], width):
            columns = slice(start, min(start + width, candidates.shape[0]))
            # Widened once a column of tiles, not once a tile.
            part = candidates[columns] if anchors.element_size() == 2 else widened(candidates[columns])
            for top in range(0, anchors.shape[0], height):
                rows = slice(top, min(top + height, anchors.shape[0]))
                yield self._tile(owner, rows, columns, product(anchors[rows], part), guides)

    def _tile(self, owner: int, rows: slice, columns: slice, logits: Tensor, guides: tuple[Tensor, ...]) -> _Tile:
        facing = slice(
            self.facing[owner] + min(columns.start, self.columns[owner]),
            self.facing[owner] + min(columns.stop, self.columns[owner]),
        )
        found = self.finder.find(rows, columns, self.offset[owner], owner == self.exchange.rank)
        row_veto, column_veto = self._vetoes(rows, columns, facing, logits, guides)
        if self.bias is not None:
            first = self.offset[owner]
            logits = logits + self.bias[first + columns.start : first + columns.stop]
        positives = None
        if found is not None:
            positives = self._positives(logits, found, rows, self.offset[owner] + columns.start)
            logits[found.out_rows, found.out_columns] = float("-inf")
        seen_by_columns = logits
        if row_veto is not None:
            if column_veto is not None:
                seen_by_columns = logits.masked_fill(column_veto, float("-inf"))
            logits = logits.masked_fill(row_veto, float("-inf"))
            if column_veto is None:
                seen_by_columns = logits
        return _Tile(rows, columns, facing, logits, seen_by_columns, found, positives, row_veto is not None)

    def _positives(self, logits: Tensor, found: TilePairs, rows: slice, first: int) -> Tensor:
        values = logits[found.rows, found.columns]
        if self.boost is None:
            return values
        bias = self.bias[first + found.columns] if self.bias is not None else 0.0
        return (values - bias) / self.boost[rows][found.rows] + bias

    def _vetoes(
        self, rows: slice, columns: slice, facing: slice, products: Tensor, guides: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which pairs are vetoed for rows and for columns; the second is None where it equals the first."""
        row_veto: Tensor | None = None
        column_veto: Tensor | None = None
        given = iter(guides)
        for veto, column_above in zip(self.pairs.vetoes, self.column_above, strict=True):
            above = veto.above[rows, None].to(self.dtype)
            if veto.anchors is not None:
                similarity = product(veto.anchors[rows], next(given)[columns])
            else:
                similarity = products if self.boost is None else products / self.boost[rows, None]
            mask = similarity > above
            for_columns = mask
            if column_above is not None:
                # Candidates that are no column anchors have no threshold; nothing is read off them either.
                threshold = torch.full((1, mask.shape[1]), float("inf"), dtype=self.dtype, device=self.device)
                threshold[0, : facing.stop - facing.start] = column_above[facing]
                for_columns = similarity > threshold
            if column_above is not None or column_veto is not None:
                before = column_veto if column_veto is not None else row_veto
                column_veto = for_columns if before is None else before | for_columns
            row_veto = mask if row_veto is None else row_veto | mask
        return row_veto, column_veto


class _Accumulator:
    """One side's running sums while the tiles go by."""

    def __init__(self, size: int, like: Tensor, softmax: bool) -> None:
        empty = torch.full((size,), float("-inf"), dtype=like.dtype, device=like.device)
        zero = torch.zeros_like(empty)
        self.softmax = softmax
        self.negatives = empty if softmax else zero
        self.positives = empty.clone() if softmax else zero.clone()
        self.attraction, self.weight, self.count = zero.clone(), zero.clone(), zero.clone()

    def add(self, at: slice, negatives: Tensor, count: Tensor) -> None:
        merge = torch.logaddexp if self.softmax else torch.add
        self.negatives[at] = merge(self.negatives[at], negatives)
        self.count[at] += count

    def add_positives(self, at: slice, index: Tensor, logits: Tensor, weights: Tensor) -> None:
        if self.softmax:
            self.positives[at] = torch.logaddexp(self.positives[at], _scattered_lse(logits, index, at))
            value = weights * logits
        else:
            value = -weights * torch.nn.functional.logsigmoid(logits)
        self.attraction[at] = self.attraction[at].index_add(0, index, value)
        self.weight[at] = self.weight[at].index_add(0, index, weights)

    def over_ranks(self, exchange: Exchange) -> None:
        """Joins what each rank's anchors said of all columns; log-sum-exps by a shift all ranks share."""
        if exchange.world == 1:
            return
        sums = [self.attraction, self.weight, self.count]
        if self.softmax:
            lse = torch.stack([self.negatives, self.positives])
            peak = exchange.reduce(lse, "max")
            shift = peak.masked_fill(peak == float("-inf"), 0.0)
            sums += list((lse - shift).exp())
        total = exchange.reduce(torch.stack(sums))
        self.attraction, self.weight, self.count = total[:3]
        if self.softmax:
            self.negatives, self.positives = total[3:].log() + shift


def _scattered_lse(values: Tensor, index: Tensor, at: slice) -> Tensor:
    size = at.stop - at.start
    peak = values.new_full((size,), float("-inf")).scatter_reduce(0, index, values, "amax")
    safe = peak.masked_fill(peak == float("-inf"), 0.0)
    return values.new_zeros(size).index_add(0, index, (values - safe[index]).exp()).log() + safe


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, bias: Tensor | None, work: _Work) -> Any:
        work.prepare(anchors, candidates, bias)
        softmax = work.reduction == "softmax"
        facing = work.boosted(anchors)
        like = torch.empty(0, dtype=work.dtype, device=anchors.device)
        rows, columns = _Accumulator(anchors.shape[0], like, softmax), _Accumulator(sum(work.columns), like, softmax)
        for owner, block in work.visits.blocks():
            for tile in work.tiles(owner, block, facing):
                _forward_tile(tile, rows, columns, work)
        columns.over_ranks(work.exchange)
        ctx.work, ctx.rows, ctx.columns, ctx.has_bias = work, rows, columns, bias is not None
        ctx.dtype = candidates.dtype
        ctx.save_for_backward(anchors, candidates)  # the visits hold candidates too; saved, a change of them is noticed
        own = work.own_columns
        column_side = (columns.negatives[own].clone(), columns.positives[own].clone(), columns.attraction[own].clone())
        numbers = (rows.weight, rows.count, columns.weight[own].clone(), columns.count[own].clone())
        ctx.mark_non_differentiable(*numbers)
        # Clones: ctx holds `rows`, and what is returned holds ctx, a circle that would outlive the step.
        return rows.negatives.clone(), rows.positives.clone(), rows.attraction.clone(), *column_side, *numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        work: _Work = ctx.work
        anchors, _ = ctx.saved_tensors
        facing = work.boosted(anchors)
        own = torch.stack([grad.to(work.dtype) for grad in grads[3:6]], 1)
        column_grads = [side.contiguous() for side in work.exchange.share(own, work.columns).unbind(1)]
        d_anchors = torch.zeros_like(anchors, dtype=work.dtype)
        d_bias = torch.zeros(sum(work.sizes) if ctx.has_bias else 0, dtype=work.dtype, device=anchors.device)

        def compute(owner: int, block: tuple[Tensor, ...], d_candidates: Tensor | None) -> None:
            for tile in work.tiles(owner, block, facing):
                grad = _backward_tile(tile, ctx.rows, grads[:3], ctx.columns, column_grads, work)
                add_product(d_anchors[tile.rows], grad, block[0][tile.columns])
                if d_candidates is not None:
                    add_product(d_candidates[tile.columns], grad.T, anchors[tile.rows])
                if ctx.has_bias:
                    first = work.offset[owner]
                    d_bias[first + tile.columns.start : first + tile.columns.stop] += grad.sum(0)

        if ctx.needs_input_grad[1]:
            d_candidates = work.visits.collect(compute).to(ctx.dtype)
        else:  # frozen candidates: a product, and an exchange, less
            d_candidates = None
            for owner, block in work.visits.blocks():
                compute(owner, block, None)
        d_own_bias = None
        if ctx.has_bias:
            first = work.offset[work.exchange.rank]
            d_own_bias = work.exchange.reduce(d_bias)[first : first + work.sizes[work.exchange.rank]]
        return d_anchors.to(anchors.dtype), d_candidates, d_own_bias, None


def _forward_tile(tile: _Tile, rows: _Accumulator, columns: _Accumulator, work: _Work) -> None:
    width = tile.facing.stop - tile.facing.start
    if work.reduction == "sigmoid":
        rows.add(tile.rows, work.kernels.softplus_sum(tile.logits), _negatives(tile, 1))
    else:
        rows.add(tile.rows, work.kernels.row_lse(tile.logits), _negatives(tile, 1))
        if width:
            seen = work.kernels.column_lse(tile.column_logits[:, :width])
            columns.add(tile.facing, seen, _negatives(tile, 0)[:width])
    found, values = tile.pairs, tile.positives
    if found is None or values is None or not values.numel():
        return
    rows.add_positives(tile.rows, found.rows, values, found.weights)
    if width:
        facing = found.columns < width
        columns.add_positives(tile.facing, found.columns[facing], values[facing], found.weights[facing])


def _negatives(tile: _Tile, dim: int) -> Tensor:
    """Number of negatives per row (dim 1) or column (dim 0) of a tile."""
    logits = tile.logits if dim == 1 else tile.column_logits
    if tile.vetoed:
        return (logits > float("-inf")).sum(dim).to(logits.dtype)
    size = logits.shape[1 - dim]
    number = logits.new_full((size,), float(logits.shape[dim]))
    if tile.pairs is not None:
        index = tile.pairs.out_rows if dim == 1 else tile.pairs.out_columns
        number -= torch.bincount(index, minlength=size)
    return number


def _backward_tile(
    tile: _Tile,
    rows: _Accumulator,
    row_grads: Sequence[Tensor],
    columns: _Accumulator,
    column_grads: Sequence[Tensor],
    work: _Work,
) -> Tensor:
    """The gradient `(b, m)` of a tile's products."""
    here, there, width = tile.rows, tile.facing, tile.facing.stop - tile.facing.start
    if work.reduction == "sigmoid":
        grad = work.kernels.softplus_gradient(tile.logits, row_grads[0][here])
    else:
        grad = work.kernels.row_gradient(tile.logits, rows.negatives[here], row_grads[0][here])
        if width:
            seen = tile.column_logits[:, :width]
            grad[:, :width] += work.kernels.column_gradient(seen, columns.negatives[there], column_grads[0][there])
    found, values = tile.pairs, tile.positives
    if found is None or values is None or not values.numel():
        return grad
    pulled = _pull(values, found.weights, found.rows, rows.positives[here], [g[here] for g in row_grads], work)
    if width:
        facing = found.columns < width
        pulled[facing] += _pull(
            values[facing],
            found.weights[facing],
            found.columns[facing],
            columns.positives[there],
            [g[there] for g in column_grads],
            work,
        )
    grad[found.rows, found.columns] = pulled  # as negatives they were masked: nothing is overwritten
    return grad


def _pull(values: Tensor, weights: Tensor, index: Tensor, lse: Tensor, grads: Sequence[Tensor], work: _Work) -> Tensor:
    """The gradient of positives' logits that comes from one side's positives and attraction."""
    attraction = grads[2][index] * weights
    if work.reduction == "sigmoid":
        return -attraction * torch.sigmoid(-values)
    return attraction + grads[1][index] * (values - lse[index]).exp()
