"""Whether each batch sampler does what its paper says, on real data, with paired seeds.

    .venv/bin/python jobs/bench/samplers.py                       # everything: ~8 minutes of one core

A: cluster_stratified (S084) under NT-Xent on scikit-learn's digits. B: locality (S113) and length_bucketed under
InfoNCE on ICD-10-CM terms, the task of `loss_behaviour.py`. C: the padding that length_bucketed saves, untrained.
Arms of a seed share split, initial weights, number of steps and (in A) the random draws of the augmentation;
differences are paired by seed, with 95 % t-intervals, uncorrected. Beyond the library's packages it needs
`pip install scikit-learn simple-icd-10-cm==1.5.0`.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import loss_behaviour as base
import numpy as np
import torch
import torch.nn.functional as F
from loss_behaviour import Corpus, Difference, Encoder, Floats, Ints, Results, Split, difference, mean_of, say
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from rayemb.data.samplers import ClusterStratifiedConfig, LengthBucketedConfig, LocalityConfig, ShuffledConfig
from rayemb.data.samplers.base import Sampler, Window
from rayemb.evaluate.metrics import ranks
from rayemb.losses import Batch, NTXentConfig
from rayemb.models.tokenizer import TextTokenizer, TokenizerConfig

Columns = Mapping[str, np.ndarray]
RANDOM = "random"


def epoch(sampler: Sampler, columns: Columns, rows: int, size: int, rng: np.random.Generator) -> list[Ints]:
    """One epoch's batches of a window that is all rows."""
    order, ends = sampler.arrange(Window(rows, columns.__getitem__, np.arange(rows)), size, rng)
    return np.split(order, np.arange(size, len(order), size) if ends is None else ends[:-1])


def full(sampler: Sampler, columns: Columns, rows: int, size: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Full batches, epoch after epoch; an epoch's short last one is left out, in every arm."""
    while True:
        yield from (batch for batch in epoch(sampler, columns, rows, size, rng) if len(batch) == size)


def table(results: Results, notes: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A row an arm: its notes, then each of `keys` with its paired difference to random batches."""
    heads = ["batches", *notes, *(f"{key} | difference" for key in keys)]
    lines = [f"| {' | '.join(heads)} |", "|---" * (1 + len(notes) + 2 * len(keys)) + "|"]
    for name, found in results.items():
        cells = [f"{mean_of(results, name, note):.2f}" if note in found[0] else "" for note in notes]
        for key in keys:
            gap = f"{difference(results, name, RANDOM, key)}" if name != RANDOM and notes[0] in found[0] else ""
            cells += [f"{mean_of(results, name, key):.1f}", gap]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def verdict(gap: Difference, least: float) -> str:
    """Whether the difference is at least so much."""
    return "yes" if gap.low >= least else "**no**" if gap.high < least else "**not shown**"


# ---- A: cluster_stratified, digits ---------------------------------------------------------------------------------
STRICT, SLACK = "stratified, k = B", "stratified, k = 1.25 B"
ORACLE, KNOWN = "stratified by true class (oracle)", "random, classes told to the loss (bound)"
IMAGE_STEPS, FEW = 400, 5
SAME, USED, CUT = "same class, %", "rows used per epoch, %", "cut, %"
ACCURACIES = ("k-NN", f"k-NN, {FEW} labels a class")


class Digits(NamedTuple):
    """A split: pixels in 0 .. 1 and classes."""

    images: Floats
    test_images: Floats
    labels: Ints
    test_labels: Ints


def convnet() -> nn.Sequential:
    """The encoder, features `(n, 128)` of 8 x 8 images, and SimCLR's head, which is not used after training."""
    first, second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
    encoder = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 128))
    return nn.Sequential(encoder, nn.Sequential(nn.ReLU(), nn.Linear(128, 64)))


def digits(seed: int) -> Digits:
    """Two thirds to train on, a third held out, equally in every class."""
    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.float32) / 16
    return Digits(*train_test_split(pixels, labels.astype(int), test_size=1 / 3, stratify=labels, random_state=seed))


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to a pixel and scaled by up to 12 % each way, with noise."""
    u = torch.rand(len(images), 4, generator=generator) * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = 1 + 0.12 * u[:, 0], 1 + 0.12 * u[:, 1], u[:, 2:] / 4
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    return moved + 0.1 * torch.randn(images.shape, generator=generator)


def kmeans(images: Floats, clusters: int, seed: int) -> Columns:
    """Pseudo-labels by k-means on raw pixels."""
    return {"cluster": KMeans(clusters, n_init=3, random_state=seed).fit_predict(images).astype(np.int64)}


def same_class(labels: Ints, batches: list[Ints]) -> float:
    """Per cent of the pairs of different rows of a batch that are of one class."""
    counts = np.array([np.bincount(labels[batch], minlength=10) for batch in batches])
    sizes = counts.sum(1)
    return 100 * float((counts * (counts - 1)).sum() / (sizes * (sizes - 1)).sum())


def accuracies(model: nn.Sequential | None, data: Digits, seed: int) -> dict[str, float]:
    """Held-out accuracies in per cent, of raw pixels if there is no model; nearest neighbours by cosine."""
    inside, outside = data.images, data.test_images
    if model is not None:
        with torch.no_grad():
            inside, outside = (model[0](torch.from_numpy(x).view(-1, 1, 8, 8)).numpy() for x in (inside, outside))
    rng, few = np.random.default_rng([seed, 6]), []
    for _ in range(20):
        rows = np.concatenate([rng.permutation(np.flatnonzero(data.labels == label))[:FEW] for label in range(10)])
        nearest = KNeighborsClassifier(1, metric="cosine").fit(inside[rows], data.labels[rows])
        few.append(nearest.score(outside, data.test_labels))
    nearest = KNeighborsClassifier(10, metric="cosine").fit(inside, data.labels)
    found = (nearest.score(outside, data.test_labels), np.mean(few))
    return {key: 100 * float(value) for key, value in zip(ACCURACIES, found, strict=True)}


def simclr(data: Digits, sampler: Sampler, columns: Columns, size: int, seed: int, *, told: bool) -> dict[str, float]:
    """One run's figures."""
    torch.manual_seed(seed)
    model, loss = convnet(), NTXentConfig(temperature=0.1).build(64)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / IMAGE_STEPS)
    drawn = full(sampler, columns, len(data.labels), size, np.random.default_rng([seed, 2]))
    used = [next(drawn) for _ in range(IMAGE_STEPS)]
    for rows in used:
        images = torch.from_numpy(data.images[rows]).view(-1, 1, 8, 8)
        one, two = model(torch.cat([view(images, generator), view(images, generator)])).chunk(2)
        optimizer.zero_grad()
        loss(Batch(one, two, keys=torch.from_numpy(data.labels[rows]) if told else None)).backward()
        optimizer.step()
        decay.step()
    first = sum(map(len, epoch(sampler, columns, len(data.labels), size, np.random.default_rng([seed, 3]))))
    return accuracies(model, data, seed) | {SAME: same_class(data.labels, used), USED: 100 * first / len(data.labels)}


def reference_order(clusters: Ints, size: int) -> list[Ints]:
    """The official notebooks' batches: rows sorted once by their rank within their cluster, then cut."""
    rank = np.zeros(len(clusters), dtype=np.int64)
    for own in (clusters == cluster for cluster in np.unique(clusters)):
        rank[own] = np.arange(own.sum())
    return np.split(np.argsort(rank, kind="stable"), range(size, len(clusters), size))


def sweep(seeds: int, size: int) -> list[str]:
    """Same-class pairs and coverage by the number of clusters, untrained."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        data, rng = digits(seed), np.random.default_rng([seed, 4])
        rows, same = len(data.labels), kmeans(data.images, size, seed)
        made = {RANDOM: epoch(ShuffledConfig(), {}, rows, size, rng)}
        made["the reference's one order, k = B"] = reference_order(same["cluster"], size)
        made["k = B, the rest relaxed"] = epoch(ClusterStratifiedConfig(rest="relax"), same, rows, size, rng)
        for times in (0.5, 0.75, 1, 1.25, 1.5, 2, 4):
            columns = kmeans(data.images, int(times * size), seed)
            made[f"k = {times:g} B, the rest dropped"] = epoch(ClusterStratifiedConfig(), columns, rows, size, rng)
        for name, batches in made.items():
            found.setdefault(name, []).append((same_class(data.labels, batches), sum(map(len, batches)) / rows))
    plain = float(np.mean([one for one, _ in found[RANDOM]]))
    lines = [f"| batches of {size} | same-class pairs, % | cut, % | {USED} |", "|---" * 4 + "|"]
    for name, values in found.items():
        rate, share = np.mean(values, axis=0)
        lines.append(f"| {name} | {rate:.1f} | {100 * (1 - rate / plain):.0f} | {100 * share:.0f} |")
    return lines


def part_a(args: argparse.Namespace) -> list[str]:
    """The section on cluster_stratified."""
    lines = [f"### A. cluster_stratified (S084): NT-Xent at 0.1 on digits, {IMAGE_STEPS} steps, {args.seeds} seeds\n"]
    lines += ["1,198 training images, clusters by k-means on raw pixels; same-class pairs are false negatives.", ""]
    lines += [*sweep(args.seeds, 16), "", *sweep(args.seeds, 64)]
    for size in (16, 64):
        results: Results = {}
        for seed in range(args.seeds):
            data, strict = digits(seed), ClusterStratifiedConfig()
            arms: dict[str, tuple[Sampler, Columns]] = {
                RANDOM: (ShuffledConfig(), {}),
                STRICT: (strict, kmeans(data.images, size, seed)),
                SLACK: (strict, kmeans(data.images, 5 * size // 4, seed)),
                ORACLE: (strict, {"cluster": data.labels}),
                KNOWN: (ShuffledConfig(), {}),
            }
            torch.manual_seed(seed)
            results.setdefault("raw pixels", []).append(accuracies(None, data, seed))
            results.setdefault("untrained", []).append(accuracies(convnet(), data, seed))
            for name, (sampler, columns) in arms.items():
                figures = simclr(data, sampler, columns, size, seed, told=name == KNOWN)
                results.setdefault(name, []).append(figures)
                figures[CUT] = 100 * (1 - figures[SAME] / results[RANDOM][seed][SAME])
            say(f"A: batch {size}, seed {seed}: {time.process_time():.0f} s of CPU so far")
        lines += ["", f"Trained with batches of {size}, held-out third:", ""]
        lines += table(results, (SAME, USED), ACCURACIES)
        for name in (STRICT, SLACK):
            cut, gap = (difference(results, name, RANDOM, key) for key in (CUT, ACCURACIES[0]))
            cuts, raised = f"cut by {cut:.0f} %, at least 35 %: {verdict(cut, 35)}", base.TESTS["more"](gap)
            kept = f"k-NN not lowered by more than 0.5 points: {verdict(gap, -0.5)}; raised: {raised}"
            lines += ["", f"S084, {name}: same-class pairs {cuts}; {kept}."]
    return lines


# ---- B: locality and length_bucketed, ICD-10-CM --------------------------------------------------------------------
TEXT_STEPS, COARSE = 160, 100
SETTINGS = ((0.1, 256), (0.05, 256), (0.1, 64), (0.05, 64))
COSINE, CODE, FINAL = "TF-IDF cosine of negatives", "same code, %", "final MRR@10"


class Task(NamedTuple):
    """A seed's split. `lexical`: TF-IDF of its terms and of their descriptions; `coarse`: held-out by candidates."""

    corpus: Corpus
    split: Split
    codes: Ints
    columns: Columns
    lexical: tuple[Any, Any]
    coarse: Floats


def task(corpus: Corpus, seed: int) -> Task:
    """The seed's; the held-out terms are not seen by TF-IDF."""
    split = base.split_of(corpus, seed)
    codes = np.repeat(split.codes, split.number)
    parts = [[corpus.texts[i] for i in part] for part in (split.terms, codes, split.candidates, split.queries)]
    model = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
    model.fit(parts[0] + parts[1] + parts[2])
    terms, documents, candidates, queries = (model.transform(part) for part in parts)
    columns = {"lexical": neighbours(terms, documents), "alike": neighbours(documents, documents)}
    columns["length"] = np.array([len(text) for text in parts[1]])
    return Task(corpus, split, codes, columns, (terms, documents), (queries @ candidates.T).toarray())


def neighbours(queries: Any, documents: Any, last: int = 60) -> Ints:
    """Ranks 1 to `last` among the other rows, by the inner product of dense or sparse rows."""
    kept = []
    for start in range(0, queries.shape[0], 1024):
        product = queries[start : start + 1024] @ documents.T
        near = np.array(product.toarray() if hasattr(product, "toarray") else product)
        near[range(len(near)), range(start, start + len(near))] = -np.inf
        top = np.argpartition(-near, last, axis=1)[:, :last]
        order = np.argsort(-np.take_along_axis(near, top, 1), axis=1, kind="stable")
        kept.append(np.take_along_axis(top, order, 1))
    return np.concatenate(kept).astype(np.int64)


@torch.no_grad()
def vectors(model: Encoder, corpus: Corpus, texts: Ints) -> Floats:
    """Unit vectors."""
    return base.cut(model(corpus.bag(texts)).numpy(), base.DIM)


def fit(its: Task, seed: int, temperature: float, drawn: Iterator[Ints]) -> tuple[Encoder, dict[str, float]]:
    """An encoder and its figures."""
    torch.manual_seed(seed)
    model, loss = Encoder(), base.PLAIN.model_copy(update={"temperature": temperature}).build(base.DIM)
    rates = ((model.table, base.RATE_TABLE), (model.mlp, base.RATE_MLP))
    optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": rate} for part, rate in rates], fused=True)
    decay, cosines, same = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / TEXT_STEPS), [], []
    for step, rows in zip(range(TEXT_STEPS), drawn, strict=False):
        codes = its.codes[rows]
        one, two = model(its.corpus.bag(np.concatenate([its.split.terms[rows], codes]))).chunk(2)
        optimizer.zero_grad()
        loss(Batch(one, two, keys=torch.from_numpy(codes))).backward()
        optimizer.step()
        decay.step()
        if step % 10 == 0:
            other = codes[:, None] != codes[None, :]
            cosines.append(float((its.lexical[0][rows] @ its.lexical[1][rows].T).toarray()[other].mean()))
            same.append(100 * (1 - float(other.sum()) / (len(rows) * (len(rows) - 1))))
    return model, measured(its, model) | {COSINE: float(np.mean(cosines)), CODE: float(np.mean(same))}


def measured(its: Task, model: Encoder) -> dict[str, float]:
    """Among all candidates, and re-ranking the coarse tier's first 100: what it missed stays missed."""
    split = its.split
    queries, candidates = vectors(model, its.corpus, split.queries), vectors(model, its.corpus, split.candidates)
    near, own = queries @ candidates.T, (np.arange(len(queries)), np.searchsorted(split.candidates, split.answers))
    inside = its.coarse >= -np.partition(-its.coarse, COARSE - 1, axis=1)[:, COARSE - 1 : COARSE]
    rank = ((near >= near[own][:, None] - 1e-7) & inside).sum(1)
    final = np.where(inside[own] & (rank <= 10), 1 / np.maximum(rank, 1), 0)
    found = base.scores(ranks(queries, candidates, split.answers, split.candidates))
    return found | {FINAL: 100 * float(final.mean())}


def text_arms(its: Task, seed: int, size: int, plain: Encoder) -> dict[str, Iterator[Ints]]:
    """Batches by arm; `plain` is the encoder that random ones made."""
    rows, columns = len(its.codes), dict(its.columns)
    columns["own"] = neighbours(vectors(plain, its.corpus, its.split.terms), vectors(plain, its.corpus, its.codes))

    def local(column: str, first: int, last: int, search: Any = "snowball") -> Iterator[Ints]:
        sampler = LocalityConfig(neighbours="beside the corpus", search=search)
        kept = {"neighbours": columns[column][:, first - 1 : last]}
        return full(sampler, kept, rows, size, np.random.default_rng([seed, 2]))

    return {
        "length_bucketed": full(LengthBucketedConfig(), columns, rows, size, np.random.default_rng([seed, 2])),
        "locality: TF-IDF, ranks 1-50": local("lexical", 1, 50),
        "locality: TF-IDF, 10-60": local("lexical", 10, 60),
        "locality: TF-IDF, 10-60, walk": local("lexical", 10, 60, "walk"),
        "locality: TF-IDF between descriptions, 10-60": local("alike", 10, 60),
        "locality: the random arm's encoder, 10-60": local("own", 10, 60),
    }


def part_b(args: argparse.Namespace) -> list[str]:
    """The section on locality."""
    corpus = base.read_corpus()
    found: dict[tuple[float, int], Results] = {setting: {} for setting in SETTINGS}
    for seed in range(args.seeds):
        its = task(corpus, seed)
        for (temperature, size), results in found.items():
            drawn = full(ShuffledConfig(), {}, len(its.codes), size, np.random.default_rng([seed, 2]))
            plain, figures = fit(its, seed, temperature, drawn)
            results.setdefault(RANDOM, []).append(figures)
            for name, drawn in text_arms(its, seed, size, plain).items():
                results.setdefault(name, []).append(fit(its, seed, temperature, drawn)[1])
            say(f"B: {temperature}, {size}, seed {seed}: {time.process_time():.0f} s of CPU so far")
    lines = [
        f"### B. locality (S113), length_bucketed: InfoNCE on ICD-10-CM, {TEXT_STEPS} steps, {args.seeds} seeds\n",
        "A row is a term with its description; equal codes of a batch are no negatives of each other. Unseen codes, "
        f"2,100 candidates. {FINAL}: the encoder re-ranks the first {COARSE} of TF-IDF.",
    ]
    for (temperature, size), results in found.items():
        lines += ["", f"Temperature {temperature}, batch {size}:", ""]
        lines += table(results, (COSINE, CODE), ("recall@1", "nDCG@10", FINAL))
        gaps = {name: difference(results, name, RANDOM, FINAL) for name in results if name.startswith("locality")}
        shown = "; ".join(f"{name.removeprefix('locality: ')}: {base.TESTS['more'](gap)}" for name, gap in gaps.items())
        lines += ["", f"S113, better {FINAL} than random batches? {shown}."]
    return lines


# ---- C: length_bucketed, padding -----------------------------------------------------------------------------------
def part_c(args: argparse.Namespace) -> list[str]:
    """The section on length_bucketed: no training."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    heads = "texts | batch | tokens: median, 99 %, most | random | by characters | length_bucketed (by tokens)"
    lines = ["### C. length_bucketed: padding, per cent of all tokens\n"]
    lines += ["32,768 texts, windows of 16,384, BPE of 8,192 tokens, batches padded to their longest text.\n"]
    lines += [f"| {heads} | random tokens / its |", "|---" * 7 + "|"]
    icd = importlib.import_module("simple_icd_10_cm")
    codes = np.random.default_rng(0).permutation(icd.get_all_codes(True))[:32_768].tolist()
    read = (icd.get_inclusion_term, icd.get_includes, icd.get_excludes1, icd.get_excludes2)
    short = [icd.get_description(code) for code in codes]
    whole = ["; ".join([icd.get_description(code), *(line for part in read for line in part(code))]) for code in codes]
    for name, texts in (("descriptions", short), ("whole entries", whole)):
        tokenizer = TextTokenizer.train(texts, TokenizerConfig(max_length=4096)).tokenizer
        tokens = np.array([len(one.ids) for one in tokenizer.encode_batch(texts)])
        length = np.array([len(text) for text in texts])
        for size in (32, 256):
            area = np.zeros(3)
            arms = ((ShuffledConfig(), length), (LengthBucketedConfig(), length), (LengthBucketedConfig(), tokens))
            for arm, (sampler, column) in enumerate(arms):
                for seed in range(args.seeds):
                    rng = np.random.default_rng([seed, 5])
                    for window in np.split(rng.permutation(len(texts)), len(texts) // sampler.window_rows):
                        made = epoch(sampler, {"length": column[window]}, len(window), size, rng)
                        area[arm] += sum(len(batch) * tokens[window[batch]].max() for batch in made)
            spread = ", ".join(f"{value:.0f}" for value in np.percentile(tokens, [50, 99, 100]))
            padding = " | ".join(f"{share:.1f}" for share in 100 * (1 - args.seeds * tokens.sum() / area))
            lines.append(f"| {name} | {size} | {spread} | {padding} | {area[0] / area[2]:.2f} |")
    return lines


def main() -> None:
    """Prints the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["A", "B", "C"], default=["A", "B", "C"])
    parser.add_argument("--seeds", type=int, choices=range(2, 11), default=4, help="runs of each arm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"A": part_a, "B": part_b, "C": part_c}
    sections = [line for part in args.parts for line in ["", *makers[part](args)]]
    head = f"`{' '.join(['python', *sys.argv])}`: torch {torch.__version__}, one thread, {time.process_time():,.0f} s"
    print("## What the batch samplers do, on real data", "", f"{head} of CPU time", *sections, sep="\n")


if __name__ == "__main__":
    main()
