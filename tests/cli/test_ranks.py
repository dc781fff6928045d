"""Commands under torchrun: each process has a part, the first one prints and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import normkit
from docs.test_rank_recipes import torchrun

TARGET = """
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.001), nn.ReLU())
    data = TensorDataset(5 + 3 * torch.randn(255, 4))
    if os.environ.get("FAULT") == "1" and dist.get_rank() == 1:
        raise OSError("the disk of one rank is gone")
    sampler = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
    for (x,) in DataLoader(data, 32):
        model(x)
    return {"model": model, "loader": DataLoader(data, 32, sampler=sampler)}


def make_training():
    made, rank = make(), dist.get_rank()
    model = made["model"]
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(steps):
        model.train()
        for step in range(steps):
            if step == 5 and rank == 1:
                if os.environ.get("FAULT") == "2":
                    raise OSError("the network of one rank is gone")
                model.eval()
            parallel(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return {**made, "optimizer": optimizer, "train": train}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "target.py").write_text(TARGET)
    namespace: dict[str, object] = {}
    exec(TARGET, namespace)
    model = namespace["make"]()["model"]  # type: ignore[operator]
    torch.save(model.state_dict(), tmp_path / "in.pt")
    return tmp_path


@pytest.mark.slow
def test_calibrate_measures_the_data_of_all_processes(folder: Path) -> None:
    words = "-m normkit_cli calibrate target.py:make --checkpoint in.pt --out out.pt"
    done = torchrun(folder, *words.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights  ") == 1
    found = torch.load(folder / "out.pt")
    namespace: dict[str, object] = {}
    exec(TARGET, namespace)
    made = namespace["make"]()  # type: ignore[operator]
    normkit.calibrate(made["model"], made["loader"])
    torch.testing.assert_close(
        found["1.running_var"], made["model"][1].running_var, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_the_doctor_shows_the_findings_of_all_once(folder: Path) -> None:
    done = torchrun(folder, "-m", "normkit_cli", "doctor", "target.py:make")
    assert "ChildFailedError" in done.stderr  # exit code 1: there is an error
    assert "on 2 of 2 ranks" in done.stdout
    assert done.stdout.count("D04 slow_momentum") <= 1
    assert done.stdout.count("fix: ") >= 1


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_its_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "1")
    done = torchrun(folder, "-m", "normkit_cli", "doctor", "target.py:make")
    assert done.returncode != 0
    assert "normkit: rank 1 of 2: make() of target.py raised OSError" in done.stderr
    assert "the disk of one rank is gone" in done.stderr


@pytest.mark.slow
def test_a_training_is_watched_on_all_processes(folder: Path) -> None:
    words = "-m normkit_cli doctor target.py:make_training --steps 12"
    done = torchrun(folder, *words.split())
    told = "7 optimizer steps with the whole model in eval mode"
    assert done.stdout.count(told) == 1, done.stderr[-2000:]
    assert "(rank 1; on 1 of 2 ranks)" in done.stdout


@pytest.mark.slow
def test_a_training_that_fails_on_one_process_ends_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for its gradients, without an end of their own."""
    monkeypatch.setenv("FAULT", "2")
    words = "-m normkit_cli doctor target.py:make_training --steps 12"
    done = torchrun(folder, *words.split())
    assert done.returncode != 0
    told = "normkit: rank 1 of 2: the network of one rank is gone"
    assert told in done.stderr
