"""A loss or a gradient that is not finite: which rows of the batch it comes from, written down before the run ends."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rayemb import storage
from rayemb.data.corpus import CorpusError, read_row_group
from rayemb.data.decode import Member
from rayemb.errors import RayembError

MOST_ROWS = 100  # of each rank that are looked up in the corpus


class NotFiniteError(RayembError):
    """The loss, a vector or the gradient of a step is infinite or not a number."""


def end_not_finite(
    what: str,
    step: int,
    batch: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    members: Sequence[Member],
    names: Sequence[str],
    run_uri: str,
) -> NotFiniteError:
    """The error that ends the run, after rank 0 has written what the batch was (collective).

    batch: this rank's rows, in the order of `vectors`. names: of the corpora. The file is
    `not-finite-step-N.json` below `run_uri`: the rows whose vectors are not finite, with their sources, and the
    ordinals of all rows of the batch.
    """
    tasks, rows = batch["task"].tolist(), batch["row"].tolist()
    culprits = _culprits(batch, vectors)
    found = {
        "rows": [
            {"corpus": names[tasks[n]], "row": rows[n], "vectors": kinds, **_source(members[tasks[n]], rows[n])}
            for n, kinds in sorted(culprits.items())[:MOST_ROWS]
        ],
        "not_finite": len(culprits),
        "batch": [[names[task], row] for task, row in zip(tasks, rows, strict=True)],
    }
    everyone: list[Any] = [found]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    bad = [{**row, "rank": rank} for rank, part in enumerate(everyone) for row in part["rows"]]
    total = sum(part["not_finite"] for part in everyone)
    uri = storage.join(run_uri, f"not-finite-step-{step}.json")
    if not dist.is_initialized() or dist.get_rank() == 0:
        document = {
            "step": step,
            "what": what,
            "rows_not_finite": total,
            "rows": bad,
            "batch": [row for part in everyone for row in part["batch"]],
        }
        storage.write_json(uri, document)
    shown = ", ".join(f"{row['corpus']} row {row['row']} ({row.get('id') or row.get('file', '')})" for row in bad[:3])
    which = f"{total} rows have vectors that are not finite: {shown}" if total else "all rows have finite vectors"
    return NotFiniteError(
        f"{what} at step {step}; {which}",
        where=uri,
        fix="lower the learning rate, clip gradients, or take these rows out of the corpus; the last checkpoint is "
        "from before this step",
    )


def _culprits(batch: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """The rows, by position, with the kinds of their vectors that are not finite."""
    found: dict[int, list[str]] = {}
    for kind, values in vectors.items():
        bad = (~torch.isfinite(values.float()).flatten(1).all(1)).cpu()
        at = torch.arange(len(bad))
        if kind.split("@")[0] == "negatives":
            counts = batch["negative_counts"].cpu()
            at = torch.arange(len(counts)).repeat_interleave(counts)
        for n in at[bad].tolist():
            if kind not in found.setdefault(n, []):
                found[n].append(kind)
    return found


def _source(member: Member, row: int) -> dict[str, Any]:
    starts = np.array([group.first for group in member.groups])
    group = member.groups[int(np.searchsorted(starts, row, side="right")) - 1]
    place = {"file": group.file, "row_group": group.index, "row_of_group": row - group.first}
    try:
        return {**place, "id": read_row_group(group, ["id"]).column("id")[row - group.first].as_py()}
    except (CorpusError, storage.StorageError):
        return place
