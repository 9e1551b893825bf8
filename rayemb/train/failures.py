"""What ended an attempt, in the words of the worker that failed first, and whether another attempt can help."""

import re
from dataclasses import dataclass

from ray.train import TrainingFailedError

from rayemb.train.checkpoints import CheckpointError
from rayemb.train.not_finite import NotFiniteError
from rayemb.train.quarantine import BadRowsError

# The same data and weights would end the next attempt at the same step.
LASTING = (NotFiniteError, BadRowsError, CheckpointError)
GO_ON = "mend the cause and run the same command: it goes on from the last checkpoint"
# What the other ranks say when one is gone.
_ECHO = re.compile(r"Connection (closed|reset) by peer|gloo/transport|Broken pipe|NCCL.*remote process exited", re.I)
_MEMORY = re.compile(
    r"\bMemoryError\b|can't allocate memory|out of memory|OutOfMemory|std::bad_alloc|Cannot allocate memory", re.I
)


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended: `what` in one line, what to do about it, and whether it would come again."""

    what: str
    fix: str
    lasting: bool


def explain(error: BaseException, stalled: str | None) -> Failure:
    """The failure behind what Ray Train raised; `stalled` is what the watch found, if it ended the attempt."""
    if stalled is not None:
        return Failure(stalled, GO_ON, lasting=False)
    failures = dict(getattr(error, "worker_failures", {})) if isinstance(error, TrainingFailedError) else {}
    for failure in failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, LASTING):
            return Failure(f"{type(cause).__name__}: {cause}", cause.fix or GO_ON, lasting=True)
    first = sorted(failures.items(), key=lambda item: (bool(_ECHO.search(str(item[1]))), item[0]))
    rank, cause = first[0] if first else (None, error)
    what = root(cause)
    if rank is not None:
        what = f"rank {rank} of the workers: {what}"
    if _MEMORY.search(str(cause)):
        fix = (
            "lower train.micro_batch_size (the result stays the same), use a higher train.zero_stage or fewer "
            "workers on a machine, and run the same command: it goes on from the last checkpoint"
        )
        return Failure(f"out of memory: {what}", fix, lasting=False)
    return Failure(what, GO_ON, lasting=False)


def root(error: BaseException) -> str:
    """What went wrong first, from the error's name on: a worker's comes with its whole traceback before it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    names = list(re.finditer(r"^[\w.]+(?:Error|Exception|Exit)\b", text, re.MULTILINE))
    return " ".join(text[names[-1].start() if names else 0 :].split())[-1000:]
