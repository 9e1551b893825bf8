"""The watch of a gateway: the recall that it tells is the recall there is, and nothing waits for it."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import IndexConfig, load_manifest
from rayemb.models import Model
from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.local import LocalEngine
from rayemb.serve.watch import WatchConfig
from rayemb.serve.watch.exact import ExactProcess, work
from tests.index.tables import build_here, naive_search, write_table
from tests.serve.conftest import tiny_model
from tests.serve.versions.conftest import TEXTS

ROWS = 400


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, and an index that finds little: one of many lists is probed."""
    folder = tmp_path_factory.mktemp("coarse")
    model = tiny_model(TEXTS, seed=1)
    model.save(str(folder / "model"))
    x = np.random.default_rng(0).normal(size=(ROWS, model.dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    table = write_table(folder / "table", x, digest=str(model.digest))
    build_here(table, folder / "index", IndexConfig(factory="IVF20,Flat", nprobe=1))
    return str(folder / "model"), str(folder / "index")


def told(http: TestClient, name: str) -> float | None:
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].rpartition(" ")[2]) if lines else None


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def test_the_recall_told_is_the_recall_there_is(coarse: tuple[str, str]) -> None:
    watch = WatchConfig(percent=100, k=10, least_samples=5, min_recall=0.99, queue=64)
    engine = LocalEngine(*coarse)
    app = create_app(engine, ServeConfig(watch=watch))
    model, table = Model.load(coarse[0]), EmbeddingsTable.open(load_manifest(coarse[1]).embeddings.uri)
    vectors = table.vectors(0, ROWS)
    with TestClient(app) as http:
        expected = []
        for text in TEXTS:
            answer = http.post("/v1/search", json={"text": text, "k": 12}).json()
            _, keys = naive_search(vectors, model.embed_texts([text]), 10)
            exact = {f"item-{key}" for key in keys[0]}
            found = [hit["id"] for hit in answer["hits"][:10]]
            expected.append(len(exact & set(found)) / 10)
        # Not sampled: too few hits, a filter, not plain.
        http.post("/v1/search", json={"text": "x", "k": 3})
        http.post("/v1/search", json={"text": "x", "k": 10, "positive": ["item-1"]})
        wait(lambda: told(http, 'rayemb_recall_samples_total{outcome="measured"}') == len(TEXTS))
        assert told(http, "rayemb_recall_at_k{") == pytest.approx(np.mean(expected), abs=1e-6)
        assert np.mean(expected) < 0.99
        wait(lambda: told(http, 'rayemb_alert{alert="recall"') == 1.0)
    app.state.gateway.close()
    engine.close()


def test_exact_search_answers_line_by_line_and_goes_on_after_a_mistake(coarse: tuple[str, str]) -> None:
    ref = load_manifest(coarse[1]).embeddings
    table = EmbeddingsTable.open(ref.uri)
    vector = table.vectors(7, 8)[0]
    _, keys = naive_search(table.vectors(0, ROWS), vector[None], 4)

    def line(**more: Any) -> str:
        return json.dumps({"uri": ref.uri, "version": ref.version, "vector": vector.tolist(), **more})

    wrong = [*keys[0][:3], next(key for key in range(ROWS) if key not in keys[0])]
    asked = [line(keys=keys[0]), line(uri="/nowhere", keys=[1]), line(keys=wrong), line(keys=[keys[0][0], -1, -1, -1])]
    out = io.StringIO()
    work(io.StringIO("\n".join(asked)), out)
    answers = [json.loads(each) for each in out.getvalue().splitlines()]
    assert [each.get("recall") for each in answers] == [1.0, None, 0.75, 0.25]
    assert "of this embeddings table" in answers[1]["error"]


def test_the_process_ends_when_it_is_closed(coarse: tuple[str, str]) -> None:
    ref = load_manifest(coarse[1]).embeddings
    vector = EmbeddingsTable.open(ref.uri).vectors(0, 1)[0].tolist()
    process = ExactProcess()
    assert process.recall(ref.uri, ref.version, vector, [0]) == 1.0
    running = process._process
    assert running is not None
    process.close()
    assert running.poll() is not None


def test_drift_of_queries_raises_an_alert_and_the_reference_is_kept(coarse: tuple[str, str], tmp_path: Path) -> None:
    watch = WatchConfig(drift=True, reference_queries=100, drift_window=50, reference=str(tmp_path / "reference"))
    engine = LocalEngine(*coarse)
    for attempt in range(2):
        app = create_app(engine, ServeConfig(watch=watch))
        with TestClient(app) as http:

            def ask(text: str, times: int, http: TestClient = http) -> None:
                for number in range(times):
                    http.post("/v1/search", json={"text": f"{text} {number % 25}", "k": 1})

            if attempt == 0:
                ask("red star", 100)
                wait(lambda: list((tmp_path / "reference").glob("default-*.npz")))
                ask("red star", 50)
                wait(lambda http=http: told(http, "rayemb_query_shift{") is not None)
                assert told(http, 'rayemb_alert{alert="drift"') == 0.0
            # The second gateway has the reference of the first: it needs no queries of its own.
            before = told(http, "rayemb_query_shift{")
            ask("blue circle square", 100)
            wait(lambda http=http, before=before: told(http, "rayemb_query_shift{") not in (None, before))
            wait(lambda http=http: told(http, 'rayemb_alert{alert="drift"') == 1.0)
        app.state.gateway.close()
    engine.close()
