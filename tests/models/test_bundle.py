"""The model artefact: what is saved is what is loaded, or it is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from rayemb.models import Model, ModelError, decode_image, image_tensor, model_digest
from tests.models.pictures import encode, noise
from tests.models.tiny import tiny_model

TEXTS = ["a red heart", "звезда", "", "a text that is longer than ten tokens can ever hold, by far"]
IMAGES = [encode(noise(20, 9, seed)) for seed in range(5)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model().save(str(tmp_path / "model"))
    return tmp_path / "model"


def test_the_same_seed_gives_the_same_model() -> None:
    vectors = tiny_model(3).embed_texts(TEXTS)
    torch.randn(7)  # whatever else draws from the global generator
    assert np.array_equal(tiny_model(3).embed_texts(TEXTS), vectors)
    assert not np.allclose(tiny_model(4).embed_texts(TEXTS), vectors)


def test_creating_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    tiny_model(5)
    assert torch.equal(torch.randn(3), expected)


def test_embeddings_are_unit_rows_in_order() -> None:
    model = tiny_model()
    for vectors, count in ((model.embed_texts(TEXTS), 4), (model.embed_images(IMAGES), 5)):
        assert vectors.shape == (count, model.dim)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_batch_size_does_not_matter() -> None:
    model = tiny_model()
    np.testing.assert_allclose(model.embed_texts(TEXTS, batch_size=1), model.embed_texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(model.embed_images(IMAGES, batch_size=2), model.embed_images(IMAGES), atol=1e-6)


def test_bytes_pictures_and_pixels_are_one() -> None:
    model = tiny_model()
    pictures = [decode_image(data) for data in IMAGES]
    pixels = np.stack([image_tensor(picture, 16) for picture in pictures])
    expected = model.embed_images(IMAGES)
    assert np.array_equal(model.embed_images(pictures), expected)
    assert np.array_equal(model.embed_pixels(pixels), expected)


def test_nothing_gives_no_rows() -> None:
    model = tiny_model()
    assert model.embed_texts([]).shape == (0, 8)
    assert model.embed_images([]).shape == (0, 8)


def test_a_loaded_model_gives_the_same_vectors_to_the_bit(saved: Path) -> None:
    model, loaded = tiny_model(), Model.load(str(saved))
    assert np.array_equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))
    assert np.array_equal(loaded.embed_images(IMAGES), model.embed_images(IMAGES))
    assert loaded.network.config == model.network.config
    assert not loaded.network.training


def test_the_digest_names_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.digest is None
    first, second = model.save(str(tmp_path / "1")), tiny_model().save(str(tmp_path / "2"))
    assert first == second == model.digest
    assert model_digest(str(tmp_path / "1")) == first == Model.load(str(tmp_path / "2")).digest
    assert tiny_model(1).save(str(tmp_path / "3")) != first


def test_what_was_loaded_saves_as_the_same(saved: Path, tmp_path: Path) -> None:
    loaded = Model.load(str(saved))
    before = loaded.digest
    assert loaded.save(str(tmp_path / "again")) == before


def test_the_trainers_record_is_kept_and_is_part_of_the_digest(tmp_path: Path) -> None:
    model = tiny_model()
    plain = model.save(str(tmp_path / "plain"))
    model.info = {"loss": {"name": "infonce"}, "steps": 7}
    assert model.save(str(tmp_path / "trained")) != plain
    assert Model.load(str(tmp_path / "trained")).info == model.info


def test_others_can_open_the_files(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert {name for name, _ in tiny_model().network.state_dict().items()} == set(tensors)
    assert "8 dimensions" in (saved / "README.md").read_text()


def test_parameters_that_share_storage_can_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    flat = torch.cat([p.detach().flatten() for p in model.network.parameters()])
    start = 0
    for parameter in model.network.parameters():  # as DeepSpeed leaves them
        size = parameter.numel()
        parameter.data = flat[start : start + size].view(parameter.shape)
        start += size
    assert model.save(str(tmp_path / "model")) == tiny_model().save(str(tmp_path / "other"))


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_byte_is_refused_and_the_file_named(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"checksum of {name} differs") as caught:
        Model.load(str(saved))
    assert caught.value.where == str(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ModelError, match=name):
        Model.load(str(saved))


def test_a_place_without_a_model(tmp_path: Path) -> None:
    for read in (Model.load, model_digest):
        with pytest.raises(ModelError, match="there is no model here"):
            read(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "", "\x00\x01"])
def test_a_manifest_that_is_not_json(saved: Path, text: str) -> None:
    (saved / "rayemb.json").write_text(text)
    for read in (Model.load, model_digest):
        with pytest.raises(ModelError, match=r"rayemb\.json is not JSON"):
            read(str(saved))


@pytest.mark.parametrize("document", [[], {}, {"format": 2, "files": {}}, {"format": 1}])
def test_a_manifest_of_another_format(saved: Path, document: object) -> None:
    (saved / "rayemb.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="not of format 1"):
        Model.load(str(saved))


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"towers": {"dim": "many"}},
        {"towers": {"dim": 9, "image": {"image_size": 16, "patch": 4, "widths": [8, 12], "depths": [1, 1]}}},
        {"files": {"../../secret": "0"}},
    ],
)
def test_a_manifest_that_describes_another_model(saved: Path, change: dict[str, object]) -> None:
    manifest = json.loads((saved / "rayemb.json").read_text())
    (saved / "rayemb.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ModelError):
        Model.load(str(saved))


def test_an_image_of_another_size_is_fitted(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.pixels(Image.new("RGB", (100, 3))).shape == (3, 16, 16)
