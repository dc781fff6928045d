"""Progress bars: on stderr alone, gone when the work ends, in a notebook too."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from normkit.progress import progress_bar, tracked


def test_the_bar_is_on_stderr_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measure", 3) as advance:
        for _ in range(3):
            advance()
    printed = capsys.readouterr()
    assert "measure" in printed.err
    assert "100%" in printed.err
    assert not printed.out


def test_nothing_is_printed_unless_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2], "measure", shown=False)) == [1, 2]
    printed = capsys.readouterr()
    assert not printed.err
    assert not printed.out


def test_values_of_unknown_number_pass_through() -> None:
    assert list(tracked(iter("abc"), "read")) == list("abc")


def test_a_notebook_without_widgets_sees_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Console.__init__

    def in_a_notebook(self: Console, **options: object) -> None:
        plain(self, **{"force_jupyter": True, **options})  # type: ignore[arg-type]

    monkeypatch.setattr(Console, "__init__", in_a_notebook)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert list(tracked(range(2), "measure")) == [0, 1]
    printed = capsys.readouterr()
    assert "measure" in printed.err
    assert "100%" in printed.err
