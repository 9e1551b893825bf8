"""Mining over a real index on a cluster: against brute force, with planted positives that must never be taken."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rayemb.cluster import ClusterError
from rayemb.config import load
from rayemb.curate import CurationError
from rayemb.data import Corpus, EmbedConfig, embed_corpus
from rayemb.data.keys import keys_of, text_keys
from rayemb.index import IndexConfig, build_index
from rayemb.mining import CrossEncoder, MarginConfig, MineConfig, mine
from rayemb.models import Model, ModelError
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.stages import mine_stage
from tests.curate.digits import corpus_of
from tests.models.tiny import tiny_model

ROWS = 120
COLOURS = ("red", "blue", "green", "white", "black")
THINGS = ("heart", "star", "circle", "square", "moon", "house")


def row(n: int) -> dict[str, Any]:
    # Every query stands in two rows, n and n + 60, with two texts; rows 5 and 65 have one and the same text as 6.
    query = f"{COLOURS[n % 5]} {THINGS[n % 6]} {n % 60}"
    text = "the same text" if n in (5, 6, 65) else f"a {THINGS[(n + 1) % 6]} that is {COLOURS[n % 5]}, number {n}"
    return {
        "id": f"row-{n}",
        "image": None,
        "query": query,
        "text": text,
        "texts": [text],
        "negatives": ["an old one"] if n == 3 else [],
        "concept": str(n),
        "score": None,
        "style": "plain",
        "license": "CC0",
        "query_key": int(text_keys([query])[0]),
        "text_key": int(text_keys([text])[0]),
        "concept_key": int(keys_of([str(n)])[0]),
    }


@pytest.fixture(scope="module")
def place(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mining")
    corpus_of(root / "corpus", [row(n) for n in range(ROWS)], "text_pair", shard_rows=50)
    tiny_model(1).save(str(root / "model"))
    tiny_model(2).save(str(root / "guide"))
    embed_corpus(
        str(root / "corpus"), str(root / "model"), str(root / "embeddings"), EmbedConfig(what="text", workers=1)
    )
    build_index(str(root / "embeddings"), str(root / "index"), IndexConfig(factory="Flat", shards=2, recall_queries=0))
    return root


def settings(place: Path, **more: Any) -> MineConfig:
    common = {"model": str(place / "model"), "index": str(place / "index"), "workers": 1, "batch_size": 40}
    return MineConfig.model_validate({**common, **more})


def brute_force(place: Path, n: int) -> list[tuple[float, str]]:
    """Every text that is no positive of row n, by similarity to its query."""
    model = Model.load(str(place / "model"))
    table = [row(i) for i in range(ROWS)]
    positives = {r["text"] for r in table if r["query"] == table[n]["query"]}
    texts = sorted({r["text"] for r in table} - positives)
    scores = model.embed_texts(texts) @ model.embed_texts([table[n]["query"]], kind="query")[0]
    return sorted(zip(scores.tolist(), texts, strict=True), reverse=True)


def negatives(corpus: Corpus) -> list[list[str]]:
    return [texts or [] for texts in corpus.column("train", "negatives")]


def test_the_nearest_texts_that_are_no_positives(place: Path) -> None:
    mined = mine(settings(place, negatives=5, first_rank=2, last_rank=30), str(place / "corpus"), str(place / "mined"))
    found = negatives(mined)
    assert len(found) == ROWS
    for n in range(0, ROWS, 7):
        expected = brute_force(place, n)[1:6]
        scores = {text: score for score, text in brute_force(place, n)}
        # The texts, but for ties within rounding.
        assert [scores[text] for text in found[n]] == pytest.approx([score for score, _ in expected], abs=2e-6)
        assert len(set(found[n])) == 5
    for n in range(ROWS):
        assert not {row(n)["text"], row((n + 60) % ROWS)["text"]} & set(found[n])
    (step,) = mined.manifest["curation"]["steps"]
    assert step["edits"] == {"negatives": ROWS}
    assert step["dropped"] == {}
    # Again: nothing is done, the same corpus.
    again = mine(settings(place, negatives=5, first_rank=2, last_rank=30), str(place / "corpus"), str(place / "mined"))
    assert again.digest == mined.digest


def test_what_does_not_depend_on_batches_and_scores_for_soft_labels(place: Path, tmp_path: Path) -> None:
    changes = {"negatives": 4, "take": "random", "guide": str(place / "guide"), "margin": {"absolute": 0.01}}
    one = mine(settings(place, **changes), str(place / "corpus"), str(tmp_path / "one"))
    two = mine(settings(place, **changes, batch_size=13, workers=2), str(place / "corpus"), str(tmp_path / "two"))
    assert negatives(one) == negatives(two)
    files = sorted((tmp_path / "one" / "_curation").rglob("candidates/*.parquet"))
    listed = [entry for file in files for entry in pq.read_table(file).to_pylist()]
    assert sorted((e["row"], e["negative"]) for e in listed) == sorted(
        (n, text) for n, texts in enumerate(negatives(one)) for text in texts
    )
    model, guide = (Model.load(str(place / name)) for name in ("model", "guide"))
    assert len(listed) > ROWS
    for entry in listed[:: max(1, len(listed) // 20)]:
        query, text = row(entry["row"])["query"], row(entry["row"])["text"]
        for encoder, name in ((model, ""), (guide, "guide_")):
            q, p, n = encoder.embed_texts([query, text, entry["negative"]])
            assert entry[f"{name}score"] == pytest.approx(float(q @ n), abs=2e-6)
            assert entry[f"{name}positive_score"] == pytest.approx(float(q @ p), abs=2e-6)
        assert entry["score"] <= entry["positive_score"] - 0.01 + 1e-6
        assert entry["guide_score"] <= entry["guide_positive_score"] + 1e-6
        assert entry["cross_encoder_score"] is None


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cross-encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "that", "is", ",", "number", *COLOURS, *THINGS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        initializer_range=0.5,
    )
    transformers.set_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_a_cross_encoder_reads_pairs_and_vetoes(place: Path, tmp_path: Path, cross_encoder: str) -> None:
    judge = CrossEncoder(cross_encoder)
    table = [row(n) for n in range(ROWS)]
    scores = judge.scores([r["query"] for r in table], [r["text"] for r in table])
    assert scores.shape == (ROWS,)
    assert scores.std() > 1e-3
    # In a batch with others or alone, to rounding.
    assert judge.scores([table[3]["query"]], [table[3]["text"]])[0] == pytest.approx(scores[3], abs=1e-4)
    margin = MarginConfig(absolute=0.05)
    chosen = settings(place, negatives=3, cross_encoder=cross_encoder, cross_encoder_margin=margin, keep_existing=True)
    found = negatives(mine(chosen, str(place / "corpus"), str(tmp_path / "mined")))
    assert found[3][0] == "an old one"
    pairs = [(n, text) for n, texts in enumerate(found) for text in texts if text != "an old one"]
    assert len(pairs) > 20
    of_pairs = judge.scores([table[n]["query"] for n, _ in pairs], [text for _, text in pairs])
    for (n, _), score in zip(pairs, of_pairs, strict=True):
        assert score <= scores[n] - 0.05 + 1e-4


def test_what_does_not_fit_is_said(place: Path, tmp_path: Path) -> None:
    corpus = str(place / "corpus")
    with pytest.raises(CurationError, match="the index was built with model"):
        mine(settings(place, model=str(place / "guide")), corpus, str(tmp_path / "a"))
    embed_corpus(corpus, str(place / "model"), str(tmp_path / "q"), EmbedConfig(what="query", workers=1))
    build_index(str(tmp_path / "q"), str(tmp_path / "index"), IndexConfig(factory="Flat", shards=1, recall_queries=0))
    with pytest.raises(CurationError, match="the index is of each row's query"):
        mine(settings(place, index=str(tmp_path / "index")), corpus, str(tmp_path / "b"))
    with pytest.raises(ModelError, match="not a cross-encoder"):
        CrossEncoder(str(tmp_path))
    with pytest.raises(ClusterError, match=r"mine_negatives .* needs 5 CPUs and the cluster has 4"):
        mine(settings(place, workers=4), corpus, str(tmp_path / "c"))


def test_the_stage_uses_the_runs_model_and_index(place: Path, tmp_path: Path) -> None:
    overrides = [f"workspace={place}", f"artefacts.mined={tmp_path / 'mined'}", "mine.workers=1", "mine.negatives=2"]
    outcome = mine_stage(load(RunConfig, None, overrides), lambda done, total, text: None)
    assert outcome.summary == f"{ROWS} of {ROWS} rows have new hard negatives, up to 2 each"
    assert json.dumps(outcome.figures)
    assert {len(texts) for texts in negatives(Corpus.open(outcome.uri))} == {2}
