"""A result shows itself: as text, as `repr`, as a table in a notebook."""

from dataclasses import dataclass

import torch
from torch import nn

import normkit
from normkit.results import Result
from normkit.studies.record import Record
from normkit.studies.verdict import Verdict


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


def _results() -> dict[str, Result]:
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(20, 32, 4)
    batches = [(batch, (batch[:, 0] > 5).long()) for batch in x]
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.001), nn.ReLU(), nn.Linear(8, 2)
    )
    for batch in x:
        model(batch)
    loss_fn = nn.functional.cross_entropy
    found = normkit.diagnose(model, batches, loss_fn).confirm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with normkit.watch(model, optimizer) as watched, normkit.saved_memory() as saved:
        for batch, targets in batches:
            optimizer.zero_grad()
            loss_fn(model(batch), targets).backward()
            optimizer.step()
    return {
        "Diagnosis": found,
        "Confirmation": found.confirmations[0],
        "Statistics": found.statistics,
        "GapExplanation": normkit.explain_gap(model, batches),
        "Watch": watched,
        "SavedMemory": saved,
        "RepairResult": found.repair(),
        "CalibrationReport": normkit.calibrate(model, list(x)),
        "InitReport": normkit.initialize(model, example_inputs=x[0]),
        "FoldLedger": normkit.fold(model.eval(), x[0])[1],
        "Equivalence": normkit.verify(model, model, x[0]),
        "Mixing": normkit.batches.mixing(list(x)),
        "Record": Record(
            *("S01", "quick", "", "", {}, {}, {}, 3.0, 2.0),
            verdicts=(Verdict("the loss falls", "holds", (), ""),),
            results=[{"losses": [1.0] * 10_000}] * 10,
        ),
    }


def test_every_result_is_short_in_a_shell_and_shown_in_a_notebook() -> None:
    for name, result in _results().items():
        assert isinstance(result, Result), name
        assert str(result) == repr(result) == result.to_text(), name
        assert 0 < len(repr(result)) < 4000, name
        assert result._repr_html_().startswith(("<table>", "<pre>")), name


def test_the_examined_data_are_not_printed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    found = normkit.diagnose(model, [torch.randn(32, 4)] * 3)
    assert "tensor(" not in repr(found.case)
    assert len(repr(found.case)) < 1000


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
