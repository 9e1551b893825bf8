"""Runs a function in W real gloo processes and gives back what each returned."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        # Pickled here: the queue of torch would share memory of a process that is about to end.
        out.put((rank, pickle.dumps(fn(rank, world, *args)), ""))
        dist.barrier()
    except BaseException:
        out.put((rank, None, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()


def run_processes(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`[fn(0, world, *args), fn(1, world, *args), ...]`, each in its own process of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    children = [context.Process(target=_entry, args=(r, world, port, fn, args, out)) for r in range(world)]
    for child in children:
        child.start()
    results = {}
    try:
        for _ in children:
            rank, result, error = out.get(timeout=300)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = pickle.loads(result)
        for child in children:
            child.join(60)
            assert child.exitcode == 0
    finally:
        for child in children:
            child.kill()
    return [results[rank] for rank in range(world)]
