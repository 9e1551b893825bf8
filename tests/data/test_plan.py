"""The plan of global batches: what comes, in which order, once each, and from any state on."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.data import CorpusError
from rayemb.data.corpus import RowGroup
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.plan import GlobalBatch, Planner
from rayemb.data.samplers import ClassBalancedConfig, ClusterStratifiedConfig, LengthBucketedConfig, ShuffledConfig


def groups_of(*sizes: int) -> list[RowGroup]:
    firsts = np.cumsum([0, *sizes])
    return [RowGroup("f", i, rows, int(first)) for i, (rows, first) in enumerate(zip(sizes, firsts, strict=False))]


class Columns:
    """Keys by ordinal: all different, unless a modulus says after how many they come again."""

    def __init__(self, **moduli: int) -> None:
        self.moduli = moduli
        self.groups_read = 0

    def __call__(self, groups: Sequence[RowGroup], column: str) -> np.ndarray:
        self.groups_read += len(groups)
        ordinals = np.concatenate([np.arange(g.first, g.first + g.rows) for g in groups])
        return ordinals % self.moduli.get(column, 10**9)


def planner(
    rows: dict[str, list[int]],
    *,
    size: int = 4,
    seed: int = 0,
    entries: dict[str, dict[str, Any]] | None = None,
    columns: Columns | None = None,
    state: dict[str, Any] | None = None,
    window: int = 8,
    **mix: Any,
) -> Planner:
    made = {
        name: CorpusEntry(**{"sampler": ShuffledConfig(window_rows=window), **(entries or {}).get(name, {})})
        for name in rows
    }
    groups = {name: groups_of(*sizes) for name, sizes in rows.items()}
    read = dict.fromkeys(rows, columns or Columns())
    return Planner(made, groups, read, MixConfig(**mix), batch_size=size, seed=seed, state=state)


def rows_of(batch: GlobalBatch, corpus: int = 0) -> list[int]:
    return [int(row) for part in batch.parts if part.corpus == corpus for row in part.ordinals]


def take(plan: Planner, steps: int) -> list[GlobalBatch]:
    return [batch for batch in (plan.next() for _ in range(steps)) if batch is not None]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(sizes=sizes, size=st.integers(1, 12), window=st.integers(1, 40), seed=st.integers(0, 5))
def test_every_epoch_has_every_row_once(sizes: list[int], size: int, window: int, seed: int) -> None:
    total = sum(sizes)
    plan = planner({"a": sizes}, size=size, seed=seed, window=window)
    stream = [row for batch in take(plan, -(-3 * total // size)) for row in rows_of(batch)]
    epochs = [stream[at : at + total] for at in range(0, 3 * total, total)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    if total > 12:
        assert epochs[0] != epochs[1]


@given(
    sizes=st.tuples(sizes, sizes),
    seed=st.integers(0, 5),
    kill=st.integers(0, 20),
    batches=st.sampled_from(["one_corpus", "mixed"]),
    order=st.sampled_from(["random", "round_robin"]),
    exhausted=st.sampled_from(["repeat", "stop", "drop"]),
    distinct=st.sampled_from([[], ["text"], ["text", "query"]]),
    sampler=st.sampled_from([ShuffledConfig(window_rows=10), LengthBucketedConfig(window_rows=10)]),
)
def test_a_plan_goes_on_from_any_state_as_if_nothing_had_happened(
    sizes: tuple[list[int], list[int]],
    seed: int,
    kill: int,
    batches: Any,
    order: Any,
    exhausted: Any,
    distinct: Any,
    sampler: Any,
) -> None:
    if batches == "mixed":
        sampler = ShuffledConfig(window_rows=10)
    settings: dict[str, Any] = {
        "rows": dict(zip("ab", sizes, strict=True)),
        "seed": seed,
        "entries": {key: {"sampler": sampler} for key in "ab"},
        "columns": Columns(text=7, query=11),
        "batches": batches,
        "order": order,
        "exhausted": exhausted,
        "distinct": distinct,
    }
    whole = take(planner(**settings), 25)
    killed = planner(**settings)
    take(killed, kill)
    # Through JSON, as a checkpoint does it.
    rest = take(planner(**settings, state=json.loads(json.dumps(killed.state))), 25 - kill)
    assert [[(part.corpus, part.ordinals.tolist()) for part in batch.parts] for batch in rest] == [
        [(part.corpus, part.ordinals.tolist()) for part in batch.parts] for batch in whole[kill:]
    ]
    assert [batch.step for batch in whole] == list(range(len(whole)))


def test_the_state_is_a_few_integers() -> None:
    plan = planner({"a": [100] * 50, "b": [100] * 50}, size=64, window=1000)
    take(plan, 100)
    assert len(json.dumps(plan.state)) < 400


def test_seeking_reads_the_window_at_hand_and_no_other() -> None:
    columns = Columns()
    settings: dict[str, Any] = {"entries": {"a": {"sampler": LengthBucketedConfig(window_rows=100)}}, "size": 10}
    plan = planner({"a": [10] * 1000}, columns=columns, **settings)
    take(plan, 800)
    columns.groups_read = 0
    take(planner({"a": [10] * 1000}, columns=columns, state=plan.state, **settings), 1)
    assert columns.groups_read == 10


def test_the_seed_and_the_name_decide_the_order_and_other_corpora_do_not() -> None:
    alone = [rows_of(batch) for batch in take(planner({"a": [10] * 5}), 8)]
    beside = planner({"b": [10] * 3, "a": [10] * 5}, batches="one_corpus", order="round_robin")
    assert [rows_of(batch, 1) for batch in take(beside, 16) if batch.parts[0].corpus == 1][:8] == alone
    assert [rows_of(batch) for batch in take(planner({"a": [10] * 5}, seed=1), 8)] != alone
    assert [rows_of(batch) for batch in take(planner({"other": [10] * 5}), 8)] != alone


def test_one_corpus_batches_follow_the_weights() -> None:
    entries = {"a": {"weight": 3.0}, "b": {"weight": 1.0}}
    plan = planner({"a": [50], "b": [50]}, entries=entries)
    found = Counter(batch.parts[0].corpus for batch in take(plan, 4000))
    assert all(len(batch.parts) == 1 for batch in take(plan, 10))
    assert found[0] / 4000 == pytest.approx(0.75, abs=3 * (0.75 * 0.25 / 4000) ** 0.5)


def test_in_turn_is_never_a_step_away_from_the_weights() -> None:
    entries = {"a": {"weight": 5.0}, "b": {"weight": 3.0}, "c": {"weight": 1.0}}
    plan = planner({"a": [50], "b": [50], "c": [50]}, entries=entries, order="round_robin")
    chosen = np.array([batch.parts[0].corpus for batch in take(plan, 900)])
    for steps in range(1, 901):
        counts = np.bincount(chosen[:steps], minlength=3)
        assert np.all(np.abs(counts - np.array([5, 3, 1]) / 9 * steps) < 1.0 + 1e-9)
    equal = planner({"a": [50], "b": [70], "c": [10]}, order="round_robin", temperature=1e9)
    turns = [batch.parts[0].corpus for batch in take(equal, 9)]
    assert turns == turns[:3] * 3
    assert sorted(turns[:3]) == [0, 1, 2]


def test_mixed_batches_have_the_shares_in_expectation_and_never_a_row_off() -> None:
    entries = {"a": {"weight": 0.45}, "b": {"weight": 0.35}, "c": {"weight": 0.2}}
    plan = planner({"a": [90], "b": [80], "c": [70]}, size=7, entries=entries, batches="mixed")
    counts = np.array([[len(rows_of(batch, c)) for c in range(3)] for batch in take(plan, 4000)])
    expected = 7 * np.array([0.45, 0.35, 0.2])
    assert np.all(counts.sum(1) == 7)
    assert np.all(np.abs(counts - expected) < 1)
    assert counts.mean(0) == pytest.approx(expected, abs=3 * 0.5 / 4000**0.5)


def test_shares_follow_sizes_and_a_temperature_evens_them_out() -> None:
    rows = {"a": [900], "b": [100]}
    assert planner(rows).shares == pytest.approx([0.9, 0.1])
    assert planner(rows, temperature=2.0).shares == pytest.approx([0.75, 0.25])
    assert planner(rows, temperature=1e9).shares == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("batches", ["one_corpus", "mixed"])
def test_stop_ends_with_the_first_corpus_that_does(batches: Any) -> None:
    plan = planner({"a": [10], "b": [1000]}, temperature=1e9, exhausted="stop", batches=batches, order="round_robin")
    found = list(plan)
    assert sorted(row for batch in found for row in rows_of(batch)) == list(range(10))
    assert len(found) < 10
    assert plan.next() is None


@pytest.mark.parametrize("batches", ["one_corpus", "mixed"])
def test_drop_goes_on_until_every_row_of_every_corpus_has_come_once(batches: Any) -> None:
    found = list(planner({"a": [10], "b": [7, 30]}, exhausted="drop", batches=batches))
    assert sorted(row for batch in found for row in rows_of(batch)) == list(range(10))
    assert sorted(row for batch in found for row in rows_of(batch, 1)) == list(range(37))


def test_repeat_begins_a_new_epoch_in_another_order() -> None:
    found = [row for batch in take(planner({"a": [10, 10]}, size=5), 8) for row in rows_of(batch)]
    assert sorted(found[:20]) == sorted(found[20:]) == list(range(20))
    assert found[:20] != found[20:]


def test_a_share_of_the_row_groups() -> None:
    plan = planner({"a": [10] * 8}, entries={"a": {"fraction": 0.25}}, exhausted="stop")
    assert sorted(row for batch in plan for row in rows_of(batch)) == list(range(20))


def test_no_two_rows_of_a_global_batch_share_a_key_and_none_is_lost() -> None:
    """Ten copies of each text in batches of 128, over all ranks: a library that looks at each rank alone leaves 12."""
    settings: dict[str, Any] = {"size": 128, "window": 2048, "columns": Columns(text=640), "exhausted": "stop"}
    plan = planner({"a": [64] * 100}, distinct=["text"], **settings)
    found = list(plan)
    for batch in found:
        texts = [row % 640 for row in rows_of(batch)]
        assert len(set(texts)) == len(texts)
    left_out = plan.streams[0].cursor.left_out
    assert len([row for batch in found for row in rows_of(batch)]) + left_out == 6400
    assert left_out < 64
    assert sum(len(rows_of(batch)) == 128 for batch in found) >= 49
    without = [[row % 640 for row in rows_of(batch)] for batch in planner({"a": [64] * 100}, **settings)]
    assert np.mean([len(texts) - len(set(texts)) for texts in without]) > 8


def test_keys_are_distinct_across_the_corpora_of_a_mixed_batch() -> None:
    plan = planner({"a": [500], "b": [500]}, size=50, columns=Columns(text=120), distinct=["text"], batches="mixed")
    for batch in take(plan, 40):
        texts = [row % 120 for corpus in (0, 1) for row in rows_of(batch, corpus)]
        assert len(texts) == 50 == len(set(texts))


def test_too_few_different_keys_make_short_batches_and_no_hang() -> None:
    plan = planner({"a": [100]}, size=16, columns=Columns(concept=5), distinct=["concept"])
    for batch in take(plan, 50):
        concepts = [row % 5 for row in rows_of(batch)]
        assert len(concepts) == 5 == len(set(concepts))
    assert len(plan.streams[0].cursor.waiting) <= 8 * 16


def test_batches_of_a_sampler_lose_their_duplicates_and_keep_their_make() -> None:
    sampler = ClassBalancedConfig(per_class=2, window_rows=200)
    columns = Columns(concept=10, text=25)
    plan = planner({"a": [200]}, size=8, entries={"a": {"sampler": sampler}}, columns=columns, distinct=["text"])
    for batch in take(plan, 20):
        rows = np.array(rows_of(batch))
        assert len(set(rows % 25)) == len(rows)
        assert np.bincount(rows % 10).max() <= 2


def test_rows_that_no_batch_can_have_are_counted() -> None:
    sampler = ClusterStratifiedConfig(column="concept", window_rows=1000)
    plan = planner({"a": [100]}, entries={"a": {"sampler": sampler}}, columns=Columns(concept=3), exhausted="stop")
    used = sum(len(rows_of(batch)) for batch in plan)
    assert used + plan.streams[0].cursor.left_out == 100


def test_a_sampler_that_never_has_a_batch_is_an_error_and_no_hang() -> None:
    sampler = ClassBalancedConfig(per_class=2)
    plan = planner({"a": [9]}, entries={"a": {"sampler": sampler}}, columns=Columns(concept=9))
    with pytest.raises(CorpusError, match="no batch of 4 for the sampler class_balanced"):
        plan.next()


def test_a_corpus_without_rows_is_named() -> None:
    with pytest.raises(CorpusError, match="no rows") as caught:
        planner({"a": [3], "b": []})
    assert caught.value.where == "train.corpora.b.split"
