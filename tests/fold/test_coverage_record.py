"""The record of folded architectures, and which code made it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normkit
from normkit.fold.equivalence import difference

ROOT = Path(__file__).parents[2]
SOURCE = """
\'\'\'Doc.\'\'\'
def double(x):
    \'\'\'Return 2·x.\'\'\'
    return 2 * x  # Twice.
"""


@pytest.fixture
def fold_digest():
    path = ROOT / "benchmarks" / "fold" / "fold_digest.py"
    spec = importlib.util.spec_from_file_location("fold_digest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_leave_the_digest_of_code_and_code_changes_it(fold_digest) -> None:
    before = fold_digest.digest_of([SOURCE])
    words = SOURCE.replace("Return", "Give").replace("Twice", "Two").replace("Doc", "D")
    assert fold_digest.digest_of([words]) == before
    assert fold_digest.digest_of([SOURCE.replace("2 * x", "x + x")]) != before


def test_the_digest_covers_what_runs_in_a_fold(fold_digest) -> None:
    """The layers of normkit are left out of it: none of their code may run."""
    source = str(fold_digest.SOURCE / "normkit")
    ran: set[Path] = set()

    def note(frame, event, _argument) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(source):
            ran.add(Path(frame.f_code.co_filename))

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.BatchNorm1d(288),
        nn.Linear(288, 4),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        folded, _ = normkit.fold(model, x)
        with torch.no_grad():
            difference(model(x), folded(x))
    finally:
        sys.setprofile(before)
    covered = set(fold_digest.modules().values())
    assert len(ran) > 25
    assert ran <= covered, sorted(ran - covered)
