"""What is imported gives the vectors of the library it comes from; what rayemb does not have is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

from rayemb.models import Model, ModelError
from rayemb.models.interchange import export, import_model
from tests.models.test_export import LONG, made
from tests.models.test_pretrained import minilm  # noqa: F401

TEXTS = ["a red heart", "Two CATS sit on a very long sofa", "", "日本語 звезда Ünïcode", LONG]


@pytest.fixture(scope="module")
def small(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A BERT of two layers with random weights and the tokenizer of MiniLM, as transformers saves it."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(minilm)
    for key, value in {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}.items():
        setattr(config, key, value)
    config.num_attention_heads = 4
    network = transformers.AutoModel.from_config(config)
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    network.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


def directory(small: Path, out: Path, pooling: str = "mean", *more: Any, **how: Any) -> SentenceTransformer:
    """A directory of sentence-transformers as that library writes it, and the model in it."""
    modules = [Transformer(str(small), max_seq_length=20), Pooling(32, pooling), *more]
    theirs = SentenceTransformer(modules=modules, device="cpu", **how)
    theirs.save(str(out))
    return theirs


def test_minilm_as_its_makers_saved_it(minilm: str, tmp_path: Path) -> None:  # noqa: F811
    model = import_model(minilm, str(tmp_path / "model"))
    theirs = SentenceTransformer(minilm, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(model.embed_texts(TEXTS), theirs, atol=1e-5)
    again = Model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(again.embed_texts(TEXTS), theirs, atol=1e-5)
    assert (again.dim, again.tokenizer.max_length) == (384, 256)
    assert again.info["imported"]["format"] == "sentence-transformers"
    assert "license: apache-2.0" in (tmp_path / "model" / "README.md").read_text()  # as their README says
    export(again, str(tmp_path / "back"))
    back = SentenceTransformer(str(tmp_path / "back"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(back, theirs, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_every_module_of_sentence_transformers_that_there_is(pooling: str, small: Path, tmp_path: Path) -> None:
    dense = Dense(32, 8, bias=False, activation_function=torch.nn.Identity())
    prompts = {"query": "query: ", "passage": "passage: ", "classification": "class: "}
    theirs = directory(small, tmp_path / "theirs", pooling, dense, Normalize(), prompts=prompts)
    model = import_model(str(tmp_path / "theirs"), str(tmp_path / "model"))
    # By name: its encode_document looks no further than at an empty prompt "document".
    np.testing.assert_allclose(model.embed_texts(TEXTS), theirs.encode(TEXTS, prompt_name="passage"), atol=1e-5)
    np.testing.assert_allclose(model.embed_texts(TEXTS, kind="query"), theirs.encode_query(TEXTS), atol=1e-5)
    assert (model.dim, model.tokenizer.max_length) == (8, 20)
    assert model.info["imported"]["other_prompts"] == {"classification": "class: "}


def test_a_directory_of_transformers_is_pooled_as_told(small: Path, tmp_path: Path) -> None:
    network, tokenizer = (
        transformers.AutoModel.from_pretrained(small).eval(),
        transformers.AutoTokenizer.from_pretrained(small),
    )
    for pooling in ("mean", "cls"):
        model = import_model(str(small), str(tmp_path / pooling), pooling=pooling, max_length=12)  # type: ignore[arg-type]
        for text, vector in zip(TEXTS, model.embed_texts(TEXTS), strict=True):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=12)
            with torch.inference_mode():
                states = network(**ids).last_hidden_state[0]
            one = states.mean(0) if pooling == "mean" else states[0]
            np.testing.assert_allclose(vector, torch.nn.functional.normalize(one, dim=0), atol=1e-5)


def test_pickles_are_opened_only_if_allowed_and_never_run(small: Path, tmp_path: Path) -> None:
    expected = import_model(str(small), str(tmp_path / "expected")).embed_texts(TEXTS)
    pickled = tmp_path / "pickled"
    shutil.copytree(small, pickled)
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    out = str(tmp_path / "out")
    with pytest.raises(ModelError, match=r"its weights are a pickle .*--allow-pickle"):
        import_model(str(pickled), out)
    vectors = import_model(str(pickled), out, allow_pickle=True).embed_texts(TEXTS)
    np.testing.assert_array_equal(vectors, expected)
    torch.save({"weights": Path("code")}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a mapping of plain tensors"):
        import_model(str(pickled), str(tmp_path / "other"), allow_pickle=True)


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values if isinstance(found, dict) else values["modules"]))


def test_what_rayemb_does_not_have_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", str(tmp_path / "out")
    directory(small, theirs, "max")
    with pytest.raises(ModelError, match="the pooling is max"):
        import_model(str(theirs), out)
    shutil.rmtree(theirs)
    directory(small, theirs, "mean", Dense(32, 8))
    with pytest.raises(ModelError, match="Dense has the activation Tanh"):
        import_model(str(theirs), out)
    changed(theirs / "2_Dense", "config.json", activation_function="torch.nn.modules.linear.Identity")
    save_file({"linear.weight": torch.ones(8, 32), "linear.bias": torch.ones(8)}, theirs / "2_Dense/model.safetensors")
    with pytest.raises(ModelError, match="Dense has a bias"):
        import_model(str(theirs), out)
    modules = json.loads((theirs / "modules.json").read_text())
    for kind, said in (
        ("sentence_transformers.models.LSTM", "the modules are Transformer, Pooling, LSTM"),
        ("custom_code.Module", "'custom_code.Module' is code of its own"),
    ):
        changed(theirs, "modules.json", modules=[*modules[:2], {**modules[2], "type": kind}])
        with pytest.raises(ModelError, match=said):
            import_model(str(theirs), out)
    changed(theirs, "modules.json", modules=modules[:2])
    changed(theirs, "config_sentence_transformers.json", similarity_fn_name="dot")
    with pytest.raises(ModelError, match="not normalised and compared by dot"):
        import_model(str(theirs), out)
    with pytest.raises(ModelError, match="the source says how it is pooled"):
        import_model(str(theirs), out, pooling="cls")
    with pytest.raises(ModelError, match=r"neither modules\.json nor config\.json"):
        import_model(str(tmp_path / "nowhere"), out)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelError, match="open_clip have a class token"):
        import_model(str(tmp_path / "clip"), out)
    (tmp_path / "clip" / "config.json").write_text("{}")
    (tmp_path / "clip" / "open_clip_config.json").unlink()
    with pytest.raises(ModelError, match="no model_type"):
        import_model(str(tmp_path / "clip"), out)
    (tmp_path / "clip" / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match="not a list of modules"):
        import_model(str(tmp_path / "clip"), out)
    weights = tmp_path / "damaged" / "model.safetensors"
    shutil.copytree(small, weights.parent)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short or damaged"):
        import_model(str(weights.parent), out)
    assert not Path(out).exists()


def test_our_own_towers_come_back_through_sentence_transformers(tmp_path: Path) -> None:
    model = made(prompts={"query": "find: "})
    export(model, str(tmp_path / "theirs"))
    again = import_model(str(tmp_path / "theirs"), str(tmp_path / "again"))
    np.testing.assert_allclose(again.embed_texts(TEXTS), model.embed_texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        again.embed_texts(TEXTS, kind="query"), model.embed_texts(TEXTS, kind="query"), atol=1e-5
    )
