"""Convert real architectures in one line, check each against itself, and count.

    python -m benchmarks.convert run [NAME ...]    measure; named ones again
    python -m benchmarks.convert one NAME ...      measure these, and print them
    python -m benchmarks.convert page              docs/convert_coverage.md

`normkit.convert(model, to="normkit", example_inputs=x)` on models of timm, torchvision
and transformers with random weights, in float64. `run` adds to the record what it does
not hold yet, each model in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.convert.compare import measure
from benchmarks.convert.models import cases
from benchmarks.convert.page import page

HERE = Path(__file__).parent
RECORD = HERE / "record.json"
PAGE = HERE.parents[1] / "docs" / "convert_coverage.md"

_LIMIT_SECONDS = 480
_FORK = multiprocessing.get_context("fork")


def run(names: list[str]) -> None:
    """Measure what the record does not hold yet, or `names` again."""
    import normkit.convert
    import normkit.fold.torch.harness  # noqa: F401  loaded once, before the processes fork

    every = {each.name: each for each in cases()}
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    missing = [n for n in every if known.get(n, {"earlier": True}).get("earlier")]
    for name in names or missing:
        known[name] = _apart(lambda name=name: measure(every[name]), name)
        ordered = {key: known[key] for key in every if key in known}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
        print(json.dumps(known[name]), flush=True)


def _apart(work: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        warnings.simplefilter("ignore")
        try:
            theirs.send(work())
        except Exception as error:
            theirs.send({"name": name, "failed": f"{type(error).__name__}: {error}"})

    worker = _FORK.Process(target=send, daemon=True)
    worker.start()
    theirs.close()
    try:
        if ours.poll(_LIMIT_SECONDS):
            return ours.recv()
        return {"name": name, "failed": f"took over {_LIMIT_SECONDS} s"}
    except EOFError:
        return {"name": name, "failed": "crash"}
    finally:
        worker.kill()
        worker.join()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *rest = sys.argv[1:]
    if what == "run":
        run(rest)
    elif what == "one":
        every = {each.name: each for each in cases()}
        for name in rest:
            print(json.dumps(measure(every[name])), flush=True)
    elif what == "page":
        PAGE.write_text(page(json.loads(RECORD.read_text()).values()))
