"""Part C of `encoders.py`: what learning from texts without pairs is worth (RetroMAE, DupMAE, Mirror-BERT)."""

import importlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from encoder_task import (
    SEARCH,
    Cost,
    Figures,
    Lab,
    Task,
    Tensors,
    adamw,
    changed,
    figures,
    fit,
    minilm,
    small,
    table,
    task_of,
    tune,
    verdict,
)

from rayemb.data.augment import TextAugmentConfig
from rayemb.losses import NTXentConfig
from rayemb.models import Model
from rayemb.models.pooling import ClsPoolingConfig, MeanPoolingConfig
from rayemb.train.objective import Objective, trimmed
from rayemb.train.retromae import RetroMAEConfig

FIRST, SIZE, TUNED, BATCH = 250, 128, 150, 128  # steps and texts of pre-training, steps and pairs of tuning
BAGS = {"RetroMAE, then fine-tuned": 0.0, "DupMAE, then fine-tuned": 0.1}
DUP = "DupMAE, then fine-tuned"
ALONE, LONGER = "fine-tuned alone", "fine-tuned alone, equal compute"
LINES, VIEWS, SENTENCES = 10_000, 200, 0.04  # Mirror-BERT's own: texts, batch, temperature
BEFORE, DROPOUT, HEADS = "DupMAE, not tuned", "Mirror-BERT, dropout 0.1", "Mirror-BERT, drophead 0.2"
MINILM, MIRRORED = "MiniLM, not tuned", "MiniLM, Mirror-BERT"
NOISE = TextAugmentConfig(mask_span=5)


def unlabelled(task: Task) -> list[str]:
    """All descriptions of ICD-10-CM and the training terms, without the held-out texts."""
    icd = importlib.import_module("simple_icd_10_cm")
    corpus, split = task.corpus, task.split
    held = {corpus.texts[i].lower() for i in np.concatenate([split.candidates, split.queries])}
    every = [icd.get_description(code) for code in icd.get_all_codes(True)] + [corpus.texts[i] for i in split.terms]
    return [text for text in dict.fromkeys(every) if text.lower() not in held]


def pretrained(lab: Lab, seed: int, bag: float) -> tuple[Model, float]:
    """A tower that was pre-trained by masking, and the CPU seconds that took; kept beside the records."""
    place = lab.path.parent / f"pretrained-{seed}-{bag:g}"
    if not (place / "rayemb.json").exists():
        task = lab.task(seed)
        model = small(task, projection="none", pooling=ClsPoolingConfig())
        texts = unlabelled(task)
        ids, rng = task.tokenizer(texts), np.random.default_rng([seed, 9])

        def batches() -> Iterator[Tensors]:
            for _ in range(FIRST):
                rows = rng.choice(len(texts), SIZE, replace=False)
                tokens = trimmed(torch.from_numpy(ids[rows]))
                yield {"tokens": tokens, "row": torch.from_numpy(rows), "task": torch.zeros(SIZE, dtype=torch.long)}

        objective = RetroMAEConfig(bag_weight=bag).build(model.network, [], task.tokenizer, seed)
        cost = fit(objective, batches(), FIRST, adamw(1e-3), seed=seed)
        model.info = {"cpu": cost.seconds}
        model.save(str(place))
    model = Model.load(str(place))
    model.network.requires_grad_(True)
    return model, float(model.info["cpu"])


def contrasted(lab: Lab, name: str, rate: float, seed: int) -> Figures:
    """One arm of the comparison with pairs."""
    task, steps = lab.task(seed), TUNED
    model = small(task, projection="none", pooling=ClsPoolingConfig())
    before: Figures = {}
    seconds = 0.0
    if name in BAGS:
        model, seconds = pretrained(lab, seed, BAGS[name])
        before = {"before, recall@1": figures(task, model)["recall@1"]}
    elif name == LONGER:
        own, whole = lab.found["C", ALONE, seed], lab.found["C", DUP, seed]
        steps = round(TUNED * whole["training, s"] / own["training, s"])
    _, cost = tune(task, model, steps, BATCH, adamw(rate))
    return figures(task, model) | before | {"steps": float(steps), "training, s": seconds + cost.seconds}


def mirrored(task: Task, model: Model, texts: list[str], size: int, rate: float) -> Cost:
    """One epoch of texts against themselves."""
    draw = np.random.default_rng([task.seed, 10])
    order = draw.permutation(len(texts))[:LINES]

    def batches() -> Iterator[Tensors]:
        for rows in np.split(order[: len(order) // size * size], len(order) // size):
            own = [texts[i] for i in rows]
            spans = [NOISE.span(text, draw.random()) for text in own]
            whole, masked = task.tokenizer(own), task.tokenizer.with_prompt(own, "", spans)[0]
            yield {
                "query_tokens": torch.from_numpy(whole),
                "tokens": torch.from_numpy(masked),
                "keys": torch.from_numpy(rows),
            }

    objective = Objective(model.network, NTXentConfig(temperature=SENTENCES).build(model.dim))
    return fit(objective, batches(), len(order) // size, adamw(rate), seed=task.seed)


def without_pairs(lab: Lab, name: str, rate: float, seed: int) -> Figures:
    """One arm of the comparison without any pairs; mean pooling."""
    if name in (MINILM, MIRRORED):
        model = minilm()
        task = task_of(lab.corpus, seed, model.tokenizer)
        if name == MIRRORED:
            mirrored(task, model, unlabelled(task)[::2], 100, rate)
        return figures(task, model, 1000)
    task = lab.task(seed)
    model = pretrained(lab, seed, 0.1)[0]
    noise = {DROPOUT: {"dropout": 0.1}, HEADS: {"drop_heads": 0.2}}.get(name, {})
    model = changed(model, seed, pooling=MeanPoolingConfig(), **noise)
    if noise:
        mirrored(task, model, unlabelled(task), VIEWS, rate)
    return figures(task, model)


def pretraining(lab: Lab) -> list[str]:
    """RetroMAE and DupMAE before fine-tuning; Mirror-BERT instead of it."""
    alone = lab.best_rate("C", ALONE, 2e-3, lambda rate: contrasted(lab, ALONE, rate, SEARCH))
    after = lab.best_rate("C", DUP, 1e-3, lambda rate: contrasted(lab, DUP, rate, SEARCH))
    mirror = lab.best_rate("C", DROPOUT, 3e-4, lambda rate: without_pairs(lab, DROPOUT, rate, SEARCH))
    arms = {ALONE: alone, **dict.fromkeys(BAGS, after), LONGER: alone}
    for seed in range(lab.seeds):
        for name, rate in arms.items():
            lab.run("C", name, seed, partial(contrasted, lab, name, rate, seed))
        for name in (BEFORE, DROPOUT, HEADS):
            lab.run("C", name, seed, partial(without_pairs, lab, name, mirror, seed))
    results = lab.results("C", arms)
    unpaired = lab.results("C", (BEFORE, DROPOUT, HEADS))
    texts = len(unlabelled(lab.task(0)))
    notes = {"before, recall@1": ".1f", "steps": ".0f", "training, s": ".0f"}
    return [
        f"### C. Pre-training on texts without pairs, {lab.seeds} seeds",
        "",
        f"The tower of A with [CLS] pooling and no projection. {FIRST} steps of {SIZE} texts at 1e-3, of about "
        f"{texts:,} (all descriptions of ICD-10-CM but the held-out ones, and the training terms); then "
        f"{TUNED} steps of {BATCH} pairs as in A. Rates on a split of their own: {alone:g} alone, {after:g} after "
        f"pre-training (chosen for DupMAE), {mirror:g} for Mirror-BERT.",
        "",
        *table(results, ALONE, ("recall@1", "recall@10", "MRR@10"), notes),
        "",
        f"S179, recall@10 over the same fine-tuning from scratch? RetroMAE: "
        f"{verdict(results, 'RetroMAE, then fine-tuned', ALONE, 'recall@10')}; DupMAE: "
        f"{verdict(results, DUP, ALONE, 'recall@10')}; over fine-tuning alone of equal compute: "
        f"{verdict(results, DUP, LONGER, 'recall@10')}; the bag of words' part: "
        f"{verdict(results, DUP, 'RetroMAE, then fine-tuned', 'recall@10')}.",
        "",
        f"Mirror-BERT (S131): from the DupMAE tower, mean pooling, one epoch of {LINES:,} of the same texts against "
        f"themselves, {VIEWS} a batch, NT-Xent at {SENTENCES}, spans of 5 characters masked; no pairs.",
        "",
        *table(unpaired, BEFORE, ("recall@1", "MRR@10"), {"uniformity": ".2f", "alignment": ".2f"}),
        "",
        f"S131, raises recall over the un-tuned encoder? {verdict(unpaired, DROPOUT, BEFORE, 'recall@1')}; drophead: "
        f"{verdict(unpaired, HEADS, BEFORE, 'recall@1')}.",
    ]
