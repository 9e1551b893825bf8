"""Leakage check: training rows that repeat evaluation rows (ALIGN, Jia et al., 2021; card S101)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.data
from pydantic import Field

from rayemb.config import Config
from rayemb.curate.base import CurationError, Rows, Step, Verdicts, joined, runs, together, verdicts
from rayemb.curate.exact_duplicates import What, check_content, content_keys
from rayemb.curate.near_duplicate_images import ImageLikeness
from rayemb.curate.near_duplicate_texts import Shingles, TextLikeness
from rayemb.curate.neighbours import Compare, candidates, distinct
from rayemb.data import Corpus


class EvaluationSet(Config):
    """Rows that training must not have seen."""

    corpus: str | None = Field(None, description="URI of another corpus; default: the one that is curated")
    split: str = Field(description="the split of it")


class Leakage(Step):
    """Drops rows that equal, or are near to, a row of an evaluation split; the evaluation rows stay as they are.

    Exact: by stored keys, a shuffle of 16 bytes a row. Near: as `near_duplicate_texts` and `near_duplicate_images`,
    but rows are compared with evaluation rows alone.
    """

    name: Literal["leakage"] = "leakage"
    against: list[EvaluationSet] = Field(min_length=1, description="evaluation sets, `{split: ..., corpus: ...}` each")
    equal: list[What] = Field(["pair"], description="what must not be equal: text, image, query, pair; may be empty")
    near_texts: TextLikeness | None = Field(None, description="when texts are too near; null: not compared")
    near_images: ImageLikeness | None = Field(
        ImageLikeness(), description="when images are too near; null: not compared"
    )

    def inputs(self) -> dict[str, str]:
        """The digests of other corpora."""
        return {kept.corpus: Corpus.open(kept.corpus).digest for kept in self.against if kept.corpus}

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every leaking row; its partner is the nearest evaluation row."""
        sets = self._sets(rows)
        found = []
        for of in self.equal:
            for number, other in enumerate([rows, *sets]):
                check_content(of, other, f"curate.leakage.{'equal' if not number else f'against.{number - 1}'}")
            both = _both(*(content_keys(part, of) for part in (rows, *sets)))
            found.append(together(both, "key", self._equal(of), rows=_total(rows, sets)))
        if self.near_texts:
            likeness = self.near_texts
            both = _both(*(likeness.records(part, "text") for part in (rows, *sets)))
            judge = self._near("near_text", likeness.threshold, lambda table: Shingles(table["shingles"]).jaccard)
            found.append(together(both, "key", judge, rows=_total(rows, sets) * likeness.bands))
        if self.near_images and rows.corpus.kind == "image_text":
            alike = self.near_images
            both = _both(*(alike.records(part) for part in (rows, *sets)))
            judge = self._near("near_image", alike.threshold, alike.comparing)
            found.append(together(both, "key", judge, rows=_total(rows, sets) * alike.bands))
        if not found:
            raise CurationError(
                "nothing is compared", where="curate.leakage", fix="set equal, near_texts or near_images"
            )
        return joined(found)

    def _sets(self, rows: Rows) -> list[Rows]:
        sets = []
        for number, other in enumerate(self.against):
            where = f"curate.leakage.against.{number}"
            if other.corpus is None:
                if other.split in rows.splits:
                    raise CurationError(f"{other.split!r} is among the splits to judge", where=f"{where}.split")
                sets.append(rows.only(other.split))
            else:
                sets.append(Rows.of(Corpus.open(other.corpus), [other.split], seed=rows.seed))
        return sets

    def _equal(self, of: What) -> Any:
        def judge(table: pa.Table) -> pa.Table:
            keys, sides, rows = (np.asarray(table[name]) for name in ("key", "side", "row"))
            order = np.lexsort((rows, sides, keys))
            table, sides = table.take(pa.array(order)), sides[order]
            starts = runs(keys[order])
            # The first evaluation row of each key, if there is one: sides above 0 come last.
            ours = np.add.reduceat(sides == 0, starts[:-1]) if len(sides) else np.zeros(0, np.int64)
            lengths = np.diff(starts)
            theirs = np.repeat(np.where(ours < lengths, starts[:-1] + ours, -1), lengths)
            leaks = (sides == 0) & (theirs >= 0)
            return self._verdicts(table, np.flatnonzero(leaks), theirs[leaks], f"same_{of}", 1.0, f"the {of} is in")

        return judge

    def _near(self, reason: str, threshold: float, comparing: Any) -> Any:
        corpora = [(each.corpus is None, each.corpus or "") for each in self.against]
        ranks = np.array([sorted(set(corpora)).index(each) for each in corpora])

        def judge(table: pa.Table) -> pa.Table:
            compare: Compare = comparing(table)
            keys, contents, sides, rows = (np.asarray(table[name]) for name in ("key", "content", "side", "row"))
            # One row stands for all of its key, side and content: boiler-plate would make squares of pairs.
            order = np.lexsort((rows, contents, sides, keys))
            stands = np.ones(len(order), bool)
            for column in (keys, sides, contents):
                stands[1:] &= column[order][1:] == column[order][:-1]
            stands[1:] = ~stands[1:]
            some = order[stands]
            pairs = [np.zeros((3, 0))]
            for i, j in candidates(keys[some], sides[some] > 0):
                ours, theirs = distinct(some[i], some[j], len(keys))
                similarity = compare(ours, theirs)
                near = similarity >= threshold
                pairs.append(np.stack([ours[near], theirs[near], similarity[near]]))
            ours, theirs, similarity = np.concatenate(pairs, axis=1)
            ours, theirs = ours.astype(np.int64), theirs.astype(np.int64)
            # In the order in which the framework takes one of several verdicts.
            best = np.lexsort((rows[theirs], ranks[sides[theirs] - 1], -similarity, contents[ours]))
            found, first = np.unique(contents[ours][best], return_index=True)
            leaks = np.flatnonzero((sides == 0) & np.isin(contents, found))
            leaks = leaks[np.unique(rows[leaks], return_index=True)[1]]
            chosen = best[first][np.searchsorted(found, contents[leaks])]
            what = "similarity {:.2f} to a row of"
            return self._verdicts(table, leaks, theirs[chosen], reason, similarity[chosen], what)

        return judge

    def _verdicts(self, table: pa.Table, ours: Any, theirs: Any, reason: str, score: Any, what: str) -> pa.Table:
        similarity = np.broadcast_to(np.asarray(score, np.float32), len(ours))
        sets = [self.against[side - 1] for side in np.asarray(table["side"])[theirs].tolist()]
        names = [f"{each.split} of {each.corpus}" if each.corpus else each.split for each in sets]
        return verdicts(
            row=np.asarray(table["row"])[ours],
            reason=reason,
            what=[f"{what.format(value)} {name}" for value, name in zip(similarity.tolist(), names, strict=True)],
            score=similarity,
            partner=np.asarray(table["row"])[theirs],
            partner_corpus=pa.array([each.corpus for each in sets], pa.string()),
        )


def _both(*parts: ray.data.Dataset) -> ray.data.Dataset:
    """The rows to judge (side 0) and those of each evaluation set (1, 2, ...)."""
    sided = [part.map_batches(_side(side), batch_format="pyarrow", batch_size=None) for side, part in enumerate(parts)]
    return joined(sided)


def _total(rows: Rows, sets: list[Rows]) -> int:
    return rows.count + sum(other.count for other in sets)


def _side(side: int) -> Any:
    return lambda table: table.append_column("side", pa.array(np.full(len(table), side, np.int32)))
