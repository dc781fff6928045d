"""Every planted fault is caught by the test that is named for it."""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

import sabotage

ROOT = Path(__file__).parents[1]
TESTS_FAILED = 1

# A fork server that has loaded what the tests load runs a fault in a fraction of a
# second; a fresh interpreter took 3 to 6 seconds for each, and of a server with torch
# and pytest alone 3 of 3.7 seconds went into the data and hypothesis. What is not
# installed is left out.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("pytest", "hypothesis", "torch", "torch.testing", "sklearn.datasets"),
        *("normkit", "normkit.doctor", "normkit.fold", "onnx"),
    ]
)
# pytest warns of plugins that are loaded already, and collects garbage at the end: a
# second for what is loaded here.
_QUICKLY = (
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
    *("-p", "no:unraisableexception"),
)


def run_sabotaged(name: str, tests: list[str], log: Path) -> None:
    """Run `tests` with the fault planted; the exit code is pytest's."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    with (
        log.open("w") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
        code = pytest.main([*options, *_QUICKLY, "--sabotage", name, *tests])
    os._exit(int(code))


@pytest.mark.parametrize("name", sorted(sabotage.FAULTS))
def test_the_fault_is_caught(name: str, tmp_path: Path) -> None:
    tests = sabotage.FAULTS[name].caught_by.split()
    log = tmp_path / "log"
    run = _server.Process(target=run_sabotaged, args=(name, tests, log))
    run.start()
    run.join()
    printed = log.read_text()
    # 0 is a survivor; 2 to 5 and signals are a broken sabotage.
    assert run.exitcode == TESTS_FAILED, (
        f"{name} is not caught by {tests} (exit {run.exitcode})\n{printed[-3000:]}"
    )
    # A failing test, not one that could not be set up.
    assert " failed" in printed.splitlines()[-1], printed[-3000:]
    assert " error" not in printed.splitlines()[-1], printed[-3000:]
