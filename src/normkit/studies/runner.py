"""Run studies: seeds in parallel over cores, resumed after an interruption.

Every trial is one task: the pool takes trials of all studies, so the last seeds of one
study run together with the first of the next. Each uses one thread and its own random
numbers.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from normkit.errors import ArgumentError
from normkit.studies import registry
from normkit.studies.figure import save
from normkit.studies.record import (
    Record,
    code_key,
    environment,
    is_current,
    read_json,
    run_key,
    write_json,
)
from normkit.studies.study import SCALES, Study, Trial
from normkit.torch_state import number_of_threads

__all__ = ["data_folder", "draw_record", "record_path", "run"]

_UNFINISHED = ".unfinished"


def run(
    names: Sequence[str],
    *,
    scale: str = "cpu",
    out: Path,
    data: Path | None = None,
    jobs: int = 1,
    seeds: int | None = None,
    fresh: bool = False,
    on_start: Callable[[str, int], None] | None = None,
    on_trial: Callable[[str], None] | None = None,
) -> list[Record]:
    """Run the studies called `names`; write their records and figures.

    Args:
        names: Ids or titles of studies, e.g. `["S01"]`.
        scale: `quick`, `cpu` or `gpu`.
        out: Folder for `records/ID.json` and `figures/ID.svg`, `.png`; finished seeds
            of a run that was interrupted lie in `.unfinished/` there.
        data: Folder with the larger data sets; see `normkit.studies.data`.
        jobs: Number of parallel trials; 1 runs them in this process.
        seeds: Number of seeds, in place of the scale's.
        fresh: Run finished seeds again.
        on_start: Called with the id of a study and its number of trials to run.
        on_trial: Called with the id of a study after each of its trials.

    Returns:
        One record per study, in the order of `names`.

    Raises:
        ArgumentError: An unknown study or scale, or no CUDA device at scale gpu.
    """
    if scale not in SCALES:
        raise ArgumentError(f"scale={scale!r} must be one of {', '.join(SCALES)}")
    if scale == "gpu" and not torch.cuda.is_available():
        raise ArgumentError(
            "scale='gpu' needs a CUDA device, and torch sees none; use scale='cpu'"
        )
    runs = [
        _Run(study, scale, seeds or study.scales[scale].seeds, out, data)
        for study in map(registry.find, names)
    ]
    by_id = {one.study.id: one for one in runs}
    waiting = []
    for one in runs:
        todo = one.seeds_to_run(fresh=fresh)
        if on_start:
            on_start(one.study.id, len(todo))
        waiting += [(one.study.id, scale, seed) for seed in todo]
    records = {}
    left = {one.study.id: 0 for one in runs}
    for study_id, _, _ in waiting:
        left[study_id] += 1
    for study_id in [key for key, count in left.items() if not count]:
        records[study_id] = by_id[study_id].conclude()
    for study_id, seed, result in _trials(waiting, data, jobs):
        write_json(by_id[study_id].seed_path(seed), result)
        left[study_id] -= 1
        if not left[study_id]:
            records[study_id] = by_id[study_id].conclude()
        if on_trial:
            on_trial(study_id)
    return [records[one.study.id] for one in runs]


def data_folder(given: Path | None = None) -> Path | None:
    """Return the folder of the larger data sets: `given`, or NORMKIT_DATA's.

    Raises:
        ArgumentError: It is no folder.
    """
    named = given or os.environ.get("NORMKIT_DATA")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise ArgumentError(
            f"the data folder {str(folder)!r} does not exist; name one that holds "
            "mnist.npz, cifar10.npz or a .txt file, or leave it out"
        )
    return folder


def measure(study_id: str, scale: str, seed: int, data: Path | None) -> dict[str, Any]:
    """Run one trial on one thread, and restore the state of the process."""
    study = registry.find(study_id)
    device = "cuda" if scale == "gpu" else "cpu"
    trial = Trial(seed, data, device)
    start, spent = time.perf_counter(), time.process_time()
    with number_of_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = study.measure(trial, **study.scales[scale].settings)
    return {
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - spent,
        "data": trial.digests,
        "result": result,
    }


def _trials(
    waiting: list[tuple[str, str, int]], data: Path | None, jobs: int
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if jobs <= 1 or len(waiting) <= 1:
        for study_id, scale, seed in waiting:
            yield study_id, seed, measure(study_id, scale, seed, data)
        return
    # Spawned, not forked: a fork inherits the locks of torch's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            # The workers start while tasks are submitted, and inherit what is blocked.
            with _interrupts_held():
                tasks = {
                    pool.submit(measure, study_id, scale, seed, data): (study_id, seed)
                    for study_id, scale, seed in waiting
                }
            for task in as_completed(tasks):
                yield (*tasks[task], task.result())
        except BaseException:
            workers = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            raise


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back until the block ends; programs started inside never get one.

    A terminal sends it to the workers as well, and a worker that is interrupted writes
    a traceback, even while it imports; one whose parent is interrupted while it hands
    over the task does, too. Ignored instead, the signal would be lost.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Starting the tracker unblocks SIGINT: it must be there before.
    resource_tracker.ensure_running()
    # The mask is for the workers, which inherit it. Here a thread of a math library may
    # take the signal all the same, and Python then runs the handler in the main thread.
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    held: list[int] = []
    if is_main and handler is not None:
        signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main and handler is not None:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


@dataclass(frozen=True)
class _Run:
    """One study at one scale, and its files."""

    study: Study
    scale: str
    count: int
    out: Path
    data: Path | None

    @functools.cached_property
    def key(self) -> str:
        return run_key(self.study, self.scale, self.data)

    @property
    def folder(self) -> Path:
        return self.out / _UNFINISHED / f"{self.study.id}-{self.scale}-{self.key}"

    def seed_path(self, seed: int) -> Path:
        return self.folder / f"{seed}.json"

    def finished(self) -> Record | None:
        """Return the record of an earlier run with the same key and number of seeds."""
        path = record_path(self.out, self.study.id)
        if not path.exists() or not is_current(path, self.study):
            return None
        record = Record.read(path)
        same = record.key == self.key and len(record.results) == self.count
        return record if same else None

    def seeds_to_run(self, *, fresh: bool) -> list[int]:
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.finished():
            return []
        return [s for s in range(self.count) if not self.seed_path(s).exists()]

    def conclude(self) -> Record:
        """Evaluate the finished seeds; write the record and the figure."""
        paths = [self.seed_path(seed) for seed in range(self.count)]
        if all(path.exists() for path in paths):
            record = self._collect([read_json(path) for path in paths])
        else:
            found = self.finished()
            assert found is not None, f"{self.study.id} lost its finished seeds"
            # The rule may have changed since; the results stay.
            verdicts = tuple(self.study.evaluate(found.results))
            record = replace(found, verdicts=verdicts)
        record.write(record_path(self.out, self.study.id))
        draw_record(self.study, record, self.out)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
        return record

    def _collect(self, trials: list[dict[str, Any]]) -> Record:
        results = [trial["result"] for trial in trials]
        digests: dict[str, str] = {}
        for trial in trials:
            digests.update(trial["data"])
        return Record(
            study=self.study.id,
            scale=self.scale,
            key=self.key,
            code=code_key(self.study, self.scale),
            settings=dict(self.study.scales[self.scale].settings),
            data=digests,
            environment=environment("cuda" if self.scale == "gpu" else "cpu"),
            seconds=sum(trial["seconds"] for trial in trials),
            cpu_seconds=sum(trial["cpu_seconds"] for trial in trials),
            verdicts=tuple(self.study.evaluate(results)),
            results=results,
        )


def record_path(out: Path, study_id: str) -> Path:
    """Return the path of a study's record under `out`."""
    return out / "records" / f"{study_id}.json"


def draw_record(study: Study, record: Record, out: Path) -> None:
    """Draw the figure of a record, as `figures/ID.svg` and `.png` under `out`."""
    save(
        lambda figure: study.draw(figure, record.results),
        out / "figures" / study.id,
        f"{study.id}: {study.title}",
    )
