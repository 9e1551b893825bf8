"""From a file to a corpus: every format builds the same one; pairs of texts, and texts that cannot be written."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayemb.config import from_mapping
from rayemb.data import Corpus, CorpusConfig, build_corpus
from rayemb.data.keys import text_keys
from tests.data.formats import write
from tests.data.test_build import CONFIG, ordered, quarantine, shard_rows


@pytest.fixture(scope="module")
def of_each_format(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    made = {}
    for form in ("parquet", "jsonl .gz", "csv", "webdataset .zst", "lance", "datasets"):
        folder = tmp_path_factory.mktemp("format")
        config = json.loads(json.dumps(write(form, folder)).replace("{root}", str(folder)))
        settings = from_mapping(CorpusConfig, {"source": config, "test_fraction": 0.0, "val_fraction": 0.0})
        made[form] = build_corpus(settings, str(folder / "corpus"))
    return made


def test_every_format_gives_the_same_corpus(of_each_format: dict[str, Corpus]) -> None:
    first = ordered(of_each_format["parquet"])
    assert [len(rows) for rows in first.values()] == [7, 3]
    for form, corpus in of_each_format.items():
        assert ordered(corpus) == first, form
    # Of those that are read in the same two pieces even the bytes are the same.
    assert len({of_each_format[form].digest for form in ("jsonl .gz", "csv", "webdataset .zst")}) == 1


def test_pairs_of_texts(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"id": n, "ask": f" question {n}?", "text": f"answer {n}", "wrong": [f"no {n}", " "], "fit": n / 10}
        for n in range(20)
    ]
    bad = [
        ("empty_query", {"ask": " "}),
        ("empty_query", {"ask": None}),
        ("long_text", {"ask": "x" * 101}),
        ("long_text", {"wrong": ["x" * 101]}),
        ("nul_character", {"ask": "a\0b"}),
        ("nul_character", {"id": "a\0b"}),
        ("bad_utf8", {"text": "\ud800"}),
        ("bad_utf8", {"wrong": ["\udfff"]}),
        ("bad_type", {"fit": "very"}),
        ("bad_type", {"ask": 5}),
    ]
    lines += [{**lines[0], "id": f"bad {n}", **change} for n, (_, change) in enumerate(bad)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"image": None, "query": "ask", "negatives": "wrong", "score": "fit"}
    source = {"name": "jsonl", "uri": str(tmp_path / "a.jsonl"), "columns": columns}
    config = from_mapping(CorpusConfig, {"source": source, **CONFIG, "test_fraction": 0, "val_fraction": 0})
    corpus = build_corpus(config, str(tmp_path / "corpus"))
    assert corpus.kind == "text_pair"
    assert corpus.manifest["quarantine"]["reasons"] == dict(Counter(reason for reason, _ in bad))
    assert len(quarantine(corpus.uri)) == len(bad)
    rows = shard_rows(corpus)
    for n in range(20):
        row = rows[str(n)]
        assert (row["query"], row["text"], row["negatives"]) == (f"question {n}?", f"answer {n}", [f"no {n}"])
        assert row["image"] is None
        assert row["score"] == pytest.approx(n / 10)
        assert row["query_key"] == int(text_keys([f"question {n}?"])[0])
