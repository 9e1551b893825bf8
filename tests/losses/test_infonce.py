"""InfoNCE against loops over explicit pairs, torch's cross-entropy and closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import InfoNCE, InfoNCEConfig, Pairs, pair_by_group
from rayemb.losses.infonce import info_nce


def unit(rows: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(
        dtype
    )


def by_loops(s: Tensor, w: Tensor, ignore: Tensor | None, scale: float, margin: float) -> list[float]:
    """The definition, pair by pair, in Python floats."""
    losses = []
    for i in range(s.shape[0]):
        logits = {}
        for j in range(s.shape[1]):
            if ignore is None or not ignore[i, j]:
                logits[j] = scale * (float(s[i, j]) - (margin if w[i, j] > 0 else 0.0))
        total = math.fsum(math.exp(x) for x in logits.values())
        weights = [float(w[i, j]) for j in range(s.shape[1])]
        loss = -math.fsum(weights[j] * (logits[j] - math.log(total)) for j in logits if weights[j])
        losses.append(loss / math.fsum(weights))
    return losses


@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.2]),
    st.floats(1, 20),
    st.booleans(),
)
def test_it_is_its_definition(rows: int, more: int, seed: int, margin: float, scale: float, with_ignore: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = rows + more
    s = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    w = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    w = w * (torch.rand(rows, columns, generator=generator) < 0.3)
    w[torch.arange(rows), torch.arange(rows)] = 1.0
    ignore = (torch.rand(rows, columns, generator=generator) < 0.3) & (w == 0) if with_ignore else None
    losses = info_nce(s, Pairs(w, ignore), scale=scale, margin=margin)
    expected = torch.tensor(by_loops(s, w, ignore, scale, margin), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)


def test_one_positive_is_torchs_cross_entropy() -> None:
    anchors, candidates = unit(5, seed=1), unit(9, seed=2)
    groups = torch.arange(9)
    loss = InfoNCE(InfoNCEConfig(temperature=0.1)).double()
    losses = loss(anchors, candidates, pair_by_group(groups[2:7], groups, 2, "positive"))
    expected = torch.nn.functional.cross_entropy(anchors @ candidates.T / 0.1, groups[2:7], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-7)


def test_several_positives_are_the_mean_of_the_cross_entropies() -> None:
    anchors, candidates = unit(1, seed=1), unit(6, seed=2)
    positives = torch.tensor([[0.0, 1, 0, 1, 1, 0]])
    losses = info_nce(anchors @ candidates.T, Pairs(positives), scale=7.0)
    logits = (anchors @ candidates.T * 7.0).expand(3, -1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3, 4]))
    torch.testing.assert_close(losses[0], expected)


def test_closed_forms() -> None:
    same = torch.ones(4, 3, dtype=torch.float64)
    groups = torch.arange(4)
    # All candidates alike: log M. Orthogonal pairs at temperature t: log(1 + (M - 1) exp(-1 / t)).
    assert float(info_nce(same @ same.T, pair_by_group(groups, groups, 0, "positive"), scale=3.0)[0]) == pytest.approx(
        math.log(4)
    )
    axes = torch.eye(4, dtype=torch.float64)
    losses = info_nce(axes @ axes.T, pair_by_group(groups, groups, 0, "positive"), scale=1 / 0.5)
    assert float(losses[2]) == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    # All candidates are positives and alike: still log M, for each holds 1/M of the mass.
    everything = Pairs(torch.ones(4, 4))
    assert float(info_nce(same @ same.T, everything, scale=3.0)[1]) == pytest.approx(math.log(4))


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_alone_has_nothing_to_learn(rows: int) -> None:
    vectors = unit(rows)[:1]
    losses = info_nce(vectors @ vectors.T, Pairs(torch.ones(1, 1)), scale=50.0)
    assert losses.tolist() == [0.0]


def test_no_rows_give_no_losses() -> None:
    assert info_nce(torch.zeros(0, 5), Pairs(torch.zeros(0, 5)), scale=1.0).shape == (0,)


def test_an_ignored_candidate_might_as_well_not_be_there() -> None:
    anchors, candidates = unit(3, seed=1), unit(5, seed=2)
    groups = torch.arange(5)
    ignore = torch.zeros(3, 5, dtype=torch.bool)
    ignore[:, 4] = True
    pairs = Pairs(torch.eye(3, 5), ignore)
    without = pair_by_group(groups[:3], groups[:4], 0, "negative")
    torch.testing.assert_close(
        info_nce(anchors @ candidates.T, pairs, scale=9.0),
        info_nce(anchors @ candidates[:4].T, without, scale=9.0),
    )


def test_an_ignored_candidate_gets_no_gradient_and_spoils_none() -> None:
    s = (unit(3, seed=1) @ unit(5, seed=2).T).requires_grad_()
    ignore = torch.zeros(3, 5, dtype=torch.bool)
    ignore[1, 4] = True
    info_nce(s, Pairs(torch.eye(3, 5), ignore), scale=9.0).sum().backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad[1, 4] == 0
    assert s.grad[0, 4] > 0


def test_policies_for_duplicates() -> None:
    anchors, candidates = unit(4, seed=1), unit(4, seed=2)
    groups = torch.tensor([0, 0, 1, 2])
    losses = {
        policy: InfoNCE(InfoNCEConfig(duplicates=policy)).double()(
            anchors, candidates, pair_by_group(groups, groups, 0, policy)
        )
        for policy in ("positive", "ignore", "negative")
    }
    # Rows without a duplicate are the same under each policy; leaving a negative out lowers the loss.
    for policy in ("ignore", "negative"):
        torch.testing.assert_close(losses["positive"][2:], losses[policy][2:])
    assert (losses["ignore"][:2] < losses["negative"][:2]).all()
    assert (losses["positive"][:2] != losses["negative"][:2]).all()


def test_a_margin_makes_it_harder() -> None:
    anchors, candidates = unit(4, seed=1), unit(4, seed=2)
    pairs = pair_by_group(torch.arange(4), torch.arange(4), 0, "positive")
    losses = [InfoNCE(InfoNCEConfig(margin=m)).double()(anchors, candidates, pairs).mean() for m in (0.0, 0.1, 0.3)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("duplicates", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_gradients_of_both_sides_and_the_temperature(duplicates: str, margin: float) -> None:
    config = from_mapping(InfoNCEConfig, {"temperature": 0.3, "margin": margin, "duplicates": duplicates})
    loss = InfoNCE(config).double()
    groups = torch.tensor([0, 0, 1, 2])
    pairs = pair_by_group(groups[1:], groups, 1, config.duplicates)
    log_scale = loss.log_scale.detach().clone().requires_grad_()

    def run(anchors: Tensor, candidates: Tensor, log_scale: Tensor) -> Tensor:
        out = torch.func.functional_call(loss, {"log_scale": log_scale}, (anchors, candidates, pairs))
        assert isinstance(out, Tensor)
        return out

    inputs = (unit(3, seed=1).requires_grad_(), unit(4, seed=2).requires_grad_(), log_scale)
    assert torch.autograd.gradcheck(run, inputs)


def test_the_gradient_of_a_batch_alone_equals_finite_differences_of_the_temperature() -> None:
    anchors, candidates = unit(4, seed=3), unit(4, seed=4)
    pairs = pair_by_group(torch.arange(4), torch.arange(4), 0, "positive")

    def at(log_scale: float) -> float:
        return float(info_nce(anchors @ candidates.T, pairs, scale=math.exp(log_scale)).mean())

    loss = InfoNCE(InfoNCEConfig(temperature=0.2)).double()
    loss(anchors, candidates, pairs).mean().backward()
    start, step = -math.log(0.2), 1e-5
    assert loss.log_scale.grad is not None
    assert float(loss.log_scale.grad) == pytest.approx((at(start + step) - at(start - step)) / (2 * step), rel=1e-5)


# -- numerics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_inputs_give_an_fp32_loss_close_to_fp64(dtype: torch.dtype, autocast: bool) -> None:
    anchors, candidates = unit(16, 32, seed=1).to(dtype), unit(16, 32, seed=2).to(dtype)
    pairs = pair_by_group(torch.arange(16), torch.arange(16), 0, "positive")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = InfoNCE(InfoNCEConfig())(anchors, candidates, pairs)
    # The oracle sees the same rounded inputs: only the arithmetic is compared.
    expected = InfoNCE(InfoNCEConfig()).double()(anchors.double(), candidates.double(), pairs)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


def test_sides_of_different_dtypes_meet_in_fp32() -> None:
    pairs = pair_by_group(torch.arange(3), torch.arange(3), 0, "positive")
    for a, b in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        assert InfoNCE(InfoNCEConfig())(unit(3, dtype=a), unit(3, seed=1, dtype=b), pairs).dtype == torch.float32


def test_the_sharpest_temperature_stays_finite() -> None:
    anchors = unit(64, dtype=torch.float32)
    pairs = pair_by_group(torch.arange(64), torch.arange(64), 0, "positive")
    losses = InfoNCE(InfoNCEConfig(temperature=1e-4, learnable_temperature=False))(anchors, -anchors, pairs)
    assert losses.isfinite().all()
    assert losses.max() > 1000


# -- the temperature -------------------------------------------------------------------------------------------


def test_the_temperature_starts_where_the_config_says() -> None:
    assert InfoNCE(InfoNCEConfig(temperature=0.05)).temperature == pytest.approx(0.05)


def test_the_temperature_never_goes_below_its_floor() -> None:
    loss = InfoNCE(InfoNCEConfig(min_temperature=0.02))
    with torch.no_grad():
        loss.log_scale.fill_(100.0)
    assert loss.temperature == pytest.approx(0.02)
    vectors = unit(3, dtype=torch.float32)
    pairs = pair_by_group(torch.arange(3), torch.arange(3), 0, "positive")
    torch.testing.assert_close(loss(vectors, vectors, pairs), info_nce(vectors @ vectors.T, pairs, scale=50.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_temperature_beyond_its_floor_can_come_back_and_cannot_go_further(sign: float) -> None:
    loss = InfoNCE(InfoNCEConfig(min_temperature=0.02)).double()
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    anchors = unit(6, seed=1)
    # Perfect pairs want a sharper softmax, wrong pairs a softer one.
    pairs = pair_by_group(torch.arange(6), torch.arange(6), 0, "positive")
    loss(anchors, sign * anchors, pairs).mean().backward()
    assert loss.log_scale.grad is not None
    gradient = float(loss.log_scale.grad)
    assert gradient > 0 if sign < 0 else gradient == 0


def test_training_moves_the_temperature_to_its_floor_and_back() -> None:
    loss = InfoNCE(InfoNCEConfig(temperature=0.05, min_temperature=0.02)).double()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    anchors = unit(6, seed=1)
    pairs = pair_by_group(torch.arange(6), torch.arange(6), 0, "positive")
    for sign, steps in ((1.0, 60), (-1.0, 60)):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(anchors, sign * anchors, pairs).mean().backward()
            optimizer.step()
        if sign > 0:
            assert loss.temperature == pytest.approx(0.02)
    assert loss.temperature > 0.1


def test_a_fixed_temperature_is_not_trained_and_has_no_floor() -> None:
    loss = InfoNCE(InfoNCEConfig(temperature=0.001, learnable_temperature=False))
    assert loss.temperature == pytest.approx(0.001, rel=1e-5)
    assert not any(p.requires_grad for p in loss.parameters())


def test_a_start_below_the_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="below min_temperature"):
        from_mapping(InfoNCEConfig, {"temperature": 0.005})
