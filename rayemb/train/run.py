"""Runs a training from the driver: plans the data, starts the workers, starts them again after a failure."""

import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import ray.train
from numpy.typing import NDArray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayemb import storage
from rayemb.cluster import ENVIRONMENT, require_cpus
from rayemb.data.corpus import Corpus, read_row_group
from rayemb.data.decode import ColumnReader, DecodeSettings, Member
from rayemb.data.mix import CorpusEntry
from rayemb.data.samplers import ShuffledConfig
from rayemb.data.stream import StreamSettings, open_members, open_stream
from rayemb.errors import RayembError
from rayemb.models import Model, ModelError, TextTokenizer
from rayemb.progress import Progress
from rayemb.train.checkpoints import POSITION
from rayemb.train.config import TrainConfig
from rayemb.train.worker import Job, run_worker

logger = logging.getLogger(__name__)

TOKENIZER_ROWS = 500_000


class TrainError(RayembError):
    """A training run that cannot start or did not finish."""


@ray.remote(num_cpus=0)
class TrainingLog:
    """What the workers of one run have reported so far; lives with the driver, for its progress bar."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.message = "waiting for workers"

    def add(self, metrics: dict[str, Any]) -> None:
        """Takes one report."""
        self.rows.append(metrics)

    def say(self, message: str) -> None:
        """Takes a line about what is going on."""
        self.message = message

    def last(self) -> tuple[str, dict[str, Any] | None]:
        """The last message and the last report."""
        return self.message, self.rows[-1] if self.rows else None


def train(
    config: TrainConfig,
    corpus_uri: str,
    model_uri: str,
    runs_uri: str,
    *,
    progress: Progress | None = None,
    callbacks: list[Any] | None = None,
) -> Model:
    """The trained model, saved at `model_uri`; checkpoints lie below `runs_uri`.

    Running it again with the same config and corpus goes on from the last checkpoint, or gives the finished model.
    Raises TrainError or CorpusError before workers start if the cluster is too small or the data do not suffice.
    Needs a connected Ray.
    """
    entries = {
        name: entry.model_copy(update={"uri": entry.uri or storage.normalise(corpus_uri)})
        for name, entry in config.corpora.items()
    }
    corpora = {name: Corpus.open(str(entry.uri)) for name, entry in entries.items()}
    digests = [corpus.digest for corpus in corpora.values()]
    fingerprint = storage.sha256_bytes("|".join([json.dumps(config.outcome), *digests]).encode())
    finished = _finished(model_uri, fingerprint)
    if finished:
        return finished
    _check(config, corpora)
    require_cpus(config.cpus, "training (workers and their decoders)")
    members = open_members(entries)
    decode = DecodeSettings(
        tokenizer=_tokenizer(members, config),
        image_size=config.model.image.image_size,
        seed=config.seed,
        augment=config.augment,
        cache_bytes=config.loader.cache_mb << 20,
        classes=_classes(members, config),
    )
    about = [
        {"name": name, "uri": corpus.uri, "digest": corpus.digest, "split": entries[name].split}
        for name, corpus in corpora.items()
    ]
    run_uri = storage.join(runs_uri, f"train-{fingerprint[:12]}")
    log = TrainingLog.remote()  # type: ignore[attr-defined]
    info = {
        "fingerprint": fingerprint,
        "seed": config.seed,
        "loss": {key: loss.model_dump(mode="json") for key, loss in config.losses.items()},
        "corpora": about,
    }
    try:
        for attempt in range(config.max_failures + 1):
            state = _last_state(run_uri)
            settings = StreamSettings(entries, config.mix, config.batch_size, config.seed, state)
            stream = open_stream(settings, members, decode, config.loader, world=config.workers)
            validation = _validation(config, entries, corpora)
            job = Job(config, decode.tokenizer, stream, validation, storage.normalise(model_uri), run_uri, info, log)
            try:
                with _watch(log, config.steps, progress):
                    _fit(job, callbacks)
                return Model.load(model_uri)
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                if attempt == config.max_failures:
                    raise TrainError(
                        f"training failed {attempt + 1} times, the last time with: {_root(error)}",
                        where=run_uri,
                        fix="mend the cause and run the same command: it goes on from the last checkpoint",
                    ) from error
                logger.warning("training failed (%s); going on from the last checkpoint", _root(error))
            finally:
                ray.kill(stream.planner)
    finally:
        ray.kill(log)
    raise AssertionError("unreachable")


def _check(config: TrainConfig, corpora: dict[str, Corpus]) -> None:
    """Raises TrainError or CorpusError for corpora that cannot be trained on together."""
    for name, corpus in corpora.items():
        where = f"train.corpora.{name}"
        rows = corpus.rows(config.corpora[name].split)
        if config.mix.batches == "one_corpus" and rows < config.batch_size:
            raise TrainError(
                f"split {config.corpora[name].split!r} of {where} has {rows} rows, fewer than one batch",
                where="train.batch_size",
                fix="lower it or give more data",
            )
    kinds = {corpus.kind for corpus in corpora.values()}
    if config.mix.batches == "mixed" and len(kinds) > 1:
        raise TrainError(
            f"corpora of {' and '.join(sorted(kinds))} cannot share a batch",
            where="train.mix.batches",
            fix="use one_corpus",
        )
    first = next(iter(corpora.values()))
    if config.val_split and config.val_split not in first.splits:
        logger.warning("the corpus has no split %r: no recall during training", config.val_split)


def _validation(config: TrainConfig, entries: Mapping[str, CorpusEntry], corpora: dict[str, Corpus]) -> Member | None:
    name, corpus = next(iter(corpora.items()))
    if config.val_split is None or config.val_split not in corpus.splits:
        return None
    # As it is: the main caption, nothing varied, no hard negatives.
    changes = {"split": config.val_split, "main_caption": 1.0, "hard_negatives": 0, "sampler": ShuffledConfig()}
    (member,) = open_members({name: entries[name].model_copy(update=changes)})
    return member


def _classes(members: Sequence[Member], config: TrainConfig) -> NDArray[np.int64] | None:
    """The sorted concept keys of all corpora, where a loss has a proxy of each; 8 bytes a concept."""
    wanted = [(key, most) for key, loss in config.losses.items() if (most := _proxies(loss)) is not None]
    if not wanted:
        return None
    parts = ray.get([_concepts.remote(member) for member in members])
    classes: NDArray[np.int64] = np.unique(np.concatenate(parts))
    for key, most in wanted:
        if most < len(classes):
            raise TrainError(
                f"there are {len(classes)} concepts and {most} classes",
                where=f"train.{key}.classes",
                fix=f"give {len(classes)}",
            )
    return classes


def _proxies(loss: Any) -> int | None:
    while loss is not None:
        if "labels" in loss.needs and hasattr(loss, "classes"):
            return int(loss.classes)
        loss = getattr(loss, "loss", None)
    return None


# SPREAD: inside a Tune trial the default would put the task into the trial's placement group, which has no CPU.
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")  # type: ignore[untyped-decorator]
def _concepts(member: Member) -> NDArray[np.int64]:
    reader = ColumnReader(member, most=1)
    return np.unique(np.concatenate([np.unique(reader([group], "concept")) for group in member.groups]))


def _fit(job: Job, callbacks: list[Any] | None) -> None:
    config = job.config
    runs_uri, name = job.run_uri.rsplit("/", 1)
    # The filesystem is ours rather than the one Ray makes of a URI: pyarrow ignores AWS_ENDPOINT_URL there.
    fs, storage_path = storage.filesystem(runs_uri)
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(config.threads_per_worker)}
    if not config.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=bool(config.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=fs,
            # Restarts are ours (see `train`): the stream must start where the checkpoint stands.
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
            callbacks=callbacks,
        ),
    ).fit()


def _finished(model_uri: str, fingerprint: str) -> Model | None:
    try:
        model = Model.load(model_uri)
    except ModelError:
        return None
    return model if model.info.get("fingerprint") == fingerprint else None


def _tokenizer(members: Sequence[Member], config: TrainConfig) -> TextTokenizer:
    """A tokenizer learned from the texts of the training splits alone, from a sample of large ones."""
    texts = [text for part in ray.get([_texts.remote(member) for member in members]) for text in part]
    return TextTokenizer.train(texts, config.model.tokenizer)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")  # type: ignore[untyped-decorator]
def _texts(member: Member) -> list[str]:
    """The texts of at most `TOKENIZER_ROWS` rows: of all row groups, or of every n-th."""
    stride = -(-sum(group.rows for group in member.groups) // TOKENIZER_ROWS)
    texts: list[str] = []
    for group in member.groups[:: max(1, stride)]:
        table = read_row_group(group, ["query", "texts"])
        texts += [text for row in table.column("texts").to_pylist() for text in row or []]
        texts += [query for query in table.column("query").to_pylist() if query]
    return texts


def _last_state(run_uri: str) -> dict[str, Any] | None:
    """The data's state in the last checkpoint below `run_uri`; None without one."""
    if not storage.exists(run_uri):
        return None
    fs, path = storage.filesystem(run_uri)
    try:
        checkpoint = ray.train.Result.from_path(path, storage_filesystem=fs).checkpoint
    except (RuntimeError, ValueError, FileNotFoundError):
        return None
    if checkpoint is None:
        return None
    prefix = "s3://" if run_uri.startswith("s3://") else ""
    state: dict[str, Any] = storage.read_json(storage.join(prefix + checkpoint.path, POSITION))["data"]
    return state


@contextmanager
def _watch(log: Any, steps: int, progress: Progress | None) -> Iterator[None]:
    """Passes the workers' reports on to `progress` while the block runs."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        while not done.wait(0.5):
            try:
                message, metrics = ray.get(log.last.remote(), timeout=5)
            except (ray.exceptions.RayError, TimeoutError):
                continue
            if metrics is None:
                progress(0, steps, message)
            else:
                text = f"loss {metrics['loss']:.3f}, temperature {metrics['temperature']:.3f}"
                progress(metrics["step"], steps, f"{text}, {metrics['pairs_per_second']:.0f} pairs/s")

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _root(error: BaseException) -> str:
    """What went wrong first, from the error's name on: a worker's comes with its whole traceback before it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    names = list(re.finditer(r"^[\w.]+(?:Error|Exception|Exit)\b", text, re.MULTILINE))
    return " ".join(text[names[-1].start() if names else 0 :].split())[-1000:]
