"""A saved file is the old one or the new one, whole, also after a kill."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from normkit.calibrate import save_atomically

WRITER = """
import sys, torch
from normkit.calibrate import save_atomically
print("ready", flush=True)
value = 0
while True:
    save_atomically({"value": torch.full((200_000,), float(value))}, sys.argv[1])
    value += 1
"""


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.arange(3)}, path)
    save_atomically({"a": torch.arange(4)}, str(path))
    assert torch.equal(torch.load(path)["a"], torch.arange(4))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for pause in (0.05, 0.17):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        value = torch.load(path)["value"]
        assert value.numel() == 200_000
        assert bool((value == value[0]).all())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_atomically({"a": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        save_atomically({"a": lambda: None}, path)
    assert torch.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "model.pt", tmp_path / "link.pt"
    save_atomically({"a": 1}, path)
    path.chmod(0o640)
    link.symlink_to(path)
    save_atomically({"a": 2}, link)
    assert link.is_symlink()
    assert torch.load(path) == {"a": 2}
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    before = os.stat(os.devnull)
    save_atomically({"a": 1}, os.devnull)
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    save_atomically({"a": 1}, link)
    assert os.stat(os.devnull).st_rdev == before.st_rdev
    assert os.stat(os.devnull).st_ino == before.st_ino
    assert [p.name for p in tmp_path.iterdir()] == ["null"]


def test_a_reader_of_a_fifo_gets_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE)
    save_atomically({"a": torch.arange(3)}, path)
    found, _ = reader.communicate(timeout=20)
    assert torch.equal(torch.load(io.BytesIO(found))["a"], torch.arange(3))
    assert path.is_fifo()
