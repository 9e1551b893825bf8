"""Pairs by group id, against loops over explicit pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayemb.losses import pair_by_group
from rayemb.losses.pairs import Duplicates


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["positive", "ignore", "negative"]),
)
def test_every_pair_is_what_the_words_say(groups: list[int], before: int, after: int, duplicates: Duplicates) -> None:
    candidates = [7] * before + groups + [1] * after
    pairs = pair_by_group(torch.tensor(groups), torch.tensor(candidates), before, duplicates)
    for i, group in enumerate(groups):
        for j, other in enumerate(candidates):
            own, same = j == before + i, group == other
            positive = own or (same and duplicates == "positive")
            ignored = same and not own and duplicates == "ignore"
            assert pairs.positives[i, j] == float(positive)
            assert (pairs.ignore is not None and bool(pairs.ignore[i, j])) == ignored


@pytest.mark.parametrize("duplicates", ["positive", "ignore", "negative"])
def test_every_row_has_its_own_positive_and_never_ignores_it(duplicates: Duplicates) -> None:
    groups = torch.tensor([4, 4, 5])
    pairs = pair_by_group(groups, groups, 0, duplicates)
    assert (pairs.positives.diagonal() == 1).all()
    if pairs.ignore is not None:
        assert not (pairs.ignore & (pairs.positives > 0)).any()


def test_group_ids_use_all_63_bits() -> None:
    big = 2**62
    groups = torch.tensor([big, big + 1])  # equal as float64
    assert torch.equal(pair_by_group(groups, groups, 0, "positive").positives, torch.eye(2))
