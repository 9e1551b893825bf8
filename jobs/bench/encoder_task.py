"""What `encoders.py` stands on: the task, small towers and MiniLM, one training loop, records of runs, tables."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import loss_behaviour as base
import numpy as np
import torch
from loss_behaviour import Corpus, Floats, Ints, Results, Split, difference, mean_of, say
from torch import Tensor
from trainer import encoder

from rayemb.errors import RayembError
from rayemb.evaluate.diagnostics import alignment, rankme, tolerance, uniformity
from rayemb.evaluate.metrics import ranks
from rayemb.losses.base import LossConfig
from rayemb.models import Model, TextTokenizer, TokenizerConfig, TwoTowerConfig
from rayemb.models.interchange import import_model
from rayemb.models.text import TextTransformerConfig
from rayemb.parallel import Alone
from rayemb.train.config import TrainConfig
from rayemb.train.objective import Objective, trimmed
from rayemb.train.optimizers import AdamWConfig, OptimizerConfig
from rayemb.train.parameters import ParameterRule, parameter_groups
from rayemb.train.schedules import LinearConfig

VOCABULARY, LENGTH, DIM = 4096, 32, 128
SEARCH = 100
"""The seed, and so the split, on which rates are chosen; no figure of it is reported."""
PLAIN = base.PLAIN  # InfoNCE at a fixed temperature of 0.1, from terms to descriptions
Tensors = dict[str, Tensor]
Figures = dict[str, float]


class Task(NamedTuple):
    """A seed's split of ICD-10-CM. `ids`: the tokens of all texts `(N, L)`, -1 = padding."""

    corpus: Corpus
    split: Split
    tokenizer: TextTokenizer
    ids: Tensor
    seed: int

    def tokens(self, texts: Ints) -> Tensor:
        """Those of some texts, cut to the longest."""
        return trimmed(self.ids[torch.from_numpy(texts)])

    def pairs(self, steps: int, size: int) -> Iterator[Tensors]:
        """Batches of terms and the descriptions of their codes, as an objective wants them; the same in every arm."""
        arm = base.Arm(0, "", PLAIN)
        for queries, documents, keys in base.batches(self.corpus, self.split, arm, self.seed, steps, size):
            found = {"query_tokens": self.tokens(queries), "tokens": self.tokens(documents)}
            yield found | {"keys": torch.from_numpy(keys)}


def task_of(corpus: Corpus, seed: int, tokenizer: TextTokenizer | None = None) -> Task:
    """The seed's; without a tokenizer one is learned from the training texts."""
    split = base.split_of(corpus, seed)
    if tokenizer is None:
        texts = [corpus.texts[i] for i in np.concatenate([split.terms, split.codes])]
        tokenizer = TextTokenizer.train(texts, TokenizerConfig(vocab_size=VOCABULARY, max_length=LENGTH))
    return Task(corpus, split, tokenizer, torch.from_numpy(tokenizer(corpus.texts)), seed)


def small(task: Task, dim: int = DIM, projection: Literal["linear", "none"] = "linear", **tower: Any) -> Model:
    """An untrained text transformer, 3 blocks of width 128 unless `tower` says otherwise."""
    words = TokenizerConfig(vocab_size=VOCABULARY, max_length=LENGTH)
    text = TextTransformerConfig(**tower)
    config = TwoTowerConfig(dim=dim, image=None, text=text, tokenizer=words, projection=projection)
    return Model.create(config, task.tokenizer, task.seed)


def minilm(max_length: int = LENGTH) -> Model:
    """all-MiniLM-L6-v2 as its own directory says it: mean pooling."""
    with tempfile.TemporaryDirectory() as folder:
        return import_model(encoder(), f"{folder}/model", max_length=max_length)


def changed(model: Model, seed: int, **text: Any) -> Model:
    """A copy whose text tower is configured otherwise; what that adds to its pooling is random."""
    config = model.network.config
    update = {"text": config.text.model_copy(update=text)}
    made = Model.create(config.model_copy(update=update), model.tokenizer, seed)
    missing, extra = made.network.load_state_dict(model.network.state_dict(), strict=False)
    assert not extra or all(name.startswith("text_pooling") for name in extra)
    assert all(name.startswith("text_pooling") for name in missing)
    return made


# ---- training ------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """CPU seconds of a training, the medians of its step and of the optimizer's part, the loss at the end."""

    seconds: float
    step: float
    optimizer: float
    loss: float


def fit(
    objective: Objective,
    batches: Iterable[Tensors],
    steps: int,
    optimizer: OptimizerConfig,
    *,
    seed: int,
    rules: Sequence[ParameterRule] = (),
    share: Callable[[Tensors, int], Tensor] | None = None,
) -> Cost:
    """Trains as the trainer does in one process: warm-up over a tenth, then down to zero; gradients clipped to 1.

    Raises RayembError where it diverges.
    """
    torch.manual_seed(seed)
    settings = TrainConfig(optimizer=optimizer, parameters=list(rules), zero_stage=0)
    moved = optimizer.build(parameter_groups(objective, settings))
    schedule = LinearConfig(warmup_steps=max(1, steps // 10))
    objective.train()
    began, times, inner, losses = time.process_time(), [], [], []
    for step, raw in enumerate(batches):
        started = time.process_time()
        batch = objective.prepared(raw, step)
        loss = share(batch, step) if share else objective.share(objective(batch), batch, Alone(), step / steps)
        moved.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        for group in moved.param_groups:
            factor = group["learning_rate_factor"]
            group["lr"] = factor * schedule.rate(optimizer.learning_rate, step, steps)
        middle = time.process_time()
        moved.step()
        ended = time.process_time()
        inner.append(ended - middle)
        times.append(ended - started)
        losses.append(float(loss.detach()))
    objective.eval()
    seconds = time.process_time() - began
    return Cost(seconds, statistics.median(times), statistics.median(inner), float(np.mean(losses[-20:])))


def tune(
    task: Task, model: Model, steps: int, size: int, optimizer: OptimizerConfig, loss: LossConfig = PLAIN
) -> tuple[Objective, Cost]:
    """Contrastive training on the task's pairs."""
    objective = Objective(model.network, loss.build(model.dim))  # type: ignore[attr-defined]
    return objective, fit(objective, task.pairs(steps, size), steps, optimizer, seed=task.seed)


def adamw(rate: float) -> AdamWConfig:
    """AdamW with a small decay."""
    return AdamWConfig(learning_rate=rate, weight_decay=0.01)


# ---- measuring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def vectors(task: Task, model: Model, texts: Ints, encode: Callable[[Tensor], Tensor] | None = None) -> Floats:
    """Unit vectors of texts by number, the short ones together."""
    order = np.argsort((task.ids[torch.from_numpy(texts)] != -1).sum(1).numpy(), kind="stable")
    parts = [texts[order[i : i + 256]] for i in range(0, len(order), 256)]
    found = np.concatenate([(encode or model.network.encode_text)(task.tokens(part)).numpy() for part in parts])
    out = np.empty_like(found)
    out[order] = found
    return out


def figures(task: Task, model: Model, queries: int | None = None) -> Figures:
    """Held-out figures in per cent; and of the vectors themselves. `queries`: of so many terms alone."""
    split = task.split
    asked = slice(None) if queries is None else np.random.default_rng([task.seed, 7]).permutation(len(split.queries))
    some = asked if isinstance(asked, slice) else asked[:queries]
    own, answers = vectors(task, model, split.queries[some]), split.answers[some]
    candidates = vectors(task, model, split.candidates)
    paired = candidates[np.searchsorted(split.candidates, answers)]
    return base.scores(ranks(own, candidates, answers, split.candidates)) | {
        "alignment": alignment(own, paired),
        "uniformity": uniformity(candidates),
        "tolerance": tolerance(np.concatenate([own, candidates]), np.concatenate([answers, split.candidates])),
    }


def rank_of(task: Task, model: Model) -> float:
    """RankMe of the training descriptions' unit vectors."""
    return rankme(vectors(task, model, task.split.codes))


# ---- records -------------------------------------------------------------------------------------------------------


class Lab:
    """The corpus, and the figures of every run as lines of a file: what is there is not run again."""

    def __init__(self, path: Path, seeds: int) -> None:
        self.path, self.seeds = path, seeds
        self._corpus: Corpus | None = None
        self.tasks: dict[int, Task] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[tuple[str, str, int], Figures] = {
            (row["part"], row["arm"], row["seed"]): row["figures"] for row in map(json.loads, lines)
        }

    @property
    def corpus(self) -> Corpus:
        """ICD-10-CM, read when it is first wanted."""
        self._corpus = self._corpus or base.read_corpus()
        return self._corpus

    def task(self, seed: int) -> Task:
        """A seed's."""
        if seed not in self.tasks:
            self.tasks[seed] = task_of(self.corpus, seed)
        return self.tasks[seed]

    def run(self, part: str, arm: str, seed: int, make: Callable[[], Figures]) -> Figures:
        """The figures of an arm, of a diverged one `{"recall@1": 0, "MRR@10": 0}`."""
        key = (part, arm, seed)
        if key not in self.found:
            began = time.process_time()
            try:
                figures = make()
            except RayembError as error:
                say(f"{part}, {arm}: {error}")
                figures = {"recall@1": 0.0, "MRR@10": 0.0}
            figures["cpu"] = time.process_time() - began
            self.found[key] = figures
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as out:
                out.write(json.dumps({"part": part, "arm": arm, "seed": seed, "figures": figures}) + "\n")
            shown = ", ".join(f"{name} {figures[name]:.2f}" for name in ("recall@1", "MRR@10") if name in figures)
            say(f"{part}: seed {seed}, {arm}: {shown}, {figures['cpu']:.0f} s")
        return self.found[key]

    def results(self, part: str, arms: Iterable[str]) -> Results:
        """Arm -> its figures, seed by seed."""
        return {
            arm: [self.found[part, arm, seed] for seed in range(self.seeds) if (part, arm, seed) in self.found]
            for arm in arms
        }

    def seconds(self, part: str) -> float:
        """CPU seconds of a part's runs."""
        return sum(figures["cpu"] for (own, _, _), figures in self.found.items() if own == part)

    def best_rate(self, part: str, name: str, start: float, make: Callable[[float], Figures]) -> float:
        """The rate of the best MRR@10 on the search's split, by factors of two until both neighbours are worse."""
        tried: dict[float, float] = {}

        def at(rate: float) -> None:
            tried[rate] = self.run(part, f"search {name} {rate:g}", SEARCH, lambda: make(rate))["MRR@10"]

        for factor in (1.0, 0.5, 2.0):
            at(start * factor)
        for _ in range(4):
            best = max(tried, key=lambda rate: tried[rate])
            if best not in (min(tried), max(tried)):
                break
            at(best / 2 if best == min(tried) else best * 2)
        return max(tried, key=lambda rate: tried[rate])


def table(results: Results, reference: str, keys: Sequence[str], notes: dict[str, str]) -> list[str]:
    """A row an arm: means of `keys` with the paired difference to `reference`, then of `notes` (key -> format)."""
    heads = ["arm", *(f"{key} | difference" for key in keys), *notes]
    lines = [f"| {' | '.join(heads)} |", "|---" * (1 + 2 * len(keys) + len(notes)) + "|"]
    for name, found in results.items():
        cells = []
        for key in keys:
            paired = name != reference and len(found) == len(results[reference]) and key in results[reference][0]
            gap = f"{difference(results, name, reference, key)}" if paired else ""
            cells += [f"{mean_of(results, name, key):.1f}", gap]
        cells += [f"{mean_of(results, name, key):{form}}" if key in found[0] else "" for key, form in notes.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def verdict(results: Results, arm: str, against: str, key: str = "MRR@10") -> str:
    """Whether more was shown, with the difference."""
    gap = difference(results, arm, against, key)
    return f"{base.TESTS['more'](gap)} ({key} {gap})"
