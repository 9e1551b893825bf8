"""Filters and kinds of queries over HTTP: what brute force finds, or an error that names the field."""

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import transformers
from fastapi.testclient import TestClient

from rayemb.index import IndexConfig, build_index, load_manifest
from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World
from tests.serve.test_bad_requests import check
from tests.serve.test_engine import Spread
from tests.serve.test_gateway import ids

FILTERS: list[tuple[dict[str, Any], Any]] = [
    ({"size": {"gt": 40}}, lambda row: row["size"] > 40),
    ({"size": {"gte": 64, "lt": 87.5}}, lambda row: row["size"] == 64),
    ({"colour": {"in": ["red", "pink", "mauve"]}}, lambda row: row["colour"] in ("red", "pink")),
    ({"text": {"prefix": "<b"}}, lambda row: row["size"] == 40),
    ({"not": {"round": True}, "area": {"lte": 5}}, lambda row: not row["round"] and row["size"] < 80),
    ({"or": [{"shape": "star"}, {"and": [{"size": 88}, {"colour": "blue"}]}]},
     lambda row: row["shape"] == "star" or (row["size"] == 88 and row["colour"] == "blue")),
    ({"text": {"exists": False}}, lambda row: False),
    ({"text": None}, lambda row: False),
]  # fmt: skip


@pytest.mark.parametrize(("condition", "keep"), FILTERS, ids=[str(condition)[:30] for condition, _ in FILTERS])
def test_filters_equal_brute_force(http: TestClient, world: World, condition: dict, keep: Any) -> None:
    answer = http.post("/v1/search", json={"text": "round", "k": 50, "filter": condition}).json()
    assert ids(answer) == world.expected(world.model.embed_texts(["round"])[0], 50, keep)
    assert set(answer["strategies"]) <= {"exact", "selector", "index"}


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"filter": {"size": {"eq": 5}}}, 422, "filter.size.eq"),
    ({"filter": {"size": {"gt": True}}}, 422, "filter.size.gt"),
    ({"filter": {"or": [{"size": 5}, {"size": []}]}}, 422, "filter.or[1].size"),
    ({"filter": {"or": [{"size": 5}, {"nosuch": 5}]}}, 400, "filter.or[1].nosuch"),
    ({"filter": {"size": {"in": [64, "64"]}}}, 400, "filter.size.in[1]"),
    ({"filter": {"shape": {"gt": 5}}}, 400, "filter.shape.gt"),
    ({"filter": {"or": [{"size": i} for i in range(257)]}}, 422, "filter.or[256].size"),
    ({"recall": 0}, 422, "recall"),
    ({"recall": 1.5}, 422, "recall"),
    ({"effort": 5}, 422, "effort"),
    ({"effort": {"nprobe": 0}}, 422, "effort.nprobe"),
    ({"effort": {"ef_search": 10**9}}, 422, "effort.ef_search"),
    ({"effort": {"nprobe": 3}, "recall": 0.9}, 422, "effort"),
    ({"min_score": "0.5"}, 422, "min_score"),
    ({"positive": "red"}, 422, "positive"),
    ({"positive": [5]}, 422, "positive.0"),
    ({"positive": ["nobody"]}, 400, "positive[0]"),
    ({"negative": ["nobody"]}, 400, "negative[0]"),
    ({"diversity": 1.5}, 422, "diversity"),
    ({"diversity": 0.5, "group_by": "shape"}, 422, "group_by"),
    ({"group_by": "nosuch"}, 400, "group_by"),
    ({"group_by": "area"}, 400, "group_by"),
    ({"group_by": "shape", "group_size": 11, "k": 5}, 422, "group_size"),
    ({"group_size": 0}, 422, "group_size"),
    ({"hybrid": True}, 422, "hybrid"),
    ({"hybrid": {"fusion": "sum"}}, 422, "hybrid.fusion"),
    ({"hybrid": {"weight": 2.0}}, 422, "hybrid.weight"),
    ({"hybrid": {}, "min_score": 0.1}, 422, "min_score"),
    ({"rerank": 5}, 422, "rerank"),
    ({"rerank": 0}, 422, "rerank"),
    ({"text": None, "negative": ["red/star 64?"]}, 422, "text, image"),
    ({"text": None, "positive": ["red/star 64?"], "hybrid": {}}, 422, "hybrid"),
]


@pytest.mark.parametrize(("fields", "status", "field"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(http: TestClient, fields: dict[str, Any], status: int, field: str) -> None:
    check(http.post("/v1/search", json={"text": "red star", **fields}), status, field)


def test_a_filter_nested_too_deep_is_refused(http: TestClient) -> None:
    deep: dict[str, Any] = {"size": 5}
    for _ in range(200):
        deep = {"not": deep}
    error = check(http.post("/v1/search", json={"text": "a", "filter": deep}), 422, "filter" + ".not" * 16)
    assert "nested deeper" in error["message"]


def test_a_search_says_how_wide_it_looks(world: World, tmp_path: Path) -> None:
    table = load_manifest(world.index_uri).embeddings.uri
    config = IndexConfig(factory="IVF8,Flat", nprobe=1, shards=2)
    build_index(table, str(tmp_path / "i"), config)
    vector, served = world.model.embed_texts(["red star"])[0], ServeConfig(max_k=50)
    with TestClient(create_app(LocalEngine(world.model_uri, str(tmp_path / "i"), served), served)) as http:
        about = http.get("/v1/index").json()
        assert about["effort"] == {"nprobe": 1, "ef_search": 64, "rerank": 4}
        assert about["curve"][-1]["recall"] == 1.0
        narrow, whole, all_lists = (
            http.post("/v1/search", json={"text": "red star", "k": 50, **width}).json()
            for width in ({}, {"recall": 1.0}, {"effort": {"nprobe": 8}})
        )
        assert ids(all_lists) == world.expected(vector, 50)
        assert len(ids(narrow)) < len(ids(whole)) <= 50
        for width in ({"recall": 1.0}, {"effort": {"nprobe": 8}}):
            diverse = http.post("/v1/search", json={"text": "red star", "k": 20, "diversity": 0.0, **width}).json()
            plain = http.post("/v1/search", json={"text": "red star", "k": 20, **width}).json()
            assert ids(diverse) == ids(plain)


def test_items_are_found_by_example(http: TestClient, world: World) -> None:
    good, bad = world.rows[3]["id"], world.rows[40]["id"]
    answer = http.post("/v1/search", json={"positive": [good], "k": 5}).json()
    expected = [each for each in world.expected(world.vectors[3], 6) if each != good][:5]
    assert ids(answer) == expected
    target = world.vectors[3] - world.vectors[40]
    answer = http.post("/v1/search", json={"positive": [good], "negative": [bad], "k": 5}).json()
    assert ids(answer) == [each for each in world.expected(target, 9) if each not in (good, bad)][:5]


def test_min_score_cuts_and_diversity_spreads(http: TestClient, world: World) -> None:
    scores = world.vectors @ world.model.embed_texts(["red star"])[0]
    limit = float(np.sort(scores)[-4]) - 1e-5
    answer = http.post("/v1/search", json={"text": "red star", "k": 50, "min_score": limit}).json()
    assert ids(answer) == world.expected(world.model.embed_texts(["red star"])[0], 4)
    plain = http.post("/v1/search", json={"text": "red star", "k": 5}).json()
    diverse = http.post("/v1/search", json={"text": "red star", "k": 5, "diversity": 0.8}).json()
    assert ids(diverse)[0] == ids(plain)[0]
    assert ids(diverse) != ids(plain)


def test_groups_lie_side_by_side(http: TestClient, world: World) -> None:
    body = {"text": "red star", "k": 3, "group_by": "shape", "group_size": 2}
    answer = http.post("/v1/search", json=body).json()
    vector = world.model.embed_texts(["red star"])[0]
    shapes = list(dict.fromkeys(each.split("/")[1].split(" ")[0] for each in world.expected(vector, 60)))[:3]
    expected = [each for shape in shapes for each in world.expected(vector, 2, lambda row: row["shape"] == shape)]  # noqa: B023
    assert ids(answer) == expected


def test_words_beside_vectors(http: TestClient) -> None:
    body = {"text": "yellow circle", "k": 4, "hybrid": {"fusion": "convex", "weight": 1.0}, "filter": {"size": 64}}
    answer = http.post("/v1/search", json=body).json()
    assert ids(answer)[0] == "yellow/circle 64?"
    assert "words" not in answer["strategies"]
    ranked = http.post("/v1/search", json={"text": "yellow circle", "k": 4, "hybrid": {}}).json()
    assert len(ids(ranked)) == 4


def test_the_cross_encoder_has_the_last_word(world: World, tmp_path: Path) -> None:
    tokenizer = tmp_path / "vocab.txt"
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789<>()/=", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    folder = str(tmp_path / "cross")
    transformers.BertTokenizerFast(str(tokenizer)).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=200, num_labels=1, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    from rayemb.mining import CrossEncoder

    served = ServeConfig(max_k=50, reranker=folder)
    with TestClient(create_app(LocalEngine(world.model_uri, world.index_uri, served), served)) as http:
        answer = http.post("/v1/search", json={"text": "red star", "k": 5, "rerank": 20}).json()
    kept = world.expected(world.model.embed_texts(["red star"])[0], 20)
    texts = {row["id"]: row["text"] for row in world.rows}
    scores = CrossEncoder(folder).scores(["red star"] * 20, [texts[each] for each in kept]).tolist()
    found = [hit["score"] for hit in answer["hits"]]
    assert found == sorted(found, reverse=True)
    assert found == pytest.approx(sorted(scores, reverse=True)[:5], abs=1e-5)


BODIES = [
    {"k": 7, "filter": {"size": {"gte": 64}}},
    {"k": 7, "positive": ["red/star 64?"], "negative": ["blue/circle 40?"]},
    {"k": 4, "diversity": 0.5},
    {"k": 3, "group_by": "colour", "group_size": 3},
    {"k": 5, "hybrid": {"fusion": "rrf"}, "filter": {"not": {"colour": "red"}}},
    {"k": 9, "min_score": 0.1},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(list(body)))
def test_spread_shards_answer_as_those_of_one_process(
    http: TestClient, world: World, config: ServeConfig, body: dict[str, Any]
) -> None:
    engine = Spread(world, deadline_s=10).engine
    with TestClient(create_app(engine, config)) as spread:
        mine, other = (each.post("/v1/search", json={"text": "red star", **body}).json() for each in (spread, http))
    assert ids(mine) == ids(other)
    assert [hit["score"] for hit in mine["hits"]] == pytest.approx([hit["score"] for hit in other["hits"]], abs=1e-6)
    assert mine["missing_shards"] == []


@pytest.mark.parametrize("path", ["/v1/search", "/v1/search/batch"])
def test_the_request_is_described_whole(http: TestClient, path: str) -> None:
    document = http.get("/openapi.json").json()
    content = document["paths"][path]["post"]["requestBody"]["content"]
    schema = {**content["application/json"]["schema"], "components": document["components"]}
    query = {"text": "a", "hybrid": {"weight": 0.3}} if path == "/v1/search" else {"texts": ["a"]}
    for condition, _ in FILTERS:
        if "and" in str(condition):
            continue  # nested twice: taken, and described in words
        jsonschema.validate({**query, "filter": condition, "effort": {"nprobe": 3}}, schema)
    wrong = [{"size": []}, {"size": {"eq": 1}}, {"size": {}}, {"or": []}, {"not": 5}, {"not": {}}, {"nosuch": 5}]
    wrong += [{"shape": {"gt": 5}}, {"shape": 5}, {"size": {"prefix": "a"}}, {"size": {"in": ["a"]}}, {"round": 1}]
    for condition in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**query, "filter": condition}, schema)
        assert http.post(path, json={**query, "filter": condition}).status_code in (400, 422)
