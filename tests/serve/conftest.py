"""A tiny real world: drawn pictures, a real (untrained) model, an embeddings table and a two-shard index."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rayemb.data.embeddings import embeddings_schema
from rayemb.index import IndexConfig, MapConfig, build_index, build_map
from rayemb.models import (
    ConvNetConfig,
    ImageLimits,
    Model,
    TextTokenizer,
    TextTransformerConfig,
    TokenizerConfig,
    TwoTowerConfig,
)
from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.deploy import Server, start
from rayemb.serve.local import LocalEngine
from rayemb.storage import lance_options

COLOURS = {"red": "#d22f27", "green": "#5c9e31", "blue": "#1e50a0", "yellow": "#fcea2b", "pink": "#e67a94"}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = (40, 64, 88)
PAYLOAD = [
    pa.field("text", pa.string()),
    pa.field("colour", pa.string()),
    pa.field("shape", pa.string()),
    pa.field("size", pa.int32()),
    pa.field("area", pa.float32()),
    pa.field("round", pa.bool_()),
]


@dataclass(frozen=True)
class World:
    model_uri: str
    other_model_uri: str
    index_uri: str
    model: Model
    rows: list[dict[str, Any]]
    images: list[bytes]
    vectors: NDArray[np.float32]

    def expected(self, vector: NDArray[np.float32], k: int, keep: Any = lambda row: True) -> list[str]:
        """The ids of the k best rows, by brute force."""
        kept = [i for i, row in enumerate(self.rows) if keep(row)]
        order = np.argsort(-(self.vectors[kept] @ vector.reshape(-1)), kind="stable")[:k]
        return [self.rows[kept[i]]["id"] for i in order]


def draw(colour: str, shape: str, size: int) -> bytes:
    image = Image.new("RGB", (96, 96), "white")
    pen = ImageDraw.Draw(image)
    low, high = 48 - size // 2, 48 + size // 2
    box, fill = (low, low, high, high), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill, outline="black", width=2)
    elif shape == "square":
        pen.rectangle(box, fill=fill, outline="black", width=2)
    elif shape == "triangle":
        pen.polygon([(48, low), (high, high), (low, high)], fill=fill, outline="black", width=2)
    else:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2, size * 0.22, size * 0.5)
        corners = zip(48 + radii * np.cos(angles), 48 + radii * np.sin(angles), strict=True)
        pen.polygon([(float(x), float(y)) for x, y in corners], fill=fill, outline="black", width=2)
    return encode(image)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def tiny_model(texts: list[str], seed: int) -> Model:
    config = TwoTowerConfig(
        dim=32,
        image=ConvNetConfig(image_size=32, widths=(16, 32), depths=(1, 1)),
        text=TextTransformerConfig(width=32, depth=1, heads=2),
        tokenizer=TokenizerConfig(vocab_size=512, max_length=16),
    )
    return Model.create(config, TextTokenizer.train(texts, config.tokenizer), seed)


@pytest.fixture(scope="session")
def world(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(str(tmp_path_factory.mktemp("serve")))


def make_world(folder: str) -> World:
    """The world under a path or URI."""
    rows: list[dict[str, Any]] = []
    for colour in COLOURS:
        for shape in SHAPES:
            for size in SIZES:
                # An id that needs quoting in a URL, and a caption that a careless page would run.
                number = f"{colour}/{shape} {size}?"
                text = f"{colour} {shape}" if size != 40 else f"<b onclick=alert(1)>{colour}</b> {shape}"
                area, is_round = size * size / 1000, shape == "circle"
                rows.append(
                    {"id": number, "text": text, "colour": colour, "shape": shape, "size": size}
                    | {"area": area, "round": is_round}
                )
    images = [draw(row["colour"], row["shape"], row["size"]) for row in rows]
    texts = [row["text"] for row in rows]
    model = tiny_model(texts, seed=1)
    model.save(f"{folder}/model")
    tiny_model(texts, seed=2).save(f"{folder}/other")
    vectors = model.embed_images(images)
    schema = embeddings_schema(PAYLOAD, model.dim, str(model.digest), images=True)
    full = [
        row | {"vector": vector.tolist(), "image": image}
        for row, vector, image in zip(rows, vectors, images, strict=True)
    ]
    table = pa.Table.from_pylist(full, schema=schema)
    lance.write_dataset(table, f"{folder}/embeddings", storage_options=lance_options(f"{folder}/embeddings"))
    build_index(f"{folder}/embeddings", f"{folder}/index", IndexConfig(factory="Flat", shards=2, words="text"))
    build_map(f"{folder}/index", MapConfig(method="pca"))
    return World(
        f"{folder}/model",
        f"{folder}/other",
        f"{folder}/index",
        Model.load(f"{folder}/model"),
        rows,
        images,
        vectors,
    )


@pytest.fixture(scope="session")
def config() -> ServeConfig:
    return ServeConfig(
        max_k=50,
        max_text_chars=100,
        max_batch=8,
        image=ImageLimits(max_bytes=20_000, max_pixels=1_000_000),
    )


@pytest.fixture(scope="session")
def local(world: World, config: ServeConfig) -> LocalEngine:
    return LocalEngine(world.model_uri, world.index_uri, config)


@pytest.fixture(scope="module")
def http(local: LocalEngine, config: ServeConfig) -> Iterator[TestClient]:
    """The app in this process, over ASGI."""
    # One event loop for the module, as in a replica.
    with TestClient(create_app(local, config), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "query.png"
    path.write_bytes(draw("blue", "star", 70))
    return path


class Service:
    """The one service of the cluster: started on demand, kept while the topology stays the same."""

    def __init__(self, world: World, config: ServeConfig) -> None:
        self._world, self._config = world, config
        self._running: tuple[str, Server] | None = None

    def __call__(self, topology: str) -> Server:
        if self._running and self._running[0] != topology:
            self.stop()
        if not self._running:
            config = self._config.model_copy(update={"topology": topology, "port": 0})
            self._running = topology, start(self._world.model_uri, self._world.index_uri, config)
        return self._running[1]

    def stop(self) -> None:
        if self._running:
            self._running[1].stop()
            self._running = None


@pytest.fixture(scope="package")
def service(world: World, config: ServeConfig) -> Iterator[Service]:
    service = Service(world, config)
    yield service
    service.stop()
