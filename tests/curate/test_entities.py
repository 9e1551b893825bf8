"""Entities: the longest name wins, the encoder chooses among several, rare ones go and frequent ones are capped."""

from pathlib import Path

import numpy as np
import pytest

from rayemb.curate import CurationError, Entities, Rows
from rayemb.curate.entities import name_table
from rayemb.curate.names import NameTable, accepted, confidence
from rayemb.data import Corpus
from tests.curate.digits import NAMES, corpus_of, digit_rows, judged, labels_of, own_vectors, trained_model

ROWS = 200


def test_the_longest_name_wins_and_equal_names_are_both_candidates() -> None:
    table = NameTable.of(
        [("Q1", "heart", ""), ("Q2", "Red  Heart", "a suit"), ("Q3", "bank", "of a river"), ("Q4", "Bank", "money")]
    )
    assert [table.ids[n] for n in table.mentions("A red heart, on the BANK; a heart.")] == ["Q2", "Q3", "Q4", "Q1"]
    assert table.texts == ["heart", "Red  Heart: a suit", "bank: of a river", "Bank: money"]
    assert table.mentions("hearts and banks") == []
    assert table.longest == 2


def test_aliases_of_one_id_are_one_entity_and_dense_scripts_match_inside_text() -> None:
    table = NameTable.of(
        [("Q1", "cat", "a pet"), ("Q1", "猫", ""), ("Q1", "house cat", ""), ("Q2", "犬", ""), ("Q3", "!", "")]
    )
    assert table.ids == ["Q1", "Q2"]
    assert table.texts == ["cat: a pet", "犬"]
    assert table.mentions("一只猫和犬") == [0, 1]
    assert table.mentions("the house cat and a cat") == [0]


def test_threshold_0_keeps_all_and_1_none() -> None:
    assert [confidence(c) for c in (-1.0, 0.0, 1.0, 1.0000001)] == [0, 0.5, 1, 1]
    assert accepted(0.0, 0)
    assert not accepted(1.0, 1)
    assert accepted(0.6, 0.5)
    assert not accepted(0.5, 0.5)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_of_names_is_read(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    table = pa.table({"id": [7, 8, 7], "name": ["heart", "", "coeur"], "description": ["a suit", None, None]})
    path = tmp_path / f"names.{kind}"
    if kind == "csv":
        pacsv.write_csv(table, path)
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(f'{{"id": "7", "name": "{name}"}}\n' for name in ("heart", "coeur")))
    found = name_table(str(path))
    assert found.ids == ["7"]
    assert found.mentions("un coeur") == found.mentions("a heart") == [0]


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CurationError, match="not a table of names"):
        name_table("names.txt")
    with pytest.raises(CurationError, match="cannot be read"):
        name_table(str(tmp_path / "missing.csv"))
    (tmp_path / "other.csv").write_text("id,label\n1,a\n")
    with pytest.raises(CurationError, match="no column name"):
        name_table(str(tmp_path / "other.csv"))


@pytest.mark.usefixtures("ray_cluster")
class TestOnDigits:
    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Every text names two digits, the right one at either place; five texts name none."""
        root = tmp_path_factory.mktemp("entities")
        labels = labels_of(ROWS)
        texts = []
        for n, label in enumerate(labels):
            pair = [NAMES[label], NAMES[(label + 1 + n % 9) % 10]]
            texts.append("{} or {} in a list".format(*(pair if n % 2 else pair[::-1])))
        texts[:5] = ["something without a name"] * 5
        corpus_of(root / "corpus", digit_rows(ROWS, text=texts, concept=["unknown"] * ROWS))
        described = [f"Q{n},{name},a handwritten {name}" for n, name in enumerate(NAMES)]
        (root / "names.csv").write_text("\n".join(["id,name,description", *described]))
        trained_model().save(str(root / "model"))
        return root

    def test_the_encoder_chooses_the_right_one_of_two(self, place: Path) -> None:
        step = Entities(model=str(place / "model"), workers=1, names=str(place / "names.csv"), threshold=0)
        rows = Rows.of(Corpus.open(str(place / "corpus")))
        found = judged(step, rows)
        labels = labels_of(ROWS)
        assert rows.facts["entities_named"] == 10
        assert [found[n]["reason"] for n in range(5)] == ["no_entity"] * 5
        assert not any(found[n]["drop"] for n in range(5, ROWS))
        right = np.mean([found[n]["new_concept"] == f"Q{labels[n]}" for n in range(5, ROWS)])
        assert right > 0.9  # by chance: a half
        query, texts = own_vectors(ROWS, [f"{name}: a handwritten {name}" for name in NAMES])
        for n in range(5, ROWS):
            named = [NAMES.index(word) for word in rows.corpus.column("train", "text")[n].split() if word in NAMES]
            cosine = max(float(query[n] @ texts[m]) for m in named)
            assert found[n]["new_score"] == pytest.approx((1 + cosine) / 2, abs=1e-5)

    def test_own_concepts_rare_ones_dropped_and_frequent_ones_capped(self, place: Path) -> None:
        """By the corpus's own concepts; who is doubtful, rare and beyond the cap is worked out from the vectors."""
        corpus = corpus_of(place / "own", [*digit_rows(ROWS)[: ROWS - 1], {**digit_rows(ROWS)[-1], "text": "nothing"}])
        labels = labels_of(ROWS)[: ROWS - 1]
        query, texts = own_vectors(ROWS - 1, NAMES)
        trust = (1 + (query * texts[labels]).sum(1)) / 2
        threshold = float(np.sort(trust)[20] + np.sort(trust)[21]) / 2
        sure = {label: np.flatnonzero((labels == label) & (trust > threshold)) for label in range(10)}
        sizes = sorted(len(members) for members in sure.values())
        least, most = sizes[3], sizes[6]
        assert sizes[0] < least <= most < sizes[9]
        limits = {"threshold": threshold, "min_rows": least, "max_rows": most}
        step = Entities(model=str(place / "model"), workers=1, unmatched="keep", **limits)
        found = judged(step, Rows.of(corpus))
        assert set(found) == {n for members in sure.values() for n in members}  # the doubtful and unnamed left alone
        for label, members in sure.items():
            reasons = {found[n]["reason"] for n in members}
            if len(members) < least:
                assert reasons == {"rare_entity"}
                continue
            kept = {n for n in members if not found[n]["drop"]}
            assert kept == set(members[np.argsort(-trust[members], kind="stable")[:most]].tolist())
            assert reasons == ({None, "frequent_entity"} if len(members) > most else {None})
            assert {found[n]["new_concept"] for n in kept} == {NAMES[label]}
