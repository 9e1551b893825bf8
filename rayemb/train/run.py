"""Runs a training from the driver: plans the data, starts the workers, starts them again after a failure."""

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from numpy.typing import NDArray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayemb import storage
from rayemb.cluster import ENVIRONMENT, require_cpus
from rayemb.config.literature import literature
from rayemb.data.corpus import Corpus, read_row_group
from rayemb.data.decode import ColumnReader, DecodeSettings, Member
from rayemb.data.stream import StreamSettings, open_members, open_stream
from rayemb.errors import RayembError
from rayemb.models import Model, ModelError, PretrainedTokenizerConfig, TextTokenizer
from rayemb.models.cutting import cut
from rayemb.progress import Progress
from rayemb.train.checkpoints import POSITION, newest, sweep
from rayemb.train.config import TrainConfig
from rayemb.train.elastic import lost_nodes, room, wait_for_room
from rayemb.train.evaluation import open_tasks
from rayemb.train.failures import explain
from rayemb.train.objective import ContrastiveConfig, Objective
from rayemb.train.parameters import check_rules
from rayemb.train.sinks import Run
from rayemb.train.watch import TrainingLog, Watch
from rayemb.train.worker import Job, create_objective, run_worker

logger = logging.getLogger(__name__)

TOKENIZER_ROWS = 500_000
GROW_S = 5.0  # between looks at the room in the cluster


class TrainError(RayembError):
    """A training run that cannot start or did not finish."""


@dataclass(frozen=True)
class Tracked:
    """What a run is called where its metrics go, and its tags there; no name: that of its folder."""

    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stretch:
    """A part of a training: from the checkpoint `begin`, of another training it may be, to step `until`."""

    until: int
    begin: str | None = None


def train(
    config: TrainConfig,
    corpus_uri: str,
    model_uri: str,
    runs_uri: str,
    *,
    progress: Progress | None = None,
    callbacks: list[Any] | None = None,
    tracked: Tracked | None = None,
) -> Model:
    """The trained model, saved at `model_uri`; checkpoints lie below `runs_uri`.

    Running it again with the same config and corpus goes on from the last checkpoint, with any number of workers, or
    gives the finished model. Raises TrainError, CorpusError or ClusterError before workers start if the data do not
    suffice or the cluster is too small. Needs a connected Ray.
    """
    model, _ = _train(config, corpus_uri, model_uri, runs_uri, None, progress, callbacks, tracked or Tracked())
    assert model is not None
    return model


def train_stretch(
    config: TrainConfig,
    corpus_uri: str,
    model_uri: str,
    runs_uri: str,
    stretch: Stretch,
    *,
    progress: Progress | None = None,
    tracked: Tracked | None = None,
) -> tuple[Model | None, str, dict[str, Any]]:
    """A part of a training: the model, once it is through, else None; its last checkpoint, and where it stands there.

    What the checkpoint that it begins from holds goes on as it was, a learned temperature too; what the config alone
    says changes: a margin, a fixed temperature, the learning rate. Raises as `train` does.
    """
    model, run_uri = _train(config, corpus_uri, model_uri, runs_uri, stretch, progress, None, tracked or Tracked())
    there = newest(run_uri)
    if there is None:
        raise TrainError("the training has left no checkpoint to go on from", where=run_uri)
    return model, *there


def _train(
    config: TrainConfig,
    corpus_uri: str,
    model_uri: str,
    runs_uri: str,
    stretch: Stretch | None,
    progress: Progress | None,
    callbacks: list[Any] | None,
    tracked: Tracked,
) -> tuple[Model | None, str]:
    """The model, None where the stretch ends before, and the run's folder."""
    entries = {
        name: entry.model_copy(update={"uri": entry.uri or storage.normalise(corpus_uri)})
        for name, entry in config.corpora.items()
    }
    corpora = {name: Corpus.open(str(entry.uri)) for name, entry in entries.items()}
    digests = [corpus.digest for corpus in corpora.values()]
    initial = None
    if config.init is not None:
        config, initial = _begun(config)
        digests.append(str(initial.digest))
    if stretch is not None and stretch.begin is not None:
        # Weights that another training began are not those of this config alone.
        digests.append(stretch.begin)
    fingerprint = storage.sha256_bytes("|".join([json.dumps(config.outcome), *digests]).encode())
    run_uri = storage.join(runs_uri, f"train-{fingerprint[:12]}")
    finished = _finished(model_uri, fingerprint)
    if finished:
        return finished, run_uri
    model_uri = storage.normalise(model_uri)
    _check(config, corpora)
    require_cpus(config.least_workers * config.cpus_of_one, "training (workers and their decoders)")
    members = open_members(entries)
    decode = DecodeSettings(
        tokenizer=initial.tokenizer if initial else _tokenizer(members, config),
        image_size=config.model.image_size,
        seed=config.seed,
        augment=config.augment,
        cache_bytes=config.loader.cache_mb << 20,
        classes=_classes(members, config),
        prompts=config.model.prompts,
    )
    identical = [name for name, entry in entries.items() if entry.identical]
    contrastive = isinstance(config.objective, ContrastiveConfig)
    exits = any("exits" in loss.needs for loss in config.losses.values())
    if config.parameters or config.adapters or identical or exits or not contrastive:
        objective = create_objective(config, decode.tokenizer)
        check_rules(objective, config.parameters)
        if objective.exits and not config.adapters:
            # A tower that could not be cut to a size afterwards is refused before it is trained for it.
            cut(Model(objective.network, decode.tokenizer), objective.exits[0])
            objective.train()
        if identical and contrastive and not config.augment.text.mask_span:
            _check_noise(objective, decode.tokenizer, f"train.corpora.{identical[0]}.identical")
    about = [
        {"name": name, "uri": corpus.uri, "digest": corpus.digest, "split": entries[name].split}
        for name, corpus in corpora.items()
    ]
    info: dict[str, Any] = {
        "fingerprint": fingerprint,
        "seed": config.seed,
        "loss": {key: loss.model_dump(mode="json") for key, loss in config.criteria.items()},
        "corpora": about,
        # As it may be said again: the towers are those of `init`, if there is one.
        "config": config.model_dump(mode="json", exclude={"model"} if initial else None),
        "papers": {key: literature(type(loss)).source for key, loss in config.criteria.items()},
    }
    if initial:
        info["init"] = {"uri": config.init, "digest": initial.digest}
    if config.adapters:
        info["adapters"] = config.adapters.model_dump(mode="json")
    tasks = open_tasks(config.evaluation, entries)
    info["evaluated"] = {name: config.evaluation.chosen[name].split for name in tasks}
    if (stopping := config.early_stopping) and stopping.metric.rsplit("/", 1)[0] not in tasks:
        raise TrainError(
            f"{stopping.metric} is not measured: there is no such split",
            where="train.early_stopping.metric",
            fix="give train.evaluation.tasks",
        )
    run = Run(run_uri, tracked.name or run_uri.rsplit("/", 1)[1], info["config"], tracked.tags)
    # With the driver, so that the loss of another node leaves it alone.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = TrainingLog.options(scheduling_strategy=here).remote(run, config.logging.makers())  # type: ignore[attr-defined]

    def job(world: int) -> Job:
        uri, position = newest(run_uri) or _begins(stretch)
        state = position["data"] if position else None
        until = stretch.until if stretch and stretch.until < config.steps else None
        settings = StreamSettings(entries, config.mix, config.batch_size, config.seed, state, until)
        stream = open_stream(settings, members, decode, config.loader, world=world)
        attempt = secrets.token_hex(4)
        return Job(config, decode.tokenizer, stream, tasks, model_uri, run_uri, info, log, uri, attempt)

    until = stretch.until if stretch else config.steps
    try:
        through = _attempts(config, job, run_uri, log, progress, callbacks, until)
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(log.close.remote())
        ray.kill(log)
    return Model.load(model_uri) if through else None, run_uri


def _begins(stretch: Stretch | None) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint that a stretch begins from, and where it stands."""
    if stretch is None or stretch.begin is None:
        return None, None
    return stretch.begin, storage.read_json(storage.join(stretch.begin, POSITION))


def _attempts(
    config: TrainConfig,
    job: Callable[[int], Job],
    run_uri: str,
    log: Any,
    progress: Progress | None,
    callbacks: list[Any] | None,
    until: int,
) -> bool:
    """Runs the workers up to a step: again after a failure, and with more of them when there is room.

    Gives whether the training is over.
    """
    failures, started = 0, False
    while True:
        # What is not elastic and starts for the first time waits as long as Ray does: a sweep's trials take turns.
        if until < config.steps and (there := newest(run_uri)) and there[1]["step"] >= until:
            return False
        world = wait_for_room(config) if started or config.min_workers is not None else config.workers
        started = True
        sweep(run_uri)
        ray.get(log.begin.remote())
        attempt = job(world)
        ray.get(log.resume.remote(attempt.stream.start))
        grow = _grower(config, attempt, world) if world < config.workers else None
        watch = Watch(log, config.steps, progress, config.stall_seconds, grow, every=GROW_S)
        try:
            with watch.running():
                result = _fit(attempt, world, callbacks)
            if not (result or {}).get("paused"):
                return True
            if (result or {})["step"] >= until:
                return False
            logger.info("there is room for more workers than %d: going on with them", world)
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failures += 1
            failure = explain(error, watch.stalled)
            if failure.lasting:
                raise TrainError(failure.what, where=run_uri, fix=failure.fix) from error
            if failures > config.max_failures:
                raise TrainError(
                    f"training failed {failures} times, the last time with: {failure.what}",
                    where=run_uri,
                    fix=failure.fix,
                ) from error
            logger.warning("training failed (%s); going on from the last checkpoint", failure.what)
        finally:
            ray.kill(attempt.stream.planner)


def _grower(config: TrainConfig, attempt: Job, world: int) -> Callable[[], bool]:
    """Asks the workers to save and stop once there is room for more of them; says whether it has."""

    def grow() -> bool:
        more = room(config)
        if more > 0:
            logger.info("%d workers run and there is room for %d more", world, more)
            attempt.stream.planner.pause.remote()
        return more > 0

    return grow


def _begun(config: TrainConfig) -> tuple[TrainConfig, Model]:
    """The config with the towers of the model that it starts from, and that model.

    Raises ModelError if there is none, TrainError if a loss does not fit it.
    """
    uri = storage.normalise(str(config.init))
    initial = Model.load(uri)
    # Not validated again: `init` and `model` together are what a user may not say.
    config = config.model_copy(update={"init": uri, "model": initial.network.config})
    for key, loss in config.losses.items():
        if misfit := loss.misfit(config.model.dim):
            raise TrainError(f"{misfit} (the dimension of train.init)", where=f"train.{key}")
    if misfit := config.objective.misfit(config.model):
        raise TrainError(f"{misfit} (it is that of train.init)", where="train.objective")
    return config, initial


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
    kinds = {"text" if config.corpora[name].identical else corpus.kind for name, corpus in corpora.items()}
    if config.mix.batches == "mixed" and len(kinds) > 1:
        raise TrainError(
            f"corpora of {' and '.join(sorted(kinds))} cannot share a batch",
            where="train.mix.batches",
            fix="use one_corpus",
        )


@torch.no_grad()
def _check_noise(objective: Objective, tokenizer: TextTokenizer, where: str) -> None:
    """Raises TrainError if a text has the same vector each time: then nothing is learned from its pair with itself."""
    ids = torch.from_numpy(tokenizer(["a text that is read twice"]))
    if torch.equal(objective.network.encode_text(ids), objective.network.encode_text(ids)):
        raise TrainError(
            "each text is paired with itself, and the text tower has no dropout to tell the two apart",
            where=where,
            fix="give train.model.text.dropout=0.1 (what transformers trained has its own), or "
            "train.augment.text.mask_span=5",
        )


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


def _fit(job: Job, world: int, callbacks: list[Any] | None) -> dict[str, Any] | None:
    """What rank 0 returned."""
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
    lost = lost_nodes()
    result = TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=world,
            use_gpu=bool(config.gpus_per_worker),
            resources_per_worker=resources,
            # Until Ray has given a lost node up, it would go on placing workers there.
            label_selector={"ray.io/node-id": f"!in({','.join(lost)})"} if lost else None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=fs,
            # Restarts are ours (see `train`): the stream must start where the checkpoint stands.
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": environment},
            callbacks=callbacks,
        ),
    ).fit()
    returned: dict[str, Any] | None = result.return_value
    return returned


def _finished(model_uri: str, fingerprint: str) -> Model | None:
    try:
        model = Model.load(model_uri)
    except ModelError:
        return None
    return model if model.info.get("fingerprint") == fingerprint else None


def _tokenizer(members: Sequence[Member], config: TrainConfig) -> TextTokenizer:
    """A tokenizer learned from the texts of the training splits alone, from a sample of large ones; or a given one."""
    if isinstance(config.model.tokenizer, PretrainedTokenizerConfig):
        return TextTokenizer.from_source(str(config.model.tokenizer_source), config.model.tokenizer.max_length)
    texts = [text for part in ray.get([_texts.remote(member) for member in members]) for text in part]
    return TextTokenizer.train(texts, config.model.tokenizer)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")  # type: ignore[untyped-decorator]
def _texts(member: Member) -> list[str]:
    """The texts of at most `TOKENIZER_ROWS` rows: of all row groups, or of every n-th."""
    stride = -(-member.rows // TOKENIZER_ROWS)
    texts: list[str] = []
    for group in member.groups[:: max(1, stride)]:
        table = read_row_group(group, ["query", "texts"])
        texts += [text for row in table.column("texts").to_pylist() for text in row or []]
        texts += [query for query in table.column("query").to_pylist() if query]
    return texts
