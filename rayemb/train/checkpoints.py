"""Checkpoints of a run: every rank uploads its part in the background, rank 0 says when all of it is there.

Not Ray Train's own: there a checkpoint that arrived counts only when the controller has polled, a failed upload ends
the run, and what is kept is the newest or the best, not both. A folder without `position.json`, which is written last,
is no checkpoint; whoever reads never sees a part of one.
"""

import logging
import math
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
import ray
import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from rayemb import storage
from rayemb.config import Config
from rayemb.errors import RayembError
from rayemb.train.reshard import load_resharded

logger = logging.getLogger(__name__)

FOLDER, POSITION = "checkpoints", "position.json"
MOST_FAILURES = 3  # in a row, before the run ends
POLL_S = 0.2


class CheckpointError(RayembError):
    """A checkpoint that cannot be loaded, or several in a row that could not be written."""


class CheckpointsConfig(Config):
    """When the state of a run is saved, and what is kept of it."""

    every: int = Field(300, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_best: int = Field(0, ge=0, description="best checkpoints that are kept beside the newest")
    metric: str = Field("val/recall@1", description="what is best; a checkpoint counts if its step was evaluated, too")
    mode: Literal["max", "min"] = Field("max", description="whether more of it is better, or less")


def committed(run_uri: str) -> list[str]:
    """URIs of the whole checkpoints of a run, oldest first."""
    ends = f"/{POSITION}"
    return [uri.removesuffix(ends) for uri in storage.list_files(storage.join(run_uri, FOLDER), ends)]


def newest(run_uri: str) -> tuple[str, dict[str, Any]] | None:
    """The last whole checkpoint of a run and where the run stands in it; None without one.

    One of which files are missing, or of another size, is passed over with a warning.
    """
    for uri in reversed(committed(run_uri)):
        position = storage.read_json(storage.join(uri, POSITION))
        damage = _damage(uri, position["files"])
        if damage is None:
            return uri, position
        logger.warning("the checkpoint %s is damaged (%s); taking the one before", uri, damage)
    return None


def sweep(run_uri: str) -> None:
    """Removes what an interrupted upload left behind. Only for a run that nobody is working on."""
    whole = set(committed(run_uri))
    top = storage.join(run_uri, FOLDER)
    names = {uri.removeprefix(f"{top}/").split("/", 1)[0] for uri in storage.list_files(top)}
    for name in sorted(names):
        if storage.join(top, name) not in whole:
            storage.delete(storage.join(top, name))


def restore(engine: Any, uri: str | None, local_rank: int) -> tuple[int, list[dict[str, Any]]]:
    """The step and history of the checkpoint at `uri`, its state loaded into the engine; (0, []) without one.

    Collective. The state is cut anew where another number of workers wrote it. Raises CheckpointError on all ranks
    for one of another architecture.
    """
    if uri is None:
        return 0, []
    position = storage.read_json(storage.join(uri, POSITION))
    _check_fit(engine, position, uri)
    folder = _fetched(uri, local_rank)
    stage, tag = engine.zero_optimization_stage(), position["tag"]
    if stage and position["world"] != dist.get_world_size():
        load_resharded(engine, folder / tag, position["world"])
    else:
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise CheckpointError("it holds no state of the engine", where=uri, fix="remove it")
    dist.barrier()
    if local_rank == 0 and uri.startswith("s3://"):
        shutil.rmtree(folder, ignore_errors=True)
    return int(position["step"]), position["history"]


class Checkpoints:
    """Writes one worker's part of a run's checkpoints, one upload at a time."""

    def __init__(self, config: CheckpointsConfig, run_uri: str, attempt: str, log: Any, rank: int, world: int) -> None:
        self.config, self.run_uri, self.attempt, self.log = config, run_uri, attempt, log
        self.rank, self.world = rank, world
        self.failures = 0  # in a row; only rank 0 knows
        self.failed = 0  # in all
        self._last_error = ""
        self._size = 0
        self._thread: threading.Thread | None = None

    def save(self, engine: Any, metrics: dict[str, Any], history: list[dict[str, Any]], data: dict[str, Any]) -> None:
        """Saves the state on this machine and begins to upload it (collective).

        Waits for the upload before. Raises CheckpointError when several in a row could not be uploaded.
        """
        self.wait()
        step = metrics["step"]
        name = f"step-{step:09d}-{self.attempt}"
        if not self._room(engine):
            return
        # Every rank writes its own part; they meet in storage.
        folder, tag = Path(tempfile.mkdtemp(prefix="rayemb-checkpoint-")), f"step-{step}"
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        self._size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        position = {
            "step": step,
            "tag": tag,
            "world": self.world,
            "zero_stage": engine.zero_optimization_stage(),
            "parameters": shapes(engine.module),
            "metrics": dict(metrics),
            "data": data,
            "history": list(history),
        }
        self._thread = threading.Thread(target=self._upload, args=(folder, name, position), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no upload is under way. Raises CheckpointError when several in a row failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failures >= MOST_FAILURES:
            raise CheckpointError(
                f"{self.failures} checkpoints in a row could not be written, the last one because: {self._last_error}",
                where=storage.join(self.run_uri, FOLDER),
                fix="make room or mend the store and run the same command: it goes on from the last checkpoint",
            )

    def _room(self, engine: Any) -> bool:
        """Whether the state fits on every machine's temporary folder; all ranks get the same answer."""
        needed = self._size or 16 * sum(_numel(parameter) for parameter in engine.module.parameters())
        free = shutil.disk_usage(tempfile.gettempdir()).free
        short = torch.tensor([max(0, needed - free)], device=engine.device)
        if dist.is_initialized():
            dist.all_reduce(short, op=dist.ReduceOp.MAX)
        if not int(short):
            return True
        if self.rank == 0:
            self._count(f"a temporary folder lacks {int(short) >> 20} MiB")
        return False

    def _upload(self, folder: Path, name: str, position: dict[str, Any]) -> None:
        files, problem = {}, None
        try:
            files = _put(folder, storage.join(self.run_uri, FOLDER, name))
        except Exception as error:  # a store may fail in any way; the run goes on
            problem = " ".join(str(error).split())[:500]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        ray.get(self.log.uploaded.remote(name, self.rank, files, problem))
        if self.rank == 0:
            try:
                self._commit(name, position)
                self.failures = 0
            except Exception as error:
                self._count(" ".join(str(error).split())[:500])
                self._drop(name)

    def _commit(self, name: str, position: dict[str, Any]) -> None:
        """Waits for everybody's part, checks that it is there, and makes a checkpoint of them."""
        while len(parts := ray.get(self.log.uploads.remote(name))) < self.world:
            time.sleep(POLL_S)
        for rank, (_, problem) in sorted(parts.items()):
            if problem:
                raise CheckpointError(f"rank {rank}: {problem}")
        uri = storage.join(self.run_uri, FOLDER, name)
        files = {path: size for found, _ in parts.values() for path, size in found.items()}
        if damage := _damage(uri, files):
            raise CheckpointError(f"{damage}; all machines must see the same storage", where=uri)
        storage.write_json(storage.join(uri, POSITION), {**position, "files": files})
        self._prune()

    def _prune(self) -> None:
        whole = committed(self.run_uri)
        kept = set(whole[-self.config.keep :])
        if self.config.keep_best:
            found = {uri: storage.read_json(storage.join(uri, POSITION))["metrics"] for uri in whole}
            scored = [uri for uri in whole if found[uri].get(self.config.metric) is not None]
            sign = 1 if self.config.mode == "max" else -1
            scored.sort(key=lambda uri: sign * found[uri][self.config.metric])
            kept |= set(scored[-self.config.keep_best :])
        for uri in whole:
            if uri not in kept:
                # First what makes it a checkpoint, so that half of it never passes for one.
                storage.delete(storage.join(uri, POSITION))
                storage.delete(uri)

    def _drop(self, name: str) -> None:
        try:
            storage.delete(storage.join(self.run_uri, FOLDER, name))
        except storage.StorageError as error:
            logger.warning("what there is of a failed checkpoint stays: %s", error)

    def _count(self, problem: str) -> None:
        self.failures, self.failed, self._last_error = self.failures + 1, self.failed + 1, problem
        message = f"a checkpoint could not be written ({problem}); the run goes on to the next one"
        logger.warning(message)
        self.log.say.remote(message)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter as a whole, whatever ZeRO has made of it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(getattr(parameter, "ds_shape", parameter.shape))


def _check_fit(engine: Any, position: dict[str, Any], uri: str) -> None:
    stage = engine.zero_optimization_stage()
    if position["zero_stage"] != stage:
        raise CheckpointError(
            f"it was written at ZeRO stage {position['zero_stage']} and the run is at {stage}",
            where=uri,
            fix=f"set train.zero_stage={position['zero_stage']}, or remove it to start anew",
        )
    there, here = position["parameters"], shapes(engine.module)
    if there == here:
        return
    odd = next(name for name in [*here, *there] if there.get(name) != here.get(name))
    raise CheckpointError(
        f"it is of another architecture: parameter {odd} has shape {there.get(odd, 'none')} there and "
        f"{here.get(odd, 'none')} in this model",
        where=uri,
        fix="go on with the model that it was written by, or remove it to start anew",
    )


def _damage(uri: str, files: dict[str, int]) -> str | None:
    fs, path = storage.filesystem(uri)
    found = fs.get_file_info([f"{path}/{name}" for name in files])
    for info, (name, size) in zip(found, files.items(), strict=True):
        if info.type != pafs.FileType.File:
            return f"{name} is not there"
        if info.size != size:
            return f"{name} has {info.size} bytes and not {size}"
    return None


def _put(folder: Path, uri: str) -> dict[str, int]:
    """Copies the files of a folder; their sizes by relative path."""
    fs, target = storage.filesystem(uri)
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        destination = f"{target}/{name}"
        if isinstance(fs, pafs.LocalFileSystem):
            Path(destination).parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(str(path), destination, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)
        sizes[name] = path.stat().st_size
    return sizes


def _fetched(uri: str, local_rank: int) -> Path:
    """A folder of this machine with the checkpoint's files, fetched once for all ranks of the machine (collective)."""
    fs, path = storage.filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return Path(path)
    folder = Path(tempfile.gettempdir()) / f"rayemb-restore-{storage.sha256_bytes(uri.encode())[:16]}"
    if local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        pafs.copy_files(path, str(folder), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    dist.barrier()
    return folder
