"""Runs a training from the driver: plans the data, starts the workers, starts them again after a failure."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayemb import storage
from rayemb.cluster import ENVIRONMENT, require_cpus
from rayemb.data.corpus import Corpus
from rayemb.data.stream import train_stream
from rayemb.errors import RayembError
from rayemb.models import Model, ModelError, TextTokenizer
from rayemb.progress import Progress
from rayemb.train.config import TrainConfig
from rayemb.train.worker import POSITION, Job, run_worker

logger = logging.getLogger(__name__)


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
    corpus = Corpus.open(corpus_uri)
    fingerprint = storage.sha256_bytes(f"{json.dumps(config.outcome)}|{corpus.digest}".encode())
    finished = _finished(model_uri, fingerprint)
    if finished:
        return finished
    if corpus.rows(config.split) < config.batch_size:
        raise TrainError(
            f"split {config.split!r} has {corpus.rows(config.split)} rows, fewer than one batch",
            where="train.batch_size",
            fix="lower it or give more data",
        )
    if config.val_split and config.val_split not in corpus.splits:
        logger.warning("the corpus has no split %r: no recall during training", config.val_split)
    # One CPU more than the workers: a dataset that finds none free waits for ever.
    require_cpus(config.workers * config.cpus_per_worker + 1, "training (workers and their data)")
    tokenizer = _tokenizer(corpus, config)
    name = f"train-{fingerprint[:12]}"
    job = Job(
        config=config,
        tokenizer=tokenizer,
        corpus_uri=corpus.uri,
        model_uri=storage.normalise(model_uri),
        info={
            "fingerprint": fingerprint,
            "seed": config.seed,
            "loss": config.loss.model_dump(mode="json"),
            "corpus": {"uri": corpus.uri, "digest": corpus.digest, "split": config.split},
        },
        log=TrainingLog.remote(),  # type: ignore[attr-defined]
    )
    try:
        for attempt in range(config.max_failures + 1):
            try:
                with _watch(job.log, config.steps, progress):
                    _fit(job, corpus, name, runs_uri, callbacks)
                return Model.load(model_uri)
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                if attempt == config.max_failures:
                    raise TrainError(
                        f"training failed {attempt + 1} times, the last time with: {_root(error)}",
                        where=f"{runs_uri}/{name}",
                        fix="mend the cause and run the same command: it goes on from the last checkpoint",
                    ) from error
                logger.warning("training failed (%s); going on from the last checkpoint", _root(error))
    finally:
        ray.kill(job.log)
    raise AssertionError("unreachable")


def _fit(job: Job, corpus: Corpus, name: str, runs_uri: str, callbacks: list[Any] | None) -> None:
    config = job.config
    start_row = _last_row(storage.join(runs_uri, name))
    # The filesystem is ours rather than the one Ray makes of a URI: pyarrow ignores AWS_ENDPOINT_URL there.
    fs, storage_path = storage.filesystem(runs_uri)
    dataset = train_stream(
        corpus,
        config.split,
        tokenizer=job.tokenizer,
        image_size=config.model.image.image_size,
        seed=config.seed,
        start=start_row,
        stop=config.steps * config.batch_size,
        block_rows=config.batch_size // config.workers,
        fraction=config.fraction,
        main_caption=config.main_caption,
    )
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(config.threads_per_worker)}
    if not config.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    TorchTrainer(
        run_worker,
        train_loop_config={"job": job, "start_row": start_row},
        datasets={"train": dataset},
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=bool(config.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=fs,
            # Restarts are ours (see `train`): the dataset must start where the checkpoint stands.
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


def _tokenizer(corpus: Corpus, config: TrainConfig) -> TextTokenizer:
    """A tokenizer learned from the captions of the training split alone."""
    texts = ray.get(_captions.remote(corpus.uri, config.split))
    return TextTokenizer.train(texts, config.model.tokenizer)


# SPREAD: inside a Tune trial the default would put the task into the trial's placement group, which has no CPU.
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")  # type: ignore[untyped-decorator]
def _captions(corpus_uri: str, split: str) -> list[str]:
    return [text for texts in Corpus.open(corpus_uri).column(split, "texts") for text in texts]


def _last_row(run_uri: str) -> int:
    """The stream position of the last checkpoint below `run_uri`, 0 without one."""
    if not storage.exists(run_uri):
        return 0
    fs, path = storage.filesystem(run_uri)
    try:
        checkpoint = ray.train.Result.from_path(path, storage_filesystem=fs).checkpoint
    except (RuntimeError, ValueError, FileNotFoundError):
        return 0
    if checkpoint is None:
        return 0
    prefix = "s3://" if run_uri.startswith("s3://") else ""
    return int(storage.read_json(storage.join(prefix + checkpoint.path, POSITION))["row"])


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
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[-400:]
