"""The tiled engine against dense torch expressions: any shape, any tile, any pairs, values and gradients."""

import gc
import math
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayemb.parallel import NO_KEY, Alone, Duplicates, Pairs, Side, Tiling, Veto, contrast
from rayemb.parallel import tiles as tiles_module

INF = float("inf")
FIELDS = ("negatives", "positives", "attraction", "weight", "count")


# -- the oracle: everything (B, C) at once -------------------------------------------------------------------------


@dataclass
class Problem:
    """Arguments of `contrast`."""

    anchors: Tensor
    candidates: Tensor
    pairs: Pairs
    columns: int = 0
    bias: Tensor | None = None
    boost: Tensor | None = None
    reduction: Any = "softmax"

    def tiled(self, tiling: Tiling | None = None) -> tuple[Side, Side | None]:
        return contrast(
            self.anchors,
            self.candidates,
            self.pairs,
            exchange=Alone(tiling),
            columns=self.columns,
            bias_C=self.bias,
            boost_B=self.boost,
            reduction=self.reduction,
        )

    def dense(self) -> tuple[Side, Side | None]:
        products = self.anchors @ self.candidates.T
        boosted = products if self.boost is None else products + ((self.boost[:, None] - 1) * products).detach()
        bias = 0.0 if self.bias is None else self.bias
        weights, out = roles(self.pairs, *products.shape)
        rows_out, columns_out = out.clone(), out.clone()
        for veto in self.pairs.vetoes:
            found = products.detach()
            if veto.anchors is not None and veto.candidates is not None:
                found = veto.anchors @ veto.candidates.T
            rows_out |= found > veto.above[:, None]
            threshold = veto.above[:, None]
            if veto.column_above is not None:
                threshold = torch.full((1, products.shape[1]), INF, dtype=found.dtype)
                threshold[0, : self.columns] = veto.column_above
            columns_out |= found > threshold
        rows = side(products + bias, boosted + bias, weights, rows_out, self.reduction)
        if not self.columns:
            return rows, None
        seen = (part[:, : self.columns].T for part in (products + bias, boosted + bias, weights, columns_out))
        return rows, side(*seen, self.reduction)


def roles(pairs: Pairs, anchors: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Weights of positives, and what is left out, by loops over all pairs."""
    weights, out = (torch.zeros(anchors, candidates, dtype=torch.float64) for _ in range(2))
    for i in range(anchors):
        for j in range(candidates):
            given = 0.0 if pairs.weights is None else float(pairs.weights.to_dense()[i, j])
            own = pairs.own is not None and int(pairs.own[i]) == j
            itself = pairs.itself is not None and int(pairs.itself[i]) == j
            ignored = pairs.ignore is not None and bool(pairs.ignore.to_dense()[i, j])
            same = False
            if pairs.keys is not None:
                left, right = (torch.atleast_1d(keys[at]).tolist() for keys, at in zip(pairs.keys, (i, j), strict=True))
                same = any(a == b and a != NO_KEY for a, b in zip(left, right, strict=True))
            if given or own:
                weights[i, j] = given or 1.0
            elif itself or ignored:
                out[i, j] = 1.0
            elif same and pairs.duplicates == "positive":
                weights[i, j] = 1.0
            elif same and pairs.duplicates == "ignore":
                out[i, j] = 1.0
    return weights, out.bool()


def side(products: Tensor, boosted: Tensor, weights: Tensor, out: Tensor, reduction: str) -> Side:
    positive, negative = weights > 0, (weights == 0) & ~out
    if reduction == "sigmoid":
        logsigmoid = torch.nn.functional.logsigmoid
        return Side(
            (-logsigmoid(-boosted) * negative).sum(1),
            torch.zeros(products.shape[0], dtype=products.dtype),
            (weights * -logsigmoid(products)).sum(1),
            weights.sum(1),
            negative.sum(1),
        )
    return Side(
        masked_lse(boosted, negative),
        masked_lse(products, positive),
        (weights * products).sum(1),
        weights.sum(1),
        negative.sum(1),
    )


def masked_lse(logits: Tensor, mask: Tensor) -> Tensor:
    """-inf for rows without an entry, and no gradient there."""
    some = mask.any(1)
    # Selected, not masked: the gradient of a log-sum-exp over nothing would be nan.
    found = logits[some].masked_fill(~mask[some], -INF)
    return torch.full((logits.shape[0],), -INF, dtype=logits.dtype).index_put((some,), found.logsumexp(1))


# -- problems of any kind ------------------------------------------------------------------------------------------


@st.composite
def problems(draw: Callable[..., Any], reduction: str = "softmax") -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, more, dim = draw(st.integers(0, 6)), draw(st.integers(0, 6)), draw(st.integers(1, 4))
    candidates = max(0, rows + more - 3)
    columns = draw(st.integers(0, candidates)) if reduction == "softmax" else 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def index(low: int) -> Tensor:
        return torch.randint(low, candidates, (rows,), generator=generator) if candidates else torch.full((rows,), -1)

    pairs = Pairs(
        own=index(-1) if draw(st.booleans()) else None,
        weights=normal(rows, candidates).clamp(min=0).round(decimals=1) if draw(st.booleans()) else None,
        keys=draw(st.sampled_from([None, 1, 2])),
        duplicates=draw(st.sampled_from(["positive", "ignore", "negative"])),
    )
    if pairs.keys is not None:
        shapes = [(n, 2) if pairs.keys == 2 else (n,) for n in (rows, candidates)]  # type: ignore[comparison-overlap]
        keys = tuple(torch.randint(0, 4, shape, generator=generator) for shape in shapes)
        pairs = replace(pairs, keys=tuple(k.masked_fill(k == 0, NO_KEY) for k in keys))
    positive = roles(replace(pairs, keys=None), rows, candidates)[0] > 0
    if draw(st.booleans()):
        pairs = replace(pairs, ignore=(normal(rows, candidates) > 0.5) & ~positive)
    if draw(st.booleans()):
        itself = index(-1)
        taken = torch.tensor([j >= 0 and bool(positive[i, j]) for i, j in enumerate(itself.tolist())], dtype=torch.bool)
        pairs = replace(pairs, itself=itself.masked_fill(taken, -1))
    for name in ("weights", "ignore"):
        table = getattr(pairs, name)
        if table is not None and draw(st.booleans()):
            pairs = replace(pairs, **{name: table.to_sparse()})
    vetoes = []
    for guided, for_columns in draw(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=2)):
        vetoes.append(
            Veto(
                above=normal(rows) + 0.5,
                column_above=normal(columns) + 0.5 if for_columns else None,
                anchors=normal(rows, 3) if guided else None,
                candidates=normal(candidates, 3) if guided else None,
            )
        )
    return Problem(
        normal(rows, dim),
        normal(candidates, dim),
        replace(pairs, vetoes=tuple(vetoes)),
        columns,
        normal(candidates) if draw(st.booleans()) else None,
        normal(rows).exp() if draw(st.booleans()) else None,
        reduction,
    )


tilings = st.builds(Tiling, st.integers(1, 7), st.integers(1, 7))


def with_gradients(
    problem: Problem, run: Callable[[Problem], tuple[Side, Side | None]]
) -> tuple[list[Tensor], list[Tensor]]:
    """All numbers of the sides, and the gradients of a random mixture of them."""
    inputs = [problem.anchors, problem.candidates, *([] if problem.bias is None else [problem.bias])]
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    fresh = replace(problem, anchors=leaves[0], candidates=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
    values = [getattr(found, name) for found in run(fresh) if found is not None for name in FIELDS]
    generator = torch.Generator().manual_seed(0)
    total = leaves[0].sum() * 0
    for value in values:
        mixture = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        total = total + (torch.where(value.isfinite(), value, 0.0) * mixture).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return values, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def check(problem: Problem, tiling: Tiling) -> None:
    found, grads = with_gradients(problem, lambda p: p.tiled(tiling))
    expected, right = with_gradients(problem, Problem.dense)
    for values, others in ((found, expected), (grads, right)):
        for value, other in zip(values, others, strict=True):
            torch.testing.assert_close(value, other.to(value.dtype), rtol=1e-10, atol=1e-10)


@settings(max_examples=200)
@given(problems(), tilings)
def test_softmax_sides_are_the_dense_ones(problem: Problem, tiling: Tiling) -> None:
    check(problem, tiling)


@settings(max_examples=100)
@given(problems("sigmoid"), tilings)
def test_sigmoid_sides_are_the_dense_ones(problem: Problem, tiling: Tiling) -> None:
    check(problem, tiling)


@given(problems(), tilings)
def test_dense_and_sparse_tables_are_the_same(problem: Problem, tiling: Tiling) -> None:
    tables = {name: getattr(problem.pairs, name) for name in ("weights", "ignore")}
    given = {name: table.to_dense() for name, table in tables.items() if table is not None}
    sparse = {name: table.to_sparse() for name, table in given.items()}
    found = [
        with_gradients(replace(problem, pairs=replace(problem.pairs, **some)), lambda p: p.tiled(tiling))
        for some in (given, sparse)
    ]
    for values, others in zip(*found, strict=True):
        torch.testing.assert_close(values, others, rtol=1e-12, atol=1e-12)


@given(problems(), tilings)
def test_the_columns_are_the_rows_of_the_transposed_problem(problem: Problem, tiling: Tiling) -> None:
    rows, candidates = problem.anchors.shape[0], problem.candidates.shape[0]
    weights, out = roles(problem.pairs, rows, candidates)
    there = replace(problem, pairs=Pairs(weights=weights, ignore=out), columns=candidates, bias=None, boost=None)
    back = replace(
        there,
        anchors=there.candidates,
        candidates=there.anchors,
        pairs=Pairs(weights=weights.T, ignore=out.T),
        columns=0,
    )
    columns = there.tiled(tiling)[1]
    if columns is None:
        assert candidates == 0
        return
    for name in FIELDS:
        torch.testing.assert_close(getattr(columns, name), getattr(back.tiled(tiling)[0], name), rtol=1e-10, atol=1e-10)


# -- what a dense test would not show ------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paired(rows: int = 5, more: int = 3, dim: int = 4, **options: Any) -> Problem:
    problem = Problem(normal(rows, dim), normal(rows + more, dim, seed=1), Pairs(own=torch.arange(rows)), rows)
    return replace(problem, **options)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["softmax", "sigmoid"])
def test_nobody_there(shape: tuple[int, int], reduction: str) -> None:
    anchors, candidates = (normal(n, 2).requires_grad_() for n in shape)
    rows, columns = contrast(
        anchors,
        candidates,
        Pairs(itself=torch.arange(shape[0]).clamp(max=shape[1] - 1)),
        columns=shape[1] if reduction == "softmax" else 0,
        reduction=reduction,  # type: ignore[arg-type]
    )
    assert rows.count.tolist() == [0.0] * shape[0]
    assert rows.negatives.tolist() == [-INF if reduction == "softmax" else 0.0] * shape[0]
    assert columns is None or columns.negatives.tolist() == [-INF] * shape[1]
    found = [rows.negatives, rows.attraction] + ([] if columns is None else [columns.negatives, columns.positives])
    sum(value.sum() for value in found).backward()
    for leaf in (anchors, candidates):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_rows_with_nothing_left_spoil_no_gradient() -> None:
    problem = paired()
    ignore = torch.zeros(5, 8, dtype=torch.bool)
    ignore[2] = True
    ignore[2, 2] = False  # its positive: no negatives
    ignore[:, 4] = True  # a column without anything but its positive
    ignore[4, 4] = False
    problem = replace(problem, pairs=replace(problem.pairs, ignore=ignore))
    rows, columns = problem.tiled(Tiling(2, 2))
    assert rows.negatives[2] == -INF
    assert columns is not None
    assert columns.negatives[4] == -INF
    assert rows.count[2] == 0 == columns.count[4]
    check(problem, Tiling(2, 3))
    # A gradient that arrives at a log-sum-exp of nothing must vanish there, whatever it is.
    anchors = problem.anchors.clone().requires_grad_()
    replace(problem, anchors=anchors).tiled(Tiling(2, 2))[0].negatives.backward(torch.ones(5, dtype=torch.float64))
    assert anchors.grad is not None
    assert anchors.grad.isfinite().all()
    assert not anchors.grad[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(dtype: torch.dtype, reduction: Any) -> None:
    anchors, candidates = normal(6, 4).to(dtype), normal(9, 4, seed=1).to(dtype)
    leaves = [(anchors * 1e4).requires_grad_(), candidates.requires_grad_()]
    problem = Problem(*leaves, Pairs(own=torch.arange(6)), 6 if reduction == "softmax" else 0, reduction=reduction)
    sides = [found for found in problem.tiled(Tiling(4, 2)) if found is not None]
    exact = replace(problem, anchors=leaves[0].detach().double(), candidates=candidates.detach().double())
    for found, right in zip(sides, exact.dense(), strict=False):
        for name in FIELDS:
            value = getattr(found, name)
            assert value.isfinite().all()
            torch.testing.assert_close(value.double(), getattr(right, name).double(), rtol=2e-6, atol=1e-2)
    sum((found.negatives + found.positives).sum() for found in sides).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["softmax", "sigmoid"])
def test_16_bit_inputs_give_fp32_sides(dtype: torch.dtype, reduction: Any) -> None:
    anchors, candidates = (normal(20, 16) * 3).to(dtype), normal(31, 16, seed=1).to(dtype)
    columns = 20 if reduction == "softmax" else 0
    problem = Problem(anchors, candidates, Pairs(own=torch.arange(20)), columns, reduction=reduction)
    # The oracle sees the same rounded inputs: only the arithmetic is compared.
    exact = replace(problem, anchors=anchors.double(), candidates=candidates.double())
    found, grads = with_gradients(problem, lambda p: p.tiled(Tiling(7, 6)))
    expected, right = with_gradients(exact, Problem.dense)
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), other.double(), rtol=1e-5, atol=1e-4)
    for grad, other in zip(grads, right, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), other, rtol=2e-2, atol=2e-2)


def test_a_boost_changes_values_and_not_gradients() -> None:
    anchors, candidates = normal(1, 3).requires_grad_(), normal(1, 3, seed=1)
    plain = torch.autograd.grad(contrast(anchors, candidates, Pairs())[0].negatives.sum(), anchors)[0]
    boost = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    rows, _ = contrast(anchors, candidates, Pairs(), boost_B=boost)
    # One negative: its log-sum-exp is its logit, times the boost in value, as it is in gradient.
    assert float(rows.negatives.detach()) == pytest.approx(3 * float(anchors[0].detach() @ candidates[0]))
    grad, none = torch.autograd.grad(rows.negatives.sum(), (anchors, boost), allow_unused=True)
    torch.testing.assert_close(grad, plain)
    assert none is None


@pytest.mark.parametrize("duplicates", ["positive", "ignore", "negative"])
def test_keys_have_63_bits_and_one_that_equals_nothing(duplicates: Duplicates) -> None:
    keys = torch.tensor([2**62, 2**62 + 1, NO_KEY, NO_KEY, -(2**62)])  # the first two are equal in fp64
    problem = paired(5, 0, pairs=Pairs(own=torch.arange(5), keys=(keys, keys), duplicates=duplicates))
    rows, _ = problem.tiled(Tiling(2, 2))
    assert rows.count.tolist() == [4.0] * 5
    assert rows.weight.tolist() == [1.0] * 5


def test_a_positive_is_never_vetoed() -> None:
    veto = Veto(torch.full((5,), -1e9, dtype=torch.float64))
    rows, columns = paired(pairs=Pairs(own=torch.arange(5), vetoes=(veto,))).tiled(Tiling(2, 3))
    assert columns is not None
    for found in (rows, columns):
        assert found.count.tolist() == [0.0] * 5
        assert found.weight.tolist() == [1.0] * 5
        assert found.positives.isfinite().all()


def test_autocast_changes_nothing() -> None:
    anchors, candidates = normal(32, 16).float() * 4, normal(40, 16, seed=1).float()

    def run() -> list[Tensor]:
        leaves = [anchors.clone().requires_grad_(), candidates.clone().requires_grad_()]
        rows, columns = contrast(*leaves, Pairs(own=torch.arange(32)), columns=32)
        assert columns is not None
        values = [rows.negatives, columns.negatives]
        return [*values, *torch.autograd.grad(sum(value.sum() for value in values), leaves)]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()  # with its backward: a trainer may well have that inside
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


def test_nothing_outlives_the_step() -> None:
    problem = paired(anchors=normal(5, 4).requires_grad_())
    watched = weakref.ref(problem.pairs)
    gc.collect()
    gc.disable()
    try:
        rows, columns = problem.tiled()
        rows.negatives.sum().backward()
        # Not held by a circle until the collector comes: that would be the last steps' candidates on the GPU.
        del problem, rows, columns
        assert watched() is None
    finally:
        gc.enable()


def test_backward_twice_is_the_same_twice() -> None:
    anchors = normal(5, 4).requires_grad_()
    total = paired(anchors=anchors).tiled(Tiling(2, 2))[0].negatives.sum()
    first, second = (torch.autograd.grad(total, anchors, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_it_cannot_do_it_does_not_do_wrongly() -> None:
    anchors, candidates = normal(5, 4).requires_grad_(), normal(8, 4, seed=1)
    total = contrast(anchors, candidates, Pairs())[0].negatives.square().sum()
    (grad,) = torch.autograd.grad(total, anchors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    rows, _ = contrast(anchors, candidates, Pairs())
    candidates.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.negatives.sum().backward()


# -- kernels and memory --------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_kernels() -> Any:
    tiles_module._compiled.cache_clear()
    yield
    tiles_module._compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("reduction", ["softmax", "sigmoid"])
def test_compiled_kernels_agree_with_eager_ones(reduction: Any, caplog: pytest.LogCaptureFixture) -> None:
    ignore = torch.zeros(9, 12, dtype=torch.bool)
    ignore[4, :4] = ignore[4, 5:] = True
    problem = paired(9, 3, pairs=Pairs(own=torch.arange(9), ignore=ignore), reduction=reduction)
    problem.columns = 9 if reduction == "softmax" else 0
    found, grads = with_gradients(problem, lambda p: p.tiled(Tiling(4, 5, kernels="compiled")))
    expected, right = with_gradients(problem, lambda p: p.tiled(Tiling(4, 5, kernels="eager")))
    for values, others in ((found, expected), (grads, right)):
        for value, other in zip(values, others, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    if tiles_module._compiled(torch.device("cpu")) is tiles_module.EAGER:
        assert "tiles run uncompiled on cpu" in caplog.text
        pytest.skip("torch.compile does not run on this machine")


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("late", [True, False])
def test_without_a_compiler_the_tiles_run_all_the_same(
    late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story about it")

    # It fails when first called (no g++), or at once (a Python that dynamo does not know).
    monkeypatch.setattr(torch, "compile", (lambda *_, **__: broken) if late else broken)
    found, _ = paired().tiled(Tiling(kernels="compiled"))
    torch.testing.assert_close(found.negatives, paired().dense()[0].negatives)
    paired().tiled(Tiling(kernels="compiled"))
    assert [record.getMessage() for record in caplog.records] == ["tiles run uncompiled on cpu: no compiler here"]


def test_memory_is_linear() -> None:
    """8192 x 8192 logits are 256 MiB, and a dense softmax needs several of them."""
    program = """
        import torch
        from rayemb.parallel import Pairs, contrast

        def status(name):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

        def step(n):
            anchors, candidates = (torch.randn(n, 64, requires_grad=True) for _ in range(2))
            keys = torch.randint(0, n, (n,))
            pairs = Pairs(own=torch.arange(n), keys=(keys, keys), duplicates="positive")
            rows, columns = contrast(anchors, candidates, pairs, columns=n)
            (rows.negatives + rows.positives + columns.negatives).sum().backward()

        torch.set_num_threads(1)
        step(64)  # the libraries' own buffers
        # Not ru_maxrss: that remembers the process that started this one.
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        step(8192)
        print(status("VmHWM") - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(program)]
    kilobytes = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert kilobytes < 64 * 1024
    assert kilobytes > 4 * 1024  # something was measured: the vectors alone are 4 MiB


def test_nan_is_not_hidden() -> None:
    anchors = normal(3, 2)
    anchors[1, 0] = math.nan
    rows, _ = contrast(anchors, normal(4, 2, seed=1), Pairs(own=torch.arange(3)))
    assert rows.negatives.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("frozen", ["anchors", "candidates"])
def test_a_frozen_side_changes_nothing_for_the_other(frozen: str) -> None:
    found = []
    for sides in ({"anchors", "candidates"}, {"anchors", "candidates"} - {frozen}):
        anchors, candidates = normal(6, 4), normal(6, 4, seed=1)
        learned = [
            x.requires_grad_() for x, name in ((anchors, "anchors"), (candidates, "candidates")) if name in sides
        ]
        rows, columns = contrast(
            anchors, candidates, Pairs(own=torch.arange(6)), columns=6, exchange=Alone(Tiling(2, 3))
        )
        assert columns is not None
        (rows.negatives.sum() + (columns.negatives * columns.positives).sum()).backward()
        found.append([x.grad for x in learned])
    kept = 0 if frozen == "candidates" else 1
    assert len(found[1]) == 1
    torch.testing.assert_close(found[1][0], found[0][kept])
