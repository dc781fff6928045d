"""Five hundred damaged ONNX files: one clear error each, in bounded time and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is missing")

HERE = Path(__file__).parent
COUNT, AT_ONCE = 500, 20
MAX_SECONDS, MAX_MB = 20.0, 2048

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peaks are read from Linux's /proc",
)


def outcomes(start: int, stop: int, folder: Path) -> list[tuple[int, str, float, int]]:
    """Fold the mutations of a range; a crash is an outcome, and the rest goes on.

    A file that never ends is one, too: its processor time is limited, not that of the
    clock, which a busy machine stretches.
    """
    found: list[tuple[int, str, float, int]] = []
    while start < stop:
        command = [sys.executable, str(HERE / "onnx_mutations.py")]
        done = subprocess.run(
            [*command, str(start), str(stop), str(folder)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
            timeout=280,
        )
        found += [tuple(json.loads(line)) for line in done.stdout.splitlines()]
        start = found[-1][0] + 1 if found else start
        if done.returncode:
            found.append(
                (start, f"CRASH {done.returncode}: {done.stderr[-400:]}", 0, 0)
            )
            start += 1
    return found


def check(found: list[tuple[int, str, float, int]]) -> None:
    for number, told, seconds, megabytes in found:
        where = f"mutation {number}: {told}"
        assert not told.startswith(("UNCLEAR", "CRASH")), where
        assert "\n" not in told, where
        assert seconds < MAX_SECONDS, f"{where} took {seconds} s"
        assert megabytes < MAX_MB, f"{where} took {megabytes} MB"


def test_the_first_damaged_files_give_clear_errors(tmp_path: Path) -> None:
    found = outcomes(0, 30, tmp_path)
    check(found)
    assert len(found) == 30
    assert sum(told != "folded" for _, told, *_ in found) > 10


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, COUNT, AT_ONCE))
def test_five_hundred_damaged_files_give_clear_errors(
    start: int, tmp_path: Path
) -> None:
    check(outcomes(start, start + AT_ONCE, tmp_path))


def test_a_crash_and_a_traceback_are_no_clear_errors() -> None:
    for told in ("UNCLEAR KeyError: 'x'", "CRASH -11: "):
        with pytest.raises(AssertionError):
            check([(1, told, 0.1, 100)])
    with pytest.raises(AssertionError):
        check([(1, "FoldError: a\nb", 0.1, 100)])
    with pytest.raises(AssertionError):
        check([(1, "folded", 21.0, 100)])
