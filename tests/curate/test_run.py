"""A whole curation: what is left, what is listed as dropped, and that neither depends on how the work went."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Literal

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import ray.exceptions

from rayemb.config import from_mapping
from rayemb.curate import CurationError, Rows, Step, Verdicts, base, verdicts
from rayemb.curate.config import CurateConfig
from rayemb.curate.run import curate
from rayemb.data import Corpus
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.sources import RawRow
from tests.curate.noise import corpus_of, drawings, jpeg, pair, sentence

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS: list[dict[str, Any]] = [
    {"name": "text_rules", "max_images": None},
    {"name": "length", "max_words": 24},
    {"name": "exact_duplicates", "of": "pair"},
    {"name": "near_duplicate_images"},
    {"name": "leakage", "against": [{"split": "val"}], "near_images": None},
]
HOSTILE = "<script>alert(1)</script> of a cat on the mat"


def config(*steps: dict[str, Any], **more: Any) -> CurateConfig:
    return from_mapping(CurateConfig, {"steps": list(steps), **more})


def of(*steps: Step) -> CurateConfig:
    """A config of steps that only this test knows."""
    return CurateConfig.model_construct(steps=list(steps), seed=0, examples=6)


def table(uri: str, split: str) -> list[dict[str, Any]]:
    corpus = Corpus.open(uri)
    files = [f"{uri}/{entry['file']}" for entry in corpus.manifest["splits"][split]["files"]]
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(files).to_table().to_pylist()
    return rows


def side_table(uri: str) -> list[dict[str, Any]]:
    files = sorted(str(path) for path in Path(uri, "_dropped").rglob("*.parquet"))
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(files).to_table().to_pylist() if files else []
    return rows


def noisy() -> tuple[list[RawRow], list[RawRow], dict[str, tuple[str, str]]]:
    """Training rows, validation rows, and of each planted id the step that must drop it and the partner's id."""
    real = drawings(6000)[::4]
    clean = [pair(n, sentence(str(row.text), n), row.image or b"") for n, row in enumerate(real[:100])]
    train, val = clean[:80], clean[80:]
    planted = [
        (pair("url", "more of it at www.example.org", train[1].image or b""), "00-text_rules", None),
        (pair("short", "cat", train[2].image or b""), "01-length", None),
        (pair("html", HOSTILE + " and again" * 15, train[3].image or b""), "01-length", None),
        (pair("copy", str(train[4].text).upper(), train[4].image or b""), "02-exact_duplicates", train[4].id),
        (
            pair("jpeg", "quite another caption here", jpeg(train[5].image or b"", 70)),
            "03-near_duplicate_images",
            train[5].id,
        ),
        (pair("leak", str(val[6].text), val[6].image or b""), "04-leakage", val[6].id),
    ]
    for at, (row, _, _) in zip((70, 60, 50, 40, 30, 7), planted, strict=True):
        train.insert(at, row)
    return train, val, {row.id: (step, partner or "") for row, step, partner in planted}


@pytest.fixture(scope="module")
def made(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    root = tmp_path_factory.mktemp("curated")
    train, val, _ = noisy()
    corpus = corpus_of(root / "in", {"train": train, "val": val}, shard_rows=30, group_rows=7)
    return corpus, curate(config(*STEPS), corpus.uri, str(root / "out"))


def test_every_row_is_left_or_listed_with_its_reason(made: tuple[Corpus, Corpus]) -> None:
    corpus, curated = made
    train, val, planted = noisy()
    curated.verify()
    left, gone = table(curated.uri, "train"), side_table(curated.uri)
    assert [row["id"] for row in left] == [row.id for row in train if row.id in {row["id"] for row in left}]
    assert {row["id"] for row in left} | {row["id"] for row in gone} == {row.id for row in train}
    assert len(left) + len(gone) == len(train)
    by_id = {row["id"]: row for row in gone}
    for name, (step, partner) in planted.items():
        assert (by_id[name]["step"], by_id[name]["partner"] or "") == (step, partner)
        assert by_id[name]["what"]
        assert by_id[name]["split"] == "train"
        assert train[by_id[name]["row"]].id == name
    # Emoji that look alike by themselves: few.
    assert len(gone) <= len(planted) + 3
    # What is left is what it was, and the evaluation split byte for byte.
    before = {row["id"]: row for row in table(corpus.uri, "train")}
    assert all(row == before[row["id"]] for row in left)
    assert curated.manifest["splits"]["val"] == corpus.manifest["splits"]["val"]
    assert [row["id"] for row in table(curated.uri, "val")] == [row.id for row in val]


def test_the_manifest_and_the_report_count_the_same(made: tuple[Corpus, Corpus]) -> None:
    corpus, curated = made
    done = curated.manifest["curation"]
    assert done["input"] == {"uri": corpus.uri, "digest": corpus.digest, "rows": corpus.splits}
    judged = 86
    for step in done["steps"]:
        assert step["judged"] == {"train": judged}
        judged -= step["dropped"].get("train", 0)
        assert sum(step["reasons"].values()) == step["dropped"].get("train", 0)
    assert curated.splits == {"train": judged, "val": 20} == done["rows"]
    figures = json.loads(Path(curated.uri, "_report", "metrics.json").read_text())
    assert [step["step"] for step in figures["steps"]] == [step["step"] for step in done["steps"]]
    length = figures["steps"][1]
    assert sum(length["histogram"]["kept"]) + sum(length["histogram"]["dropped"]) == 85
    assert sum(length["histogram"]["dropped"]) == length["dropped"]["train"]
    found = {example["row"]["id"]: example for step in figures["steps"] for example in step["examples"]}
    assert found["row-copy"]["partner"]["text"].upper() == found["row-copy"]["row"]["text"]
    assert "image" not in found["row-copy"]["row"]
    page = Path(curated.uri, "_report", "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/webp;base64,") >= 6


def test_a_finished_curation_is_used_as_it_is_and_another_is_refused(made: tuple[Corpus, Corpus]) -> None:
    corpus, curated = made
    before = Path(curated.uri, "_corpus.json").read_bytes()
    assert curate(config(*STEPS), corpus.uri, curated.uri).digest == curated.digest
    assert Path(curated.uri, "_corpus.json").read_bytes() == before
    with pytest.raises(CurationError, match="another corpus is already here"):
        curate(config(*STEPS[:2]), corpus.uri, curated.uri)


def test_neither_blocks_nor_workers_nor_the_order_of_filters_change_what_is_left(
    made: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, curated = made
    monkeypatch.setattr(base, "READ_ROWS", 7)
    monkeypatch.setattr(base, "BUCKET_ROWS", 40)
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "target_max_block_size", 20_000)
    monkeypatch.setattr(context.execution_options, "resource_limits", ray.data.ExecutionResources(cpu=1))
    assert curate(config(*STEPS), corpus.uri, str(tmp_path / "small")).digest == curated.digest
    # Rules over single rows commute with each other; leakage with all.
    swapped = [STEPS[4], STEPS[1], STEPS[0], STEPS[2], STEPS[3]]
    assert curate(config(*swapped), corpus.uri, str(tmp_path / "swapped")).digest == curated.digest


def test_curating_what_is_curated_drops_nothing(made: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    _, curated = made
    again = curate(config(*STEPS), curated.uri, str(tmp_path / "again"))
    assert again.digest == curated.digest
    assert side_table(again.uri) == []


def test_a_killed_run_goes_on_after_its_last_step(made: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    corpus, curated = made
    out = tmp_path / "out"

    @ray.remote(num_cpus=0, max_retries=0)
    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        curate(config(*STEPS), corpus.uri, str(out))

    working = work.remote()
    deadline = time.monotonic() + 120
    while not list(out.glob("_curation/01-*/_step.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(working)
    assert not (out / "_corpus.json").exists()
    # A write that the kill cut short, and a step of other settings.
    (out / "split=train").mkdir(exist_ok=True)
    (out / "split=train" / "shard-00000.parquet.0123abcd.tmp").write_bytes(b"half")
    shutil.copytree(next(out.glob("_curation/00-*")), out / "_curation" / "00-text_rules-000000000000")
    done = {path: path.stat().st_mtime_ns for path in out.glob("_curation/0[01]-*-*/_step.json")}
    (out / "notes.txt").write_text("someone's")
    with pytest.raises(CurationError, match="the folder holds other files"):
        curate(config(*STEPS), corpus.uri, str(out))
    (out / "notes.txt").unlink()
    said: list[str] = []
    resumed = curate(config(*STEPS), corpus.uri, str(out), progress=lambda done, of, text: said.append(text))
    assert resumed.digest == curated.digest
    kept = {path: at for path, at in done.items() if "000000000000" not in path.parent.name}
    assert len(kept) == 2
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert not any(text.startswith(("text_rules", "length")) for text in said)
    assert any(text.startswith("leakage") for text in said)
    assert {path.name.rsplit("-", 1)[0] for path in (out / "_curation").iterdir()} == {
        f"{number:02d}-{step['name']}" for number, step in enumerate(STEPS)
    }
    assert not list(out.rglob("*.tmp"))


class Edit(Step):
    """Gives each row a new text and concept, and drops none."""

    name: Literal["edit"] = "edit"

    def judge(self, rows: Rows) -> Verdicts:
        found = rows.take(range(0, rows.corpus.splits["train"], 2), ["text"])
        rows.facts["seen"] = len(found)
        texts = [f"new {int(str(row['text']).split()[-1]) // 4}" for row in found.values()]
        yield verdicts(row=list(found), drop=False, reason="edited", new_text=texts, new_texts=[[t] for t in texts])
        yield verdicts(row=[1], drop=False, new_concept=["thing"], new_negatives=[["a", "b"]], new_score=[0.25])


class Wrong(Step):
    """Judges what it must not."""

    name: Literal["wrong"] = "wrong"
    row: int

    def judge(self, rows: Rows) -> Verdicts:
        return [verdicts(row=[self.row], reason="wrong")]


def test_edits_are_seen_by_later_steps_and_published_with_their_keys(tmp_path: Path) -> None:
    rows = [pair(n, f"text {n}", bytes([n])) for n in range(20)]
    corpus = corpus_of(tmp_path / "in", {"train": rows, "val": rows[:3]}, shard_rows=8)
    duplicates = config({"name": "exact_duplicates", "of": "text"}).steps[0]
    curated = curate(of(Edit(), duplicates), corpus.uri, str(tmp_path / "out"))
    curated.verify()
    expected = [f"new {n // 4}" if n % 2 == 0 else f"text {n}" for n in range(20)]
    left = table(curated.uri, "train")
    assert [row["id"] for row in left] == [f"row-{n}" for n in range(20) if expected.index(expected[n]) == n]
    assert [row["text"] for row in left] == list(dict.fromkeys(expected))
    assert [row["text_key"] for row in left] == text_keys([row["text"] for row in left]).tolist()
    assert [row["texts"] for row in left] == [[row["text"]] for row in left]
    one = next(row for row in left if row["id"] == "row-1")
    assert (one["concept"], one["negatives"], one["score"]) == ("thing", ["a", "b"], 0.25)
    assert one["concept_key"] == keys_of(["thing"])[0]
    edit, repeats = curated.manifest["curation"]["steps"]
    assert edit["edits"] == {"concept": 1, "negatives": 1, "score": 1, "text": 10, "texts": 10}
    assert edit["facts"] == {"seen": 10}
    assert repeats["dropped"] == {"train": 5}
    for file in Path(curated.uri).rglob("split=train/*.parquet"):
        if "_" not in str(file.relative_to(curated.uri)):
            assert pq.ParquetFile(file).schema_arrow.field("text").nullable is False
    page = Path(curated.uri, "_report", "index.html").read_text()
    assert "text → new " in page


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], r"curate.steps: there are no steps"),
        ([{"name": "length", "splits": ["test"]}], r"curate.steps.0.splits: there is no split 'test'"),
        (
            [{"name": "length", "min_words": 1}, {"name": "length", "min_words": 9}],
            r"curate.steps.1: the step length drops every row of train \(few_words 20\)",
        ),
    ],
)
def test_what_cannot_be_done_is_named_by_its_key(tmp_path: Path, steps: list[dict[str, Any]], said: str) -> None:
    corpus = corpus_of(tmp_path / "in", {"train": [pair(n, f"text {n}") for n in range(20)]}, kind="text")
    with pytest.raises(CurationError, match=said):
        curate(config(*steps), corpus.uri, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "_corpus.json").exists()


def test_verdicts_over_other_rows_and_places_are_refused(tmp_path: Path) -> None:
    rows = [pair(n, f"text {n}") for n in range(6)]
    corpus = corpus_of(tmp_path / "in", {"train": rows[:4], "val": rows[4:]}, kind="text")
    with pytest.raises(CurationError, match="not curated in place"):
        curate(config({"name": "length"}), corpus.uri, corpus.uri)
    for row, said in ((5, "a row of val that was not to be judged"), (99, "a row that is not there")):
        with pytest.raises(Exception, match=said):
            curate(of(Wrong(row=row)), corpus.uri, str(tmp_path / f"out{row}"))
