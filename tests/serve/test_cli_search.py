"""`rayemb search` against a listening gateway: table, JSON, pictures, keys."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.keys import new_key
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World
from tests.serve.live import listening


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def secret(keys: str) -> str:
    return new_key(keys, "ann")


@pytest.fixture(scope="module")
def url(local: LocalEngine, config: ServeConfig, keys: str, secret: str) -> Iterator[str]:
    with listening(create_app(local, config.model_copy(update={"keys": keys}))) as url:
        yield url


def run(*words: str, secret: str) -> str:
    done = CliRunner(env={"RAYEMB_KEY": secret, "COLUMNS": "400"}).invoke(app, ["search", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_json_is_the_answer(url: str, secret: str, world: World) -> None:
    words = ("red star", "--url", url, "-k", "4", "--filter", "round=false", "--json")
    document = json.loads(run(*words, secret=secret))
    vector = world.model.embed_texts(["red star"])[0]
    assert [hit["id"] for hit in document["hits"]] == world.expected(vector, 4, lambda row: not row["round"])
    assert document["model_digest"] == world.model.digest


def test_the_table_has_payload_and_paths(url: str, secret: str, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "hits"
    words = ("red star", "--url", url, "-k", "3", "--pictures", str(folder))
    shown = run(*words, secret=secret)
    document = json.loads(run(*words, "--json", secret=secret))
    saved = sorted(folder.iterdir())
    assert [path.suffix for path in saved] == [".png"] * 3
    for hit, path in zip(document["hits"], saved, strict=True):
        number = [row["id"] for row in world.rows].index(hit["id"])
        assert path.read_bytes() == world.images[number]
        assert hit["picture"] == str(path)
        assert path.name in shown
        # Markup in a caption or an id is text here too.
        assert hit["id"] in shown
        assert world.rows[number]["text"] in shown


def test_an_image_and_a_key(url: str, secret: str, world: World, picture: Path) -> None:
    document = json.loads(run("--image", str(picture), "--url", url, "-k", "1", "--json", secret=secret))
    expected = world.expected(world.model.embed_images([picture.read_bytes()])[0], 1)
    assert [hit["id"] for hit in document["hits"]] == expected
    refused = CliRunner(env={"RAYEMB_KEY": ""}).invoke(app, ["search", "x", "--url", url])
    assert isinstance(refused.exception, ServeError)
    assert refused.exception.status == 401
