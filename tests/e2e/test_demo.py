"""The demo at a smaller size: not that it ran, but that it learned, indexed exactly, and answers over HTTP."""

import json
from pathlib import Path

import faiss
import lance
import pyarrow.dataset
import pytest

from rayemb import storage
from rayemb.index import load_manifest
from rayemb.models import Model
from rayemb.pipeline import RunConfig
from rayemb.pipeline.demo import run_demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(ray_cluster: str, small_run: RunConfig) -> dict:
    return run_demo(small_run).figures


def test_training_beats_the_untrained_encoder_beyond_doubt(figures: dict, small_run: RunConfig) -> None:
    metrics = json.loads(storage.read_bytes(storage.join(small_run.uri("report"), "metrics.json")))
    zero_shot = next(result for result in metrics["results"] if result["split"] == "zero_shot")
    assert {part["direction"] for part in zero_shot["directions"]} == {"image→text", "text→image"}
    for part in zero_shot["directions"]:
        by_system = {system["system"]: system["metrics"] for system in part["systems"]}
        assert set(by_system) == {"trained", "untrained", "chance"}
        gain = part["difference"]["metrics"]["recall@10"]
        assert gain["low"] > 0.03, part["direction"]
        assert by_system["trained"]["recall@10"]["low"] > by_system["chance"]["recall@10"]["value"]
        assert set(by_system["trained"]) == {"recall@1", "recall@5", "recall@10", "mrr"}
    page = Path(small_run.uri("report"), "index.html").read_text()
    assert "<svg" in page
    assert "data:image" in page


def test_every_artefact_opens_without_rayemb(figures: dict, small_run: RunConfig) -> None:
    corpus = pyarrow.dataset.dataset(small_run.uri("corpus"), partitioning="hive")
    assert corpus.count_rows() == figures["corpus"]["rows"]
    table = lance.dataset(small_run.uri("embeddings"))
    assert table.count_rows() == figures["corpus"]["rows"]
    manifest = load_manifest(small_run.uri("index"))
    rows = 0
    for shard in manifest.shards:
        rows += faiss.read_index(str(Path(small_run.uri("index"), shard.file))).ntotal
    assert len(manifest.shards) >= 2
    assert rows == figures["corpus"]["rows"]


def test_model_embeddings_and_index_name_the_same_model(figures: dict, small_run: RunConfig) -> None:
    digest = Model.load(small_run.uri("model")).digest
    metadata = lance.dataset(small_run.uri("embeddings")).schema.metadata
    assert metadata[b"rayemb.model_digest"].decode() == digest
    assert load_manifest(small_run.uri("index")).model_digest == digest


def test_the_index_finds_what_exact_search_finds(figures: dict) -> None:
    assert figures["index"]["recall"]["recall"] >= 0.9


def test_the_service_answered_both_kinds_of_query(figures: dict) -> None:
    search = figures["search"]
    assert len(search["text"]["hits"]) == len(search["image"]["hits"]) == 5
    asked = search["image"]["query"].split(" ")[0]
    assert asked in search["image"]["hits"]


def test_running_it_again_repeats_no_work(figures: dict, small_run: RunConfig) -> None:
    from rayemb.pipeline import run_stage

    model = Path(small_run.uri("model"), "rayemb.json")
    before = model.stat().st_mtime_ns
    version = lance.dataset(small_run.uri("embeddings")).version
    for stage in ("corpus", "train", "embed"):
        run_stage(stage, small_run)
    assert model.stat().st_mtime_ns == before
    assert lance.dataset(small_run.uri("embeddings")).version == version
