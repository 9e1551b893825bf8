"""The training stream: its order is a function of seed, epoch and position, whoever consumes it."""

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.data import Corpus, CorpusError, train_stream
from rayemb.data.corpus import RowGroup
from rayemb.data.keys import keys_of
from rayemb.data.stream import GROUPS_PER_UNIT, Decoder, Unit, plan
from rayemb.models import ImageLimits, TextTokenizer, TokenizerConfig
from tests.data.corpora import corrupt, write_corpus

ROWS = 110
TOKENIZER = TextTokenizer.train(
    [f"{word} {n}" for n in range(ROWS) for word in ("text", "texte", "текст")],
    TokenizerConfig(vocab_size=512, max_length=8),
)
Batch = dict[str, Any]

# -- the plan, without Ray -------------------------------------------------------------------------------------

groups_of = st.lists(st.integers(1, 9), min_size=1, max_size=60).map(
    lambda sizes: [RowGroup("f", i, rows) for i, rows in enumerate(sizes)]
)


@given(groups_of, st.integers(0, 5), st.integers(0, 400), st.integers(0, 400))
def test_the_units_cover_the_range_without_gaps(groups: list[RowGroup], seed: int, start: int, more: int) -> None:
    units = list(plan(groups, seed=seed, start=start, stop=start + more))
    if not more:
        assert not units
        return
    assert units[0].first <= start < units[0].first + units[0].rows
    assert units[-1].first < start + more <= units[-1].first + units[-1].rows
    for before, after in itertools.pairwise(units):
        assert after.first == before.first + before.rows
    assert all(unit.rows == sum(g.rows for g in unit.groups) for unit in units)
    assert all(len(unit.groups) <= GROUPS_PER_UNIT for unit in units)


@given(groups_of, st.integers(0, 5), st.integers(0, 3))
def test_every_group_is_there_once_an_epoch(groups: list[RowGroup], seed: int, epoch: int) -> None:
    per_epoch = sum(g.rows for g in groups)
    units = list(plan(groups, seed=seed, start=epoch * per_epoch, stop=(epoch + 1) * per_epoch))
    assert {unit.epoch for unit in units} == {epoch}
    assert sorted(g.index for unit in units for g in unit.groups) == list(range(len(groups)))


@given(groups_of, st.integers(0, 5), st.integers(0, 300), st.integers(0, 300))
def test_a_resumed_plan_is_the_tail(groups: list[RowGroup], seed: int, start: int, more: int) -> None:
    stop = start + more
    whole = list(plan(groups, seed=seed, start=0, stop=stop))
    tail = list(plan(groups, seed=seed, start=start, stop=stop))
    assert tail == [unit for unit in whole if unit.first + unit.rows > start and more]


def test_seed_and_epoch_change_the_order() -> None:
    groups = [RowGroup("f", i, 1) for i in range(40)]

    def order(seed: int, epoch: int) -> list[int]:
        units = plan(groups, seed=seed, start=40 * epoch, stop=40 * (epoch + 1))
        return [g.index for unit in units for g in unit.groups]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_a_far_position_is_reached_without_walking_there() -> None:
    groups = [RowGroup("f", i, 7) for i in range(33)]
    (unit, *_) = plan(groups, seed=0, start=10**15, stop=10**15 + 1)
    assert unit.first <= 10**15 < unit.first + unit.rows


def test_no_rows_are_an_error() -> None:
    with pytest.raises(CorpusError, match="no rows"):
        list(plan([], seed=0, start=0, stop=1))


@given(groups_of)
def test_a_unit_survives_its_way_through_a_dataset(groups: list[RowGroup]) -> None:
    for unit in plan(groups, seed=0, start=0, stop=50):
        assert Unit.from_json(unit.to_json()) == unit


# -- one unit, without Ray -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("stream") / "corpus", {"train": [37, 50, 23]}, concepts=40)


def numbers(batch: Batch) -> list[int]:
    """Which row of the corpus each row of a batch is, from its colour."""
    return [int(p[0, 0, 0]) + 256 * int(p[1, 0, 0]) for p in batch["pixels"]]


def decoded(corpus: Corpus, start: int, stop: int, seed: int = 3, main_caption: float = 0.5) -> Batch:
    decoder = Decoder(TOKENIZER, 8, seed, start, stop, main_caption, ImageLimits())
    parts = [decoder(unit) for unit in plan(corpus.row_groups("train"), seed=seed, start=start, stop=stop)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_columns_belong_together(corpus: Corpus) -> None:
    batch = decoded(corpus, 0, ROWS)
    assert batch["pixels"].shape == (ROWS, 3, 8, 8)
    assert batch["pixels"].dtype == np.uint8
    assert batch["tokens"].shape == (ROWS, TOKENIZER.max_length)
    assert batch["position"].tolist() == list(range(ROWS))
    for n, tokens, group in zip(numbers(batch), batch["tokens"], batch["group"], strict=True):
        captions = TOKENIZER([f"text {n}", f"texte {n}", f"текст {n}"], pad_to=TOKENIZER.max_length)
        assert any((tokens == caption).all() for caption in captions)
        assert group == keys_of([f"concept {n % 40}"])[0]


def test_every_row_once_an_epoch_and_two_epochs_in_different_order(corpus: Corpus) -> None:
    order = numbers(decoded(corpus, 0, 2 * ROWS))
    assert sorted(order[:ROWS]) == sorted(order[ROWS:]) == list(range(ROWS))
    assert order[:ROWS] != order[ROWS:]
    assert order[:ROWS] != sorted(order[:ROWS])


@pytest.mark.parametrize(("main_caption", "expected"), [(0.0, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)])
def test_captions_are_drawn_anew_each_epoch_the_main_one_more_often(
    corpus: Corpus, main_caption: float, expected: float
) -> None:
    batch = decoded(corpus, 0, 8 * ROWS, main_caption=main_caption)
    drawn: dict[int, set[bytes]] = {}
    main = 0
    for n, tokens in zip(numbers(batch), batch["tokens"], strict=True):
        drawn.setdefault(n, set()).add(tokens.tobytes())
        main += bool((tokens == TOKENIZER([f"text {n}"], pad_to=TOKENIZER.max_length)[0]).all())
    assert abs(main / (8 * ROWS) - expected) < 0.06
    several = sum(len(captions) > 1 for captions in drawn.values())
    assert several == 0 if main_caption == 1 else several > ROWS * 0.8


def test_rows_are_shuffled_within_a_unit(corpus: Corpus) -> None:
    order = numbers(decoded(corpus, 0, ROWS))
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    assert neighbours < ROWS * 0.2


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (13, 14), (50, 200), (109, 111), (333, 340)])
def test_any_range_is_that_part_of_the_whole(corpus: Corpus, start: int, stop: int) -> None:
    whole, part = decoded(corpus, 0, 400), decoded(corpus, start, stop)
    for name in whole:
        assert np.array_equal(part[name], whole[name][start:stop])


# -- on Ray Data -----------------------------------------------------------------------------------------------


def stream(corpus: Corpus, block_rows: int, start: int = 0, stop: int = 240, **options: Any) -> Any:
    return train_stream(
        corpus,
        "train",
        tokenizer=TOKENIZER,
        image_size=8,
        seed=3,
        start=start,
        stop=stop,
        block_rows=block_rows,
        **options,
    )


def collect(dataset: Any, rows: int = 50) -> Batch:
    batches = list(dataset.iter_batches(batch_size=rows))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def steps(corpus: Corpus, workers: int, global_batch: int, total: int) -> list[list[Batch]]:
    """What each consumer of a split stream gets, step by step; all pull at once, as Ray Train's workers do."""
    shards = stream(corpus, global_batch // workers, stop=total).streaming_split(workers, equal=True)
    got: list[list[Batch]] = [[] for _ in range(workers)]

    def pull(rank: int) -> None:
        got[rank] += list(shards[rank].iter_batches(batch_size=global_batch // workers))

    threads = [threading.Thread(target=pull, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_the_stream_is_the_plan_in_order(ray_cluster: str, corpus: Corpus) -> None:
    expected, got = decoded(corpus, 0, 240), collect(stream(corpus, 12))
    for name in expected:
        assert np.array_equal(got[name], expected[name])


@pytest.mark.parametrize(("workers", "global_batch"), [(1, 24), (2, 24), (3, 24)])
def test_global_batches_do_not_depend_on_the_number_of_consumers(
    ray_cluster: str, corpus: Corpus, workers: int, global_batch: int
) -> None:
    expected = decoded(corpus, 0, 240)
    got = steps(corpus, workers, global_batch, 240)
    assert [len(batches) for batches in got] == [240 // global_batch] * workers
    for step in range(240 // global_batch):
        parts = [batches[step] for batches in got]
        assert [len(part["position"]) for part in parts] == [global_batch // workers] * workers
        positions = np.concatenate([part["position"] for part in parts])
        order = np.argsort(positions)
        assert positions[order].tolist() == list(range(step * global_batch, (step + 1) * global_batch))
        for name in ("pixels", "tokens", "group"):
            together = np.concatenate([part[name] for part in parts])[order]
            assert np.array_equal(together, expected[name][positions[order]])


@pytest.mark.parametrize("start", [96, 130])
def test_a_resumed_stream_is_exactly_the_tail(ray_cluster: str, corpus: Corpus, start: int) -> None:
    expected, got = decoded(corpus, start, 240), collect(stream(corpus, 12, start=start))
    assert got["position"].tolist() == list(range(start, 240))
    for name in expected:
        assert np.array_equal(got[name], expected[name])


def test_a_run_that_was_at_its_end_has_nothing_left(ray_cluster: str, corpus: Corpus) -> None:
    assert list(stream(corpus, 12, start=240).iter_rows()) == []


def test_a_fraction_keeps_the_first_row_groups(ray_cluster: str, corpus: Corpus) -> None:
    got = collect(stream(corpus, 10, stop=60, fraction=0.5))
    groups = corpus.row_groups("train")
    kept = groups[: round(len(groups) * 0.5)]
    rows = sum(group.rows for group in kept)
    assert sorted(numbers(got)[:rows]) == list(range(rows))


def test_a_corrupt_row_group_stops_the_stream_and_is_named(ray_cluster: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [40]})
    dataset = stream(corpus, 10, stop=40)
    corrupt(tmp_path / "corpus/split=train/shard-00000.parquet", 3)
    with pytest.raises(Exception, match=r"shard-00000\.parquet: row group 3 is corrupt"):
        list(dataset.iter_rows())
