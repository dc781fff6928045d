"""A result shows itself: as text, as `repr`, as a table in a notebook."""

from dataclasses import dataclass

import torch
from torch import nn

import normkit
from normkit.results import Result


@dataclass(frozen=True, repr=False)
class Layers(Result):
    names: tuple[str, ...]

    def to_text(self) -> str:
        return "\n".join([f"{len(self.names)} layers", *self.names])

    def to_rows(self) -> list[dict[str, object]]:
        return [{"name": name, "size": 1 / 3, "why": None} for name in self.names]


def test_str_and_repr_are_the_text() -> None:
    found = Layers(("bn1",))
    assert str(found) == repr(found) == found.to_text() == "1 layers\nbn1"


def test_a_notebook_gets_one_line_per_row_under_the_first_line() -> None:
    shown = Layers(("bn1", "bn2"))._repr_html_()
    assert "<caption>2 layers</caption>" in shown
    assert shown.count("<tr>") == 3
    assert "<td>bn2</td><td>0.3333</td><td></td>" in shown


def test_names_and_text_cannot_break_the_page() -> None:
    shown = Layers(("<b>&",))._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;&amp;" in shown


def test_without_rows_a_notebook_gets_the_text() -> None:
    assert Layers(())._repr_html_() == "<pre>0 layers</pre>"


def test_the_reports_of_the_verbs_show_themselves() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    x = torch.randn(16, 4)
    reports = [
        normkit.calibrate(model, [x]),
        normkit.initialize(model, example_inputs=x),
        normkit.convert(model, to="normkit", example_inputs=x),
    ]
    for report in reports:
        assert repr(report) == str(report) == report.to_text()
        rows = report.to_rows()
        assert rows
        assert report._repr_html_().count("<tr>") == 1 + len(rows)
