"""A real corpus and a real model for the steps that look at vectors: scikit-learn's handwritten digits and their names.

The model learns 797 of the digits in a few seconds; corpora are made of the other 1,000, so that nothing in them was
seen.
"""

import functools
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F

from rayemb.curate import Rows, Step
from rayemb.data import Corpus
from rayemb.data.corpus import PAYLOAD, SCHEMA
from rayemb.data.embeddings import embeddings_schema
from rayemb.data.keys import keys_of, text_keys
from rayemb.models import ConvNetConfig, Model, TextTokenizer, TextTransformerConfig, TokenizerConfig, TwoTowerConfig

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("the digit {} written by hand", "a handwritten {}", "somebody wrote a {} here with a pen")
SEEN, STEPS = 797, 250
CONFIG = TwoTowerConfig(
    dim=16,
    image=ConvNetConfig(image_size=16, patch=2, widths=(32, 48), depths=(1, 1)),
    text=TextTransformerConfig(width=32, depth=1, heads=2),
    tokenizer=TokenizerConfig(vocab_size=512, max_length=16),
)


@functools.cache
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images `(1797, 16, 16)` uint8, dark on white, in a seeded order, and what they show `(1797,)`."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    small = (255 - data.images[order] * 15.9).astype(np.uint8)
    return small.repeat(2, axis=1).repeat(2, axis=2), data.target[order].astype(np.int64)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(digits()[0][number]).save(out, "PNG")
    return out.getvalue()


def caption(label: int, phrase: int = 0) -> str:
    return PHRASES[phrase % len(PHRASES)].format(NAMES[label])


@functools.cache
def trained_model() -> Model:
    """A two-tower model of digits and their captions; the same weights on every call."""
    images, labels = digits()
    texts = [caption(label, phrase) for label in range(10) for phrase in range(len(PHRASES))]
    model = Model.create(CONFIG, TextTokenizer.train(texts, CONFIG.tokenizer), seed=0)
    pixels = torch.from_numpy(np.repeat(images[:SEEN, None], 3, axis=1))
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.network.train()
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=3e-3)
    ids, of_text = torch.from_numpy(model.tokenizer(texts)), np.arange(len(texts)) // len(PHRASES)
    for _ in range(STEPS):
        rows = rng.integers(0, SEEN, 64)
        image, text = model.network(pixels[rows], ids)
        same = torch.from_numpy((labels[rows][:, None] == of_text).astype(np.float32))
        logits = image @ text.T / 0.1
        loss = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.network.eval()
    torch.set_num_threads(threads)
    return model


def digit_rows(count: int, **changes: Sequence[Any]) -> list[dict[str, Any]]:
    """The first `count` unseen digits as rows of a corpus; `changes` replaces whole columns."""
    labels = digits()[1][SEEN : SEEN + count]
    rows: list[dict[str, Any]] = []
    for n, label in enumerate(labels.tolist()):
        row = {"id": f"digit-{n}", "image": png(SEEN + n), "text": caption(label, n), "concept": NAMES[label]}
        row |= {name: values[n] for name, values in changes.items()}
        row |= {"query": None, "texts": [row["text"]], "negatives": [], "score": None, "style": "pen", "license": "BSD"}
        row["query_key"] = int(keys_of([row["image"]])[0])
        row["text_key"], row["concept_key"] = int(text_keys([row["text"]])[0]), int(keys_of([row["concept"]])[0])
        rows.append(row)
    return rows


def corpus_of(root: Path, rows: list[dict[str, Any]], kind: str = "image_text", shard_rows: int = 150) -> Corpus:
    """A corpus of one split, `train`, in shards of `shard_rows`; row n has the ordinal n."""
    files = []
    for at in range(0, len(rows), shard_rows):
        file = f"split=train/shard-{at // shard_rows:05d}.parquet"
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        part = pa.Table.from_pylist(rows[at : at + shard_rows], schema=SCHEMA)
        pq.write_table(part, path, row_group_size=50, write_page_checksum=True)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"file": file, "rows": len(part), "sha256": sha})
    digest = hashlib.sha256("".join(entry["sha256"] for entry in files).encode()).hexdigest()
    manifest = {"format": 2, "kind": kind, "digest": digest, "fingerprint": "", "rows": len(rows)}
    (root / "_corpus.json").write_text(
        json.dumps({**manifest, "splits": {"train": {"rows": len(rows), "files": files}}})
    )
    return Corpus.open(str(root))


def labels_of(count: int) -> NDArray[np.int64]:
    return digits()[1][SEEN : SEEN + count]


def own_vectors(count: int, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the model says of the unseen digits and of `texts`, without Ray."""
    model = trained_model()
    return model.embed_images([png(SEEN + n) for n in range(count)]), model.embed_texts(list(texts))


def judged(step: Step, rows: Rows) -> dict[int, dict[str, Any]]:
    """A step's verdicts by row."""
    found = step.judge(rows)
    tables = [found] if isinstance(found, pa.Table) else found
    if hasattr(found, "iter_batches"):
        tables = list(found.iter_batches(batch_size=None, batch_format="pyarrow"))
    listed = [verdict for table in tables for verdict in table.to_pylist()]
    by_row = {verdict["row"]: verdict for verdict in listed}
    assert len(by_row) == len(listed), "two verdicts over one row"
    return by_row


def raw_vectors(count: int) -> NDArray[np.float32]:
    """The unseen digits as they are: 64 grey values each, 0 to 1."""
    small = digits()[0][SEEN : SEEN + count, ::2, ::2]
    return 1 - small.reshape(count, 64).astype(np.float32) / 255


def table_of(root: Path, corpus: Corpus, vectors: NDArray[np.float32]) -> str:
    """An embeddings table of a corpus with these vectors, as `embed_corpus` would lay it out; gives its URI."""
    schema = embeddings_schema(PAYLOAD, vectors.shape[1], "a model", images=False)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    given = {name: corpus.column("train", name) for name in ("id", "text", "concept", "style", "license")}
    given |= {"vector": column, "split": ["train"] * len(vectors)}
    lance.write_dataset(pa.table({name: given[name] for name in schema.names}, schema=schema), str(root))
    return str(root)
