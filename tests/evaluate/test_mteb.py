"""mteb's own protocols, mock tasks and figures over our models: a directory, a service, another library's."""

import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.abstasks import AbsTaskPairClassification, AbsTaskSTS
from mteb.mocks import MockRerankingTask, MockRetrievalTask
from mteb.models import EncoderProtocol, SearchProtocol
from mteb.models.model_meta import ScoringFunction
from numpy.typing import NDArray
from PIL import Image
from sentence_transformers import SentenceTransformer

from rayemb.errors import RayembError
from rayemb.evaluate.encoders import ModelEncoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.mteb import MtebEncoder
from rayemb.evaluate.tasks import PairClassificationConfig, STSConfig, TaskConfig
from rayemb.evaluate.tasks.base import Means
from rayemb.models import (
    ConvNetConfig,
    Model,
    PromptsConfig,
    TextTokenizer,
    TextTransformerConfig,
    TokenizerConfig,
    TwoTowerConfig,
)
from rayemb.pipeline.mteb import mteb_model
from rayemb.serve import ServeError
from rayemb.serve.client import BatchHits, Client, Item
from rayemb.serve.client.mteb import MtebService
from tests.evaluate.mteb_tasks import KS, QUIET, WORDS, Data, jsonl, metadata, pairs_task, run
from tests.imports import loaded
from tests.models.test_pretrained import minilm  # noqa: F401
from tests.serve.live import listening
from tests.serve.writable import Collection


def ours(config: TaskConfig, model: MtebEncoder) -> dict[str, float]:
    found = config.load("here").run(model.encoder, Means(show=False))
    return config.figures(found.items.columns)


def tiny(images: bool = True) -> Model:
    config = TwoTowerConfig(
        dim=16,
        image=ConvNetConfig(image_size=16, widths=(8, 16), depths=(1, 1)) if images else None,
        text=TextTransformerConfig(width=32, depth=1, heads=2),
        tokenizer=TokenizerConfig(vocab_size=512, max_length=24),
        prompts=PromptsConfig(query="look for: "),
    )
    return Model.create(config, TextTokenizer.train([WORDS, "look for: this is a test"], config.tokenizer), 3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("mteb") / "tiny")
    tiny().save(uri)
    return uri


@pytest.fixture(scope="module")
def model(directory: str) -> MtebEncoder:
    return mteb_model(directory)


class Followed(Collection):
    """Keeps which updates a search wanted to see."""

    async def refresh(self, at_least: int | None = None) -> int:
        self.refreshed = [*getattr(self, "refreshed", []), at_least]
        return await super().refresh(at_least)


@pytest.fixture
def collection(directory: str, tmp_path: Path) -> Followed:
    return Followed(tmp_path, Model.load(directory), {"text": "string"}, what="text")


@pytest.fixture
def url(collection: Collection) -> Iterator[str]:
    with listening(collection.app()) as url:
        yield url


class Toy:
    """An encoder of somebody else's: three letters counted; keeps what it was asked."""

    name, digest = "some one's", ""

    def __init__(self) -> None:
        self.asked: list[tuple[Side, str]] = []

    def texts(self, texts: Sequence[str], *, kind: Side = "text") -> NDArray[np.float32]:
        self.asked += [(kind, text) for text in texts]
        x_ND = np.array([[text.count(letter) + 0.1 for letter in "aeo"] for text in texts], np.float32)
        x_ND[[n for n, text in enumerate(texts) if text == "wrong"]] = np.nan
        return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)

    def images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        raise RayembError("texts alone")


class TestMeta:
    def test_is_an_encoder_for_mteb(self, model: MtebEncoder) -> None:
        assert isinstance(model, EncoderProtocol)
        assert not isinstance(model, SearchProtocol)  # mteb would then not compare vectors itself

    def test_says_what_is_true(self, model: MtebEncoder, directory: str) -> None:
        meta, saved = model.mteb_model_meta, Model.load(directory)
        assert (meta.name, meta.revision) == ("rayemb/tiny", saved.digest)
        assert (meta.embed_dim, meta.max_tokens) == (16, 24)
        assert meta.modalities == ["text", "image"]
        assert meta.similarity_fn_name is ScoringFunction.COSINE
        assert meta.n_parameters == sum(each.numel() for each in saved.network.parameters())
        assert meta.use_instructions is True
        # What nobody knows is not claimed.
        assert meta.license is meta.open_weights is meta.training_datasets is meta.languages is None

    def test_takes_what_the_user_knows(self, directory: str) -> None:
        meta = mteb_model(directory, name="us/ours", languages=["eng-Latn"], license="mit").mteb_model_meta
        assert (meta.name, meta.languages, meta.license) == ("us/ours", ["eng-Latn"], "mit")

    def test_names_a_fact_that_mteb_does_not_take(self, directory: str) -> None:
        with pytest.raises(EvaluateError, match=r"ModelMeta\.licence"):
            mteb_model(directory, licence="mit")

    def test_claims_no_images_for_texts_alone(self) -> None:
        meta = MtebEncoder(ModelEncoder(tiny(images=False), "words")).mteb_model_meta
        assert meta.modalities == ["text"]
        meta = MtebEncoder(Toy()).mteb_model_meta
        assert (meta.name, meta.revision, meta.modalities) == ("rayemb/some-one-s", None, ["text"])
        assert (meta.embed_dim, meta.n_parameters) == (3, None)


def test_every_mock_task_of_texts_and_images(model: MtebEncoder) -> None:
    found = mteb.mock_run(model).task_results
    failed = {name: each.exception for name, each in found.items() if hasattr(each, "exception")}
    assert not failed
    ran = {name for name, each in found.items() if each is not None}
    assert len(ran) >= 43
    assert all("Audio" in name or "Video" in name or "2A" in name or "A2" in name for name in found.keys() - ran)


class TestEncode:
    def encode(self, model: MtebEncoder, rows: list[dict[str, Any]], **more: Any) -> Any:
        from mteb._create_dataloaders import _custom_collate_fn
        from torch.utils.data import DataLoader

        loader = DataLoader(rows, batch_size=2, collate_fn=_custom_collate_fn)  # type: ignore[arg-type]
        about = metadata("Here", "STS", "spearman")
        return model.encode(loader, task_metadata=about, hf_split="test", hf_subset="default", **(QUIET | more))

    @pytest.mark.parametrize("window", [3, 4096])
    def test_in_order(self, model: MtebEncoder, directory: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rayemb.evaluate.mteb.TEXTS", window)
        texts = [" ".join(WORDS.split()[: 1 + n % 7]) + f" {n}" for n in range(9)]
        found = self.encode(model, [{"text": text} for text in texts])
        np.testing.assert_allclose(found, Model.load(directory).embed_texts(texts), atol=1e-6)
        assert found.dtype == np.float32

    def test_queries_as_queries_and_all_else_as_documents(self) -> None:
        toy, data = Toy(), Data(8, 4)
        model = MtebEncoder(toy)
        toy.asked.clear()  # the probe
        run(model, data.task())
        whole = {f"{row['title']} {row['text']}".strip() for row in data.corpus}
        asked = {("query", row["text"]) for row in data.queries[1:]} | {("text", text) for text in whole}
        assert set(toy.asked) == asked
        assert len(toy.asked) == len(asked)
        toy.asked.clear()
        self.encode(model, [{"text": "a pair"}])
        assert toy.asked == [("text", "a pair")]

    @pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "YCbCr"])
    def test_pictures_of_any_mode_lose_nothing(self, model: MtebEncoder, directory: str, mode: str) -> None:
        noise = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
        picture = Image.fromarray(noise).convert(mode)
        file = io.BytesIO()
        (picture if mode not in ("CMYK", "YCbCr") else picture.convert("RGB")).save(file, "PNG")
        found = self.encode(model, [{"image": picture}] * 3)
        np.testing.assert_allclose(found, Model.load(directory).embed_images([file.getvalue()] * 3), atol=1e-6)

    def test_a_text_with_a_picture_is_the_mean_of_both(self, model: MtebEncoder) -> None:
        picture = Image.fromarray(np.random.default_rng(6).integers(0, 256, (9, 9, 3), np.uint8))
        both = self.encode(model, [{"text": "red ship", "image": picture}])
        text = self.encode(model, [{"text": "red ship"}])
        image = self.encode(model, [{"image": picture}])
        mean = text + image
        np.testing.assert_allclose(both, mean / np.linalg.norm(mean), atol=1e-6)

    def test_what_it_cannot_encode_is_named(self, model: MtebEncoder) -> None:
        with pytest.raises(EvaluateError, match=r"Here \(default, test\).*batches have audio, not text or image"):
            self.encode(model, [{"audio": [0.0]}])
        with pytest.raises(EvaluateError, match="not int8"):
            self.encode(model, [{"text": "a"}], precision="int8")
        with pytest.raises(EvaluateError, match="a picture is a list"):
            self.encode(model, [{"image": [0]}])
        with pytest.raises(EvaluateError, match="not finite for row 2"):
            self.encode(MtebEncoder(Toy()), [{"text": "a"}, {"text": "b"}, {"text": "wrong"}])


class TestFigures:
    """mteb's, by pytrec_eval and its own evaluators, are those of our own tasks on the same data."""

    def test_of_retrieval(self, model: MtebEncoder, tmp_path: Path) -> None:
        data = Data()
        theirs = run(model, data.task())
        names = [f"{base}@{k}" for base in ("ndcg", "recall", "precision", "map", "mrr") for k in KS]
        found = ours(data.config(tmp_path, names), model)
        for name in names:
            value = theirs[name.replace("@", "_at_")]
            assert value == pytest.approx(found[name], abs=0.5000001e-5), name  # mteb keeps five places
        assert 0.05 < found["ndcg@10"] < 0.95

    def test_of_sts(self, model: MtebEncoder, tmp_path: Path) -> None:
        rows, rng = [], np.random.default_rng(2)
        for a, b in itertools.pairwise(row["text"] for row in Data(90).corpus):
            shared = len(set(a.split()) & set(b.split()))
            rows.append({"sentence1": a, "sentence2": b, "score": float(min(5, shared + rng.integers(0, 2)))})
        theirs = run(model, pairs_task(AbsTaskSTS, "HereSTS", "STS", "cosine_spearman", rows))
        found = ours(STSConfig(data=jsonl(tmp_path / "pairs.jsonl", rows)), model)
        # Their cosines are float32.
        assert theirs["spearman"] == pytest.approx(found["spearman"], abs=1e-5)
        assert theirs["cosine_pearson"] == pytest.approx(found["pearson"], abs=1e-6)
        assert theirs["main_score"] == pytest.approx(found["spearman"], abs=1e-5)

    def test_of_pair_classification(self, model: MtebEncoder, tmp_path: Path) -> None:
        rows, rng = [], np.random.default_rng(4)
        for n, row in enumerate(Data(80).corpus):
            words = row["text"].split()
            other = " ".join(rng.permutation(words)[:-1]) if n % 2 else " ".join(rng.choice(WORDS.split(), 4))
            rows.append({"sentence1": row["text"], "sentence2": other, "labels": n % 2})
        task = pairs_task(AbsTaskPairClassification, "HerePairs", "PairClassification", "max_ap", rows)
        theirs = run(model, task)
        config = PairClassificationConfig(data=jsonl(tmp_path / "pairs.jsonl", rows), columns={"label": "labels"})
        found = ours(config, model)
        assert theirs["cosine_ap"] == pytest.approx(found["average_precision"], abs=1e-9)
        assert theirs["cosine_accuracy"] == pytest.approx(found["accuracy"], abs=1e-9)
        assert theirs["cosine_f1"] == pytest.approx(found["f1"], abs=1e-9)
        assert theirs["similarity_ap"] == theirs["cosine_ap"]

    def test_of_a_sentence_transformers_directory_are_its_own(self, minilm: str, tmp_path: Path) -> None:  # noqa: F811
        """LIMIT's kind of data (Weller et al., 2025): every pair of documents is what some query wants."""
        names, rng = WORDS.split()[:9], np.random.default_rng(7)
        likes: dict[str, list[str]] = {name: [] for name in names}
        data = Data(0, 0)
        for number, pair in enumerate(itertools.combinations(names, 2)):
            thing = f"{rng.choice(WORDS.split())} {rng.choice(WORDS.split())} {number}"
            data.queries.append({"id": f"q{number}", "text": f"Who likes {thing}?"})
            data.qrels[f"q{number}"] = dict.fromkeys(pair, 1)
            for name in pair:
                likes[name].append(thing)
        data.corpus = [
            {"id": name, "title": "", "text": f"{name} likes {', '.join(of)}."} for name, of in likes.items()
        ]
        model = mteb_model(minilm)
        assert model.mteb_model_meta.modalities == ["text"]
        found, theirs = run(model, data.task()), run(SentenceTransformer(minilm), data.task())
        config = ours(data.config(tmp_path, ["ndcg@10", "recall@1", "recall@3"]), model)
        for name in ("ndcg@10", "recall@1", "recall@3"):
            at = name.replace("@", "_at_")
            assert found[at] == theirs[at], name
            assert found[at] == pytest.approx(config[name], abs=0.5000001e-5), name
        assert 0.2 < found["recall_at_3"] < 1


class TestService:
    def test_as_an_encoder(self, url: str, model: MtebEncoder) -> None:
        service = mteb_model(url)
        meta = service.mteb_model_meta
        assert isinstance(service, EncoderProtocol)
        assert (meta.revision, meta.embed_dim, meta.modalities) == (model.mteb_model_meta.revision, 16, ["text"])
        assert meta.framework == ["API"]
        found, theirs = run(service, Data().task()), run(model, Data().task())
        assert {k: v for k, v in found.items() if "_at_" in k} == pytest.approx(
            {k: v for k, v in theirs.items() if "_at_" in k}, abs=1e-9, nan_ok=True
        )
        service.close()

    def test_searches_what_it_wrote(self, url: str, model: MtebEncoder, collection: Followed) -> None:
        service = mteb_model(url, search=True, languages=["eng-Latn"])
        assert isinstance(service, SearchProtocol)
        assert isinstance(service, EncoderProtocol)
        assert service.mteb_model_meta.experiment_kwargs == {"searched": "written"}
        found, theirs = run(service, Data().task()), run(model, Data().task())
        for name in (f"{base}_at_{k}" for base in ("ndcg", "recall", "map", "mrr") for k in KS):
            assert found[name] == theirs[name], name
        assert collection.uploads == [4] * 15
        # The next task finds nothing of the last one; candidates are ranked without a write.
        for task in (MockRetrievalTask, MockRerankingTask):
            assert run(service, task())["main_score"] == run(model, task())["main_score"]
        assert sum(collection.uploads) == 60 + 2 * 2  # it has two splits
        # Versions of the updates: that of the last write of each split, which another replica would have to catch up
        # with before it searches (the deletions before it and that of "gone" count, too).
        assert set(collection.refreshed) == {1 + 15, 1 + 15 + 15 + 1, 1 + 15 + 15 + 1 + 1 + 1}
        service.close()
        with Client(url) as client:
            assert client.index().rows == 0

    def test_searches_what_is_there(self, url: str, model: MtebEncoder) -> None:
        data = Data(10, 6)
        with Client(url) as client:
            items = [Item(row["id"], text=f"{row['title']} {row['text']}".strip()) for row in data.corpus]
            for start in range(0, len(items), 4):
                client.upsert(items[start : start + 4])
            service = mteb_model(url, search=True, write=False, effort={"nprobe": 8})
            assert service.mteb_model_meta.experiment_kwargs["nprobe"] == 8
            assert run(service, data.task())["ndcg_at_10"] == run(model, data.task())["ndcg_at_10"]
            service.close()
            assert client.index().rows == 10  # not its own
            client.delete(["d3"])
            client.upsert([Item("stranger", text="red ship")])
            with pytest.raises(ServeError, match="finds 'stranger', which is no document of HereRetrieval"):
                run(mteb_model(url, search=True, write=False), data.task())
            client.delete(["stranger"])
            with pytest.raises(ServeError, match="holds 9 items, not 10"):
                run(mteb_model(url, search=True, write=False), data.task())

    def test_takes_out_only_what_it_is_told_to(self, url: str) -> None:
        with Client(url) as client:
            client.upsert([Item("mine", text="red ship")])
            with pytest.raises(ServeError, match=r"holds 1 items, not 0.*emptied=True"):
                run(mteb_model(url, search=True), Data(8, 4).task())
            assert client.index().rows == 1
            service = mteb_model(url, search=True, emptied=True)
            assert client.index().rows == 0
            assert run(service, Data(8, 4).task())["ndcg_at_10"] > 0

    def test_says_what_does_not_fit(self, url: str) -> None:
        service = mteb_model(url, search=True)
        with pytest.raises(ServeError, match=r"looks at 60 documents of a query, and a search gives 20.*max_k=60"):
            run(service, Data().task((1, 100)))
        data = Data(8, 4)
        data.corpus[5]["text"] = "ship " * 500
        with pytest.raises(ServeError, match=r"document 'd5' has 2,\d+ characters, over 2,000"):
            run(service, data.task())
        data.corpus[5] = data.corpus[4]
        with pytest.raises(ServeError, match="two documents have the id 'd4'"):
            run(service, data.task())
        with pytest.raises(ServeError, match="call index first"):
            MtebService(url).search([], task_metadata=None, top_k=1)

    def test_lists_of_some_shards_are_no_figures(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Client.search_batch

        def partial(self: Client, *args: Any, **more: Any) -> BatchHits:
            return replace(whole(self, *args, **more), partial=True, missing_shards=["shard-1"])

        monkeypatch.setattr(Client, "search_batch", partial)
        with pytest.raises(ServeError, match="shard-1: shards are missing"):
            run(mteb_model(url, search=True), Data(8, 4).task())

    def test_has_no_pictures(self, url: str) -> None:
        from mteb.mocks import MockImageClassificationTask

        with pytest.raises(ValueError, match="none overlap"):
            run(mteb_model(url), MockImageClassificationTask())


def test_a_directory_searches_nothing(directory: str) -> None:
    with pytest.raises(EvaluateError, match="URL of a service"):
        mteb_model(directory, search=True)


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(EvaluateError, match=r"mteb is not installed.*rayemb\[mteb\]"):
        MtebEncoder(Toy())


def test_mteb_is_not_imported_before_it_is_needed() -> None:
    assert loaded("import rayemb.pipeline.mteb, rayemb.serve.client.mteb", ["mteb"]) == []
