"""Every loss written out over explicit pairs: one process, Python loops, no tiles, no log-sum-exp tricks.

`reference(config, batch, parameters)` is the loss of the whole batch, a scalar with a graph back to the batch's vectors
and to `parameters`, which are called as in `loss.named_parameters()`. `reference_steps` is the same for consecutive
batches of a loss that remembers. Written from the papers and the method cards, not from the code under test; of the
package only `Batch`, the configs and `NO_KEY` are used. Compute in fp64: nothing here guards against overflow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayemb.losses import AnyLoss, Batch
from rayemb.parallel import NO_KEY

Parameters = Mapping[str, Tensor]
Key = tuple[int, ...]


def reference(config: AnyLoss, batch: Batch, parameters: Parameters) -> Tensor:
    """The loss of one process that has the whole batch."""
    return reference_steps(config, [batch], parameters)[0]


def reference_steps(config: AnyLoss, batches: Sequence[Batch], parameters: Parameters) -> list[Tensor]:
    """The losses of consecutive batches; only `cross_batch_memory` carries anything from one to the next."""
    if config.name != "cross_batch_memory":
        return [mean(reference_rows(config, batch, parameters), batch) for batch in batches]
    losses, vectors, keys = [], [], []
    for batch in batches:
        queries = batch.queries
        memory = torch.stack(vectors) if vectors else queries.detach()[:0]
        memory_keys = None if batch.keys is None else torch.tensor([*keys], dtype=torch.int64)
        losses.append(
            mean(
                reference_rows(
                    config.loss, replace(batch, memory=memory, memory_keys=memory_keys), inside("loss.", parameters)
                ),
                batch,
            )
        )
        for j, document in enumerate(present(batch.documents)):
            vectors.append(unit(document).detach())
            keys.append(NO_KEY if batch.keys is None else int(batch.keys[j]))
        vectors, keys = vectors[-config.size :], keys[-config.size :]
    return losses


class Row(NamedTuple):
    """An anchor's loss; whether the mean counts it."""

    loss: Tensor
    counted: bool


def mean(rows: Sequence[Row], batch: Batch) -> Tensor:
    """Over the anchors that count; 0 with a graph where there are none."""
    zero = batch.queries.sum() * 0
    number = sum(row.counted for row in rows)
    return sum((row.loss for row in rows if row.counted), zero) / max(1, number)


def reference_rows(config: AnyLoss, batch: Batch, parameters: Parameters) -> list[Row]:
    """The losses of all anchors, in the order of the definition: queries, then documents where these are anchors."""
    rows: list[Row] = ROWS[config.name](config, batch, parameters)
    return rows


# -- what all of them need ---------------------------------------------------------------------------------------


def inside(prefix: str, parameters: Parameters) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def present(rows: Tensor | None) -> list[Tensor]:
    return [] if rows is None else list(rows)


def unit(row: Tensor) -> Tensor:
    return row / (row * row).sum().sqrt()


def scale_of(config: Any, parameters: Parameters, task: int = 0) -> Tensor:
    """1 / temperature, which does not go below its floor while it is learned."""
    log_scale = parameters["scale.log_scale"][task]
    if not config.learnable_temperature:
        return log_scale.exp()
    return torch.minimum(log_scale, torch.full_like(log_scale, math.log(1 / config.min_temperature))).exp()


def lse(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(logits)).logsumexp(0)


@dataclass(frozen=True, eq=False)
class Item:
    """A text: its unit vector, what it is, and its guide's unit vector if there is a guide."""

    vector: Tensor
    kind: str  # query, document, negative, memory
    index: int
    keys: Key = ()
    owner: int = -1  # the query a hard negative was mined for
    guide: Tensor | None = None

    def __matmul__(self, other: "Item") -> Tensor:
        return self.vector @ other.vector

    def same_key(self, other: "Item") -> bool:
        return any(a == b != NO_KEY for a, b in zip(self.keys, other.keys, strict=False))


def items(
    kind: str, rows: Tensor | None, keys: Tensor | None, owners: Tensor | None, guides: Tensor | None
) -> list[Item]:
    return [
        Item(
            unit(row),
            kind,
            index,
            () if keys is None else tuple(torch.atleast_1d(keys[index]).tolist()),
            -1 if owners is None else int(owners[index]),
            None if guides is None else unit(guides[index]),
        )
        for index, row in enumerate(present(rows))
    ]


class Texts:
    """The batch as lists of items."""

    def __init__(self, batch: Batch) -> None:
        keyed, guide = batch.keys is not None, batch.guide
        self.queries = items("query", batch.queries, batch.keys, None, guide and guide.queries)
        self.documents = items("document", batch.documents, batch.keys, None, guide and guide.documents)
        self.negatives = items(
            "negative",
            batch.negatives,
            batch.negative_keys if keyed else None,
            batch.negative_rows,
            guide and guide.negatives,
        )
        self.memory = items("memory", batch.memory, batch.memory_keys if keyed else None, None, None)
        self.candidates = self.documents + self.negatives + self.memory
        weights = batch.weights
        self.weights = weights.to_dense() if weights is not None and weights.is_sparse else weights

    def positive_weight(self, query: Item, candidate: Item, duplicates: str) -> float:
        """How much of a positive the candidate is to the query, apart from equal keys: 0 for not at all."""
        if self.weights is None:
            weight = float(candidate.kind == "document" and candidate.index == query.index)
        elif candidate.kind == "memory":
            weight = 0.0
        else:
            first = len(self.documents) if candidate.kind == "negative" else 0
            weight = float(self.weights[query.index, first + candidate.index])
        return 1.0 if not weight and duplicates == "positive" and query.same_key(candidate) else weight

    def forward(self, duplicates: str) -> "list[Sorted]":
        """Of each query, all candidates."""
        return [self._sorted(q, [(q, c, c) for c in self.candidates], duplicates) for q in self.queries]

    def backward(self, duplicates: str) -> "list[Sorted]":
        """Of each document, all queries."""
        return [self._sorted(d, [(q, d, q) for q in self.queries], duplicates) for d in self.documents]

    def _sorted(self, anchor: Item, pairs: list[tuple[Item, Item, Item]], duplicates: str) -> "Sorted":
        positives, negatives = [], []
        for query, candidate, other in pairs:
            weight = self.positive_weight(query, candidate, duplicates)
            if weight:
                positives.append((other, weight))
            elif duplicates == "negative" or not query.same_key(candidate):
                negatives.append(other)
        return Sorted(anchor, positives, negatives)


class Sorted(NamedTuple):
    """An anchor, its positives with their weights, and its negatives."""

    anchor: Item
    positives: list[tuple[Item, float]]
    negatives: list[Item]


def softmax_row(positives: Sequence[tuple[Tensor, float]], others: Sequence[Tensor], like: Tensor) -> Row:
    """Weighted mean of -log softmax of the positives' logits among `others` and the positives."""
    total = sum(weight for _, weight in positives)
    if not total:
        return Row(like.sum() * 0, False)
    norm = lse([logit for logit, _ in positives] + list(others))
    return Row(sum((norm - logit) * weight for logit, weight in positives) / total, True)


# -- the losses --------------------------------------------------------------------------------------------------


def infonce(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    texts, scale = Texts(batch), scale_of(config, parameters)

    def positives(found: Sorted) -> list[tuple[Tensor, float]]:
        return [(scale * (found.anchor @ other - config.margin), weight) for other, weight in found.positives]

    def negatives(found: Sorted) -> list[Tensor]:
        return [scale * (found.anchor @ other) for other in found.negatives]

    forward, backward = texts.forward(config.duplicates), texts.backward(config.duplicates)
    if config.partition == "per_direction":
        chosen = forward if "query_to_document" in config.directions else []
        chosen = chosen + (backward if "document_to_query" in config.directions else [])
        return [softmax_row(positives(found), negatives(found), batch.queries) for found in chosen]
    rows = []
    for i, query in enumerate(texts.queries):
        document = texts.documents[i]
        denominator = negatives(forward[i])
        if "document_to_query" in config.directions:
            # GTE: the sum over queries of exp(s(q_j, d_i)) has the positive j = i in it, a second time.
            denominator += negatives(backward[i]) + [logit for logit, _ in positives(backward[i])]
        if "query_to_query" in config.directions:
            denominator += [scale * (query @ q) for q in others(query, texts.queries, config.duplicates)]
        if "document_to_document" in config.directions:
            candidates = [c for c in texts.candidates if c.kind != "negative" or c.owner != i]
            denominator += [scale * (document @ c) for c in others(document, candidates, config.duplicates)]
        rows.append(softmax_row(positives(forward[i]), denominator, batch.queries))
    return rows


def others(anchor: Item, candidates: Sequence[Item], duplicates: str = "ignore") -> list[Item]:
    """The candidates that are neither the anchor itself nor (unless they are negatives after all) of its key."""
    return [
        c
        for c in candidates
        if (c.kind, c.index) != (anchor.kind, anchor.index) and (duplicates == "negative" or not anchor.same_key(c))
    ]


def siglip(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    """-log sigmoid(+-(s cos + b)) of every pair; the sum over a query's pairs is its row."""
    texts, scale, bias = Texts(batch), scale_of(config, parameters), parameters["bias"][0]
    rows = []
    for found in texts.forward(config.duplicates):
        loss = batch.queries.sum() * 0
        for other, weight in found.positives:
            loss = loss + weight * torch.log1p(torch.exp(-(scale * (found.anchor @ other) + bias)))
        for other in found.negatives:
            loss = loss + torch.log1p(torch.exp(scale * (found.anchor @ other) + bias))
        rows.append(Row(loss, True))
    return rows


def views(texts: Texts) -> tuple[list[Item], list[Item]]:
    """The anchors of losses over two views, and the further candidates."""
    return texts.queries + texts.documents, texts.negatives + texts.memory


def nt_xent(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    texts, scale = Texts(batch), scale_of(config, parameters)
    anchors, more = views(texts)
    rows = []
    for anchor in anchors:
        positives, negatives = [], []
        for other in [a for a in anchors if a is not anchor] + more:
            logit = scale * (anchor @ other)
            second_view = other.kind in ("query", "document") and other.index == anchor.index
            if second_view or (config.duplicates == "positive" and anchor.same_key(other)):
                positives.append((logit, 1.0))
            elif config.duplicates == "negative" or not anchor.same_key(other):
                negatives.append(logit)
        rows.append(softmax_row(positives, negatives, batch.queries))
    return rows


def supcon(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    """L_out: the mean over an anchor's positives is outside of the logarithm."""
    texts, scale = Texts(batch), scale_of(config, parameters)
    anchors, more = views(texts)
    rows = []
    for anchor in anchors:
        seen = [(other, scale * (anchor @ other)) for other in [a for a in anchors if a is not anchor] + more]
        positives = [(logit, 1.0) for other, logit in seen if anchor.same_key(other)]
        negatives = [logit for other, logit in seen if not anchor.same_key(other)]
        rows.append(softmax_row(positives, negatives, batch.queries))
    return rows


def directions(config: Any, texts: Texts) -> list[Sorted]:
    return texts.forward(config.duplicates) + (texts.backward(config.duplicates) if config.symmetric else [])


def mean_positive(found: Sorted, scale: Tensor) -> Tensor | None:
    total = sum(weight for _, weight in found.positives)
    return sum(scale * (found.anchor @ p) * w for p, w in found.positives) / total if total else None


def decoupled(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    texts, scale = Texts(batch), scale_of(config, parameters)
    rows, zero = [], batch.queries.sum() * 0
    for found in directions(config, texts):
        positive = mean_positive(found, scale)
        if positive is None or not found.negatives:
            rows.append(Row(zero, positive is not None))
        else:
            rows.append(Row(lse([scale * (found.anchor @ n) for n in found.negatives]) - positive, True))
    return rows


def debiased(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    """-log e^p / (e^p + N g), g = max((mean e^n - tau+ e^p) / (1 - tau+), e^(-1/t))."""
    texts, scale = Texts(batch), scale_of(config, parameters)
    rows, zero = [], batch.queries.sum() * 0
    for found in directions(config, texts):
        positive = mean_positive(found, scale)
        if positive is None or not found.negatives:
            rows.append(Row(zero, positive is not None))
            continue
        number = len(found.negatives)
        average = sum(torch.exp(scale * (found.anchor @ n)) for n in found.negatives) / number
        corrected = (average - config.positive_rate * positive.exp()) / (1 - config.positive_rate)
        mass = number * torch.maximum(corrected, torch.exp(-scale))
        rows.append(Row(-torch.log(positive.exp() / (positive.exp() + mass)), True))
    return rows


def gist_embed(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    texts, scale = Texts(batch), scale_of(config, parameters)
    rows = []
    for i, found in enumerate(texts.forward("ignore")):
        query, document = texts.queries[i], texts.documents[i]
        own = similarity(query, document)
        margin = config.margin * (abs(own) if config.margin_strategy == "relative" else 1.0)
        kept = [scale * (query @ c) for c in found.negatives if not similarity(query, c) > own - margin]
        if config.contrast_queries:
            kept += [
                scale * (query @ q) for q in others(query, texts.queries) if not similarity(query, q) > own - margin
            ]
        if config.contrast_documents:
            kept += [
                scale * (document @ d)
                for d in others(document, texts.documents)
                if not similarity(document, d) > own - margin
            ]
        rows.append(softmax_row([(scale * (query @ p), w) for p, w in found.positives], kept, batch.queries))
    return rows


def similarity(a: Item, b: Item) -> float:
    assert a.guide is not None
    assert b.guide is not None
    return float((a.guide @ b.guide).detach())


def rzenembed(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    texts, rows = Texts(batch), []
    for i, found in enumerate(texts.forward("ignore")):
        scale = scale_of(config, parameters, 0 if batch.tasks is None else int(batch.tasks[i]))
        positive = texts.documents[i]
        negatives = []
        for n in found.negatives:
            if float((positive @ n).detach()) > config.false_negative_above and config.false_negative_above < 1:
                continue
            cosine = found.anchor @ n
            weight = torch.exp(config.hardness * (cosine.detach() if config.detach_hardness else cosine))
            negatives.append(torch.log(weight * torch.exp(scale * cosine)))
        rows.append(softmax_row([(scale * (found.anchor @ positive), 1.0)], negatives, batch.queries))
    return rows


def class_proxies(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    scale, proxies = scale_of(config, parameters), [unit(proxy) for proxy in parameters["proxies"]]
    labels, rows = batch.labels, []
    assert labels is not None
    for query, label in zip(batch.queries, labels.tolist(), strict=True):
        cosines = [unit(query) @ proxy for proxy in proxies]
        own = cosines[label]
        if config.angular_margin:
            angle = torch.acos(own)
            beyond = float(angle.detach()) >= math.pi - config.angular_margin
            own = (
                own - config.angular_margin * math.sin(config.angular_margin)
                if beyond
                else torch.cos(angle + config.angular_margin)
            )
        negatives = [scale * cosine for c, cosine in enumerate(cosines) if c != label]
        rows.append(softmax_row([(scale * (own - config.margin), 1.0)], negatives, batch.queries))
    return rows


def focal(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    rows = []
    for loss, counted in reference_rows(config.loss, batch, inside("loss.", parameters)):
        miss = 1 - torch.exp(-loss)
        # x ** gamma has no derivative at 0, where p = 1: nothing is left to weigh.
        weight = miss**config.gamma if config.gamma and float(miss.detach()) > 0 else 1.0 if not config.gamma else 0.0
        detach = config.detach and isinstance(weight, Tensor)
        rows.append(Row(loss * (weight.detach() if detach else weight), counted))
    return rows


def progressive(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    rows = reference_rows(config.loss, batch, inside("loss.", parameters))
    known = [1 - math.exp(-float(row.loss.detach())) for row in rows if row.counted]
    centre = config.start + batch.progress * (config.end - config.start)
    weights = []
    for loss, counted in rows:
        difficulty = 1 - math.exp(-float(loss.detach()))
        below, equal = sum(d < difficulty for d in known), sum(d == difficulty for d in known)
        # The mean rank of those that are as difficult, from 0 to n - 1, as a share of n - 1.
        rank = below + (equal - 1) / 2
        percentile = rank / (len(known) - 1) if len(known) > 1 else 0.5
        weight = math.exp(-((percentile - centre) ** 2) / (2 * config.width**2))
        noise = batch.progress < config.noise_until and percentile > config.noise_above
        weights.append(weight if counted and not noise else 0.0)
    total = sum(weights)
    return [
        Row(row.loss * (weight * len(known) / total if total else 0.0), row.counted)
        for row, weight in zip(rows, weights, strict=True)
    ]


def matryoshka(config: Any, batch: Batch, parameters: Parameters) -> list[Row]:
    weights = config.weights or [1.0] * len(config.dims)
    inner = inside("loss.", parameters)
    parts = [reference_rows(config.loss, cut(batch, dim), inner) for dim in config.dims]
    return [
        Row(sum(weight * row.loss for weight, row in zip(weights, rows, strict=True)), rows[0].counted)
        for rows in zip(*parts, strict=True)
    ]


def cut(batch: Batch, dim: int) -> Batch:
    """The first coordinates of everything but the guide's vectors."""
    named = ("queries", "documents", "negatives", "memory")
    rows = {name: getattr(batch, name) for name in named}
    return replace(batch, **{name: None if part is None else part[:, :dim] for name, part in rows.items()})


ROWS: dict[str, Callable[[Any, Batch, Parameters], list[Row]]] = {
    "infonce": infonce,
    "siglip": siglip,
    "nt_xent": nt_xent,
    "supcon": supcon,
    "decoupled": decoupled,
    "debiased": debiased,
    "gist_embed": gist_embed,
    "rzenembed": rzenembed,
    "class_proxies": class_proxies,
    "focal": focal,
    "progressive": progressive,
    "matryoshka": matryoshka,
}
