"""A curation run: steps in order over a corpus, each one's verdicts kept, the curated corpus published at the end."""

import json
import re
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb import storage
from rayemb.curate.base import CurationError, Step
from rayemb.curate.config import CurateConfig
from rayemb.curate.publish import DROPPED, manifest_of, publish_shards
from rayemb.curate.report import REPORT, write_report
from rayemb.curate.state import ALIVE, RECORD, State, write_verdicts
from rayemb.data import Corpus
from rayemb.data.corpus import MANIFEST
from rayemb.progress import Progress

STEPS = "_curation"
FORMAT = 1  # of the steps' records; a change makes old ones unusable

# What a curation writes before its manifest; `.tmp` is a write that was killed.
_OURS = re.compile(rf"(split=[^/]+/[^/]+\.parquet(\.\w+\.tmp)?|({STEPS}|{DROPPED}|{REPORT})/.*)")


def curate(config: CurateConfig, corpus_uri: str, uri: str, *, progress: Progress | None = None) -> Corpus:
    """The corpus at `corpus_uri`, curated, at `uri`; one that is already there and complete is used as it is.

    Every step's verdicts are kept in `_curation/`; a run that was killed goes on after the last complete one. The
    driver holds one bit a row. Needs a connected Ray. Raises CurationError (no steps, a step that drops everything,
    another corpus in the place) or what a step raises.
    """
    corpus, uri = Corpus.open(corpus_uri), storage.normalise(uri)
    fingerprints = _check(config, corpus, uri)
    manifest_uri = storage.join(uri, MANIFEST)
    if storage.exists(manifest_uri):
        existing = Corpus.open(uri)
        if existing.manifest["fingerprint"] == fingerprints[-1]:
            return existing
        raise CurationError(
            "another corpus is already here",
            where=uri,
            fix="delete it, or curate to another place (artefacts.curated=...)",
        )
    labels = [f"{number:02d}-{step.name}" for number, step in enumerate(config.steps)]
    folders = [
        storage.join(uri, STEPS, f"{label}-{fingerprint[:12]}")
        for label, fingerprint in zip(labels, fingerprints, strict=True)
    ]
    _clear(uri, folders)
    state, done = State.of(corpus), []
    for number, (step, folder) in enumerate(zip(config.steps, folders, strict=True)):
        place = (number, len(config.steps) + 1)
        record, alive = _judge(step, state, folder, config, place, progress)
        state = state.after(folder, record, alive)
        done.append((labels[number], folder, record))
    entries = []
    for entry in publish_shards(state, done, uri):
        entries.append(entry)
        if progress:
            progress(
                len(config.steps), len(config.steps) + 1, f"publishing: {len(entries)} of {len(state.shards)} files"
            )
    curation = _summary(config, state, done)
    write_report(storage.join(uri, REPORT), curation, state, done)
    storage.write_json(manifest_uri, manifest_of(state, entries, fingerprints[-1], curation))
    if progress:
        progress(len(config.steps) + 1, len(config.steps) + 1, f"{sum(state.counts.values()):,} rows left")
    return Corpus.open(uri)


def _check(config: CurateConfig, corpus: Corpus, uri: str) -> list[str]:
    """The fingerprint of the corpus after each step. Raises CurationError for what can be known before work starts."""
    if not config.steps:
        raise CurationError(
            "there are no steps", where="curate.steps", fix="see `rayemb curate --help` for their names"
        )
    if uri == corpus.uri:
        raise CurationError("a corpus is not curated in place", where=uri, fix="set artefacts.curated to another place")
    fingerprints, settings = [], [FORMAT, corpus.digest, config.seed, config.examples]
    for number, step in enumerate(config.steps):
        unknown = [split for split in step.splits if split not in corpus.splits]
        if unknown:
            raise CurationError(
                f"there is no split {unknown[0]!r}",
                where=f"curate.steps.{number}.splits",
                fix=f"splits of {corpus.uri}: {', '.join(corpus.splits) or 'none'}",
            )
        settings.append([step.model_dump(mode="json"), step.inputs()])
        fingerprints.append(storage.sha256_bytes(json.dumps(settings, sort_keys=True).encode()))
    return fingerprints


def _clear(uri: str, folders: list[str]) -> None:
    """Removes what other settings or a run that did not finish left, but for the steps' verdicts of this one."""
    files = [file.removeprefix(f"{uri}/") for file in storage.list_files(uri)]
    foreign = [file for file in files if not _OURS.fullmatch(file)]
    if foreign:
        raise CurationError(
            f"the folder holds other files ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''})",
            where=uri,
            fix="curate to a new place",
        )
    kept = {folder.removeprefix(f"{uri}/") for folder in folders}
    tops = {"/".join(file.split("/")[: 2 if file.startswith(f"{STEPS}/") else 1]) for file in files}
    for top in tops - kept:
        storage.delete(storage.join(uri, top))


def _judge(
    step: Step, state: State, folder: str, config: CurateConfig, place: tuple[int, int], progress: Progress | None
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """The record of a step, from its folder if it is complete there; else the step is run."""
    number, total = place
    record_uri, alive_uri = storage.join(folder, RECORD), storage.join(folder, ALIVE)
    if storage.exists(record_uri):
        record = storage.read_json(record_uri)
        data = storage.read_bytes(alive_uri)
        if storage.sha256_bytes(data) == record["alive"]:
            return record, np.frombuffer(data, np.uint8).copy()
    started = time.monotonic()

    def tell(done: int, of: int, text: str) -> None:
        if progress:
            progress(number, total, f"{step.name}: {text}")

    rows = state.rows(splits=tuple(step.splits), seed=config.seed, folder=storage.join(folder, "work"), progress=tell)
    tell(0, 0, f"{rows.count:,} rows to judge")
    found, alive = write_verdicts(
        step.judge(rows),
        rows,
        state,
        folder,
        config.examples,
        lambda files: tell(files, 0, f"verdicts on {files} files"),
    )
    for split in step.splits:
        if state.counts[split] and state.counts[split] == found["dropped"].get(split, 0):
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in found["reasons"].items())
            raise CurationError(
                f"the step {step.name} drops every row of {split} ({reasons})",
                where=f"curate.steps.{number}",
                fix="loosen its settings, or take it out",
            )
    data = alive.tobytes()
    storage.write_bytes(alive_uri, data)
    record = {
        "name": step.name,
        "judged": {split: state.counts[split] for split in step.splits},
        **found,
        "facts": rows.facts,
        "alive": storage.sha256_bytes(data),
        "seconds": round(time.monotonic() - started, 2),
    }
    storage.write_json(record_uri, record)
    return record, alive


def _summary(config: CurateConfig, state: State, done: list[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    """What the manifest says of the curation."""
    said = ("judged", "dropped", "reasons", "edits", "facts")
    return {
        "input": {"uri": state.corpus.uri, "digest": state.corpus.digest, "rows": state.corpus.splits},
        "seed": config.seed,
        "rows": state.counts,
        "steps": [
            {"step": label, "config": step.model_dump(mode="json"), **{key: record[key] for key in said}}
            for step, (label, _, record) in zip(config.steps, done, strict=True)
        ],
    }
