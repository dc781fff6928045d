"""A pool of gloo workers on the loopback, for tests that need real ranks.

    ranks = Ranks(3)
    results = ranks.run(function, argument, …)     # function(rank, argument, …)

Every test that needs a process group uses it, even of one rank: with torch 2.13 a gloo
group destroyed in the process of the tests can wait for ever, holding the interpreter's
lock, for a thread of its own that wants the lock to free its last operation (1 in 4,000
times, measured). These workers are ended, and never destroy their group.

The function is found again in each worker by its file and name, so it must stand at
the top of a module. Workers are forked from a server that has torch loaded already: the
pool starts in about 2 s and a call takes milliseconds.
An exception in any rank is raised here, with its traceback.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 60


class Ranks:
    """`size` processes that have joined one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "normkit"])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._workers = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            here, there = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, size, store, there), daemon=True
            )
            worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` on every rank at once; the results by rank."""
        file, name = inspect.getfile(function), function.__name__
        for pipe in self._pipes:
            pipe.send((file, name, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {SECONDS} s")
            result, failure = pipe.recv()
            results.append(result)
            if failure is not None:
                failures.append(f"rank {rank}:\n{failure}")
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()
        self._folder.cleanup()


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    if fault := os.environ.get("NORMKIT_SABOTAGE"):
        import pytest

        import sabotage

        sabotage.FAULTS[fault].plant(pytest.MonkeyPatch())
    modules: dict[str, Any] = {}
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(Path(file).stem, file)
                assert spec is not None
                assert spec.loader is not None
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            pipe.send((getattr(modules[file], name)(rank, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
