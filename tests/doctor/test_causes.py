"""Findings of one cause are one finding; results show themselves in few lines."""

import json

import pytest
from torch import nn

from doctor.models import batches, build, norms, train, trained
from normkit.doctor import Diagnosis, Finding, checks, diagnose, explain_gap, watch
from normkit.doctor.finding import CAUSES_FIRST, Severity, by_cause, ranked

LOSS = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return diagnose(trained("mlp", momentum=0.001), batches()[:14], LOSS)


def test_one_cause_in_four_layers_is_one_finding_with_its_layers(
    found: Diagnosis,
) -> None:
    ids = [f.id for f in found.findings if f.is_alarm]
    assert sorted(ids) == sorted(set(ids))
    first = found.findings[0]
    assert (first.id, first.layers) == ("D04", tuple(norms(trained("mlp"))))
    assert first.where == "layer 1 and 3 more layers"
    assert len([f for f in found.readings if f.id == "D04"]) == 4
    written = json.loads(found.to_json())["findings"]
    assert written[0]["layers"] == list(first.layers)
    assert len(written) == len(found.findings)
    # The others follow from it, and are counted as what they are.
    assert {f.follows for f in found.errors} == {"", "D04"}
    assert [f.id for f in found.errors if not f.follows] == ["D04"]
    assert found.summary().startswith("1 error")
    consequences = [f for f in found.findings if f.follows]
    assert f"with {len(consequences)} consequences" in found.summary()
    assert {f["follows"] for f in written if f["severity"] == "error"} == {"", "D04"}
    assert "(follows from D04)" in found.to_text()
    # One each, after that of the verdict.
    cards = found.to_html().count('<article class="card error">')
    assert cards == 1 + len(found.errors)


def test_two_fixes_of_one_check_are_two_causes() -> None:
    model = trained("mlp")
    first, *others = norms(model).values()
    first.momentum = 0.9
    for norm in others:
        norm.momentum = 0.95
    named = diagnose(model, batches()[:14], LOSS).findings
    assert [f.layers for f in named if f.id == "D04"] == [("1",), ("4", "7", "10")]


def test_the_first_lines_say_what_it_costs_where_and_what_to_do(
    found: Diagnosis,
) -> None:
    summary, cost, cause, fix, *_ = found.to_text().split("\n")
    assert "1 error" in summary
    assert "in eval mode" in cost
    assert "D04 momentum_convention in layer 1 and 3 more layers" in cause
    assert fix.startswith("fix        set momentum=0.1")


def test_the_first_card_of_the_page_is_the_verdict(found: Diagnosis) -> None:
    confirmed = found.confirm()
    told = confirmed.to_text().split("\n")[4]
    assert told.startswith("on a copy  D04: its fix helps; metric 0.")
    card = confirmed.to_html().split("<article")[1].split("</article>")[0]
    assert "What is wrong: momentum convention" in card
    assert "in layer 1 and 3 more layers" in card
    assert "in eval mode" in card
    assert "its fix helps; metric 0." in card
    assert "set momentum=0.1" in card
    healthy = diagnose(trained("mlp"), batches()[:14], LOSS)
    assert "What is wrong" not in healthy.to_html()


def test_results_show_themselves_shortly(found: Diagnosis) -> None:
    confirmed = found.confirm()
    model = trained("mlp")
    with watch(model) as seen:
        for x, y in batches()[:3]:
            assert repr(seen).endswith(" observed")
            LOSS(model.train()(x), y).backward()
    gap = explain_gap(model, batches()[:4])
    for result in (confirmed, seen, gap, found.repair()):
        assert repr(result) == str(result) == result.to_text()
        assert len(repr(result)) < 6000
        assert result.to_json()
        assert "<" in result._repr_html_()
    assert confirmed._repr_html_().count("<tr>") == 1 + len(confirmed.findings)
    assert seen.history["steps"] == [0, 1, 2]
    assert None not in seen.history["layers"]["1"]["gradient_norm"]
    json.loads(seen.to_json())


def test_what_the_data_does_to_the_signals_comes_behind_the_data() -> None:
    def reading(id_: str, severity: Severity, value: float = 2.0) -> Finding:
        return Finding(id_, "", "", severity, value, 1.0)

    def order(*found: Finding) -> list[str]:
        return [f.id for f in ranked(found)]

    dead, mean = reading("D21", "error"), reading("D28", "warning")
    assert order(dead, mean) == ["D28", "D21"]
    assert order(reading("D17", "error"), reading("D28", "error")) == ["D28", "D17"]
    # An error that the inputs do not explain stays before them.
    assert order(mean, reading("D08", "error")) == ["D08", "D28"]
    large, small = reading("D27", "warning"), reading("D27", "warning", 0.5)
    assert order(dead, large) == ["D27", "D21"]
    assert order(dead, small) == ["D21", "D27"]
    # A cause that is an error by itself stays before the steps.
    assert order(dead, large, reading("D34", "error")) == ["D34", "D27", "D21"]
    assert order(dead, reading("D28", "info")) == ["D21", "D28"]


def test_a_consequence_lies_in_the_layers_of_its_cause() -> None:
    def reading(id_: str, layer: str, severity: Severity = "error") -> Finding:
        return Finding(id_, "", layer, severity, fix=id_)

    def told(*found: Finding) -> dict[str, str]:
        return {f.id: f.follows for f in by_cause(found)}

    assert told(reading("D04", "a"), reading("D01", "a")) == {"D04": "", "D01": "D04"}
    assert told(reading("D04", "a"), reading("D01", "b")) == {"D04": "", "D01": ""}
    chain = told(reading("D04", "a"), reading("D01", "a"), reading("D02", ""))
    assert chain == {"D04": "", "D01": "D04", "D02": "D04"}
    # An information explains no alarm.
    assert told(reading("D04", "a", "info"), reading("D01", "a"))["D01"] == ""
    assert told(reading("D08", ""), reading("D02", ""))["D02"] == ""


def test_that_nothing_was_learned_follows_from_a_signal_that_does_not_arrive() -> None:
    def basics(model: nn.Module) -> Finding:
        diagnosis = diagnose(model, batches(seed=3)[:14], LOSS)
        (finding,) = (f for f in diagnosis.findings if f.id == "D34")
        assert "learned nothing" in finding.evidence
        return finding

    deep = build("mlp", act=nn.Sigmoid, depth=6, normalized=False)
    train(deep, 40)
    assert basics(deep).follows == "D24"
    # Without such a signal it is a cause: here targets of other samples.
    model = build("mlp")
    train(model, 60, lr=0.05, data=[(x, y.roll(1)) for x, y in batches()])
    assert basics(model).follows == ""


def test_only_the_symptom_of_d34_follows_from_dead_units() -> None:
    def told(**details: bool) -> dict[str, str]:
        dead = Finding("D21", "", "act", "error", fix="D21")
        basics = Finding("D34", "", "", "warning", fix="D34", details=details)
        return {f.id: f.follows for f in by_cause([basics, dead])}

    assert told(is_symptom=True) == {"D21": "", "D34": "D21"}
    assert told() == {"D34": "", "D21": ""}


def test_every_check_has_its_place_among_the_causes() -> None:
    assert sorted(CAUSES_FIRST) == sorted(checks.CHECKS)
