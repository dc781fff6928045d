"""Former false alarms and unclear words, each beside the real fault."""

from dataclasses import replace
from datetime import date
from importlib import metadata

import pytest
import torch
from torch import nn

import normkit
from doctor.models import batches, trained
from doctor.test_before_training import of_norm, severity
from doctor.test_little_data import weights
from normkit.doctor import Diagnosis, Statistics, checks, diagnose, watch
from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.checks.batch_size import effective_values
from normkit.doctor.checks.steps import median_step, steps_of
from normkit.doctor.measurements import (
    Evaluation,
    LayerStatistics,
    TrainingStatistics,
    WeightStatistics,
)
from normkit.doctor.provenance import provenance
from normkit.environment import environment
from normkit.moments import moments


@pytest.fixture(scope="module")
def wrong_momentum() -> Diagnosis:
    model = trained("mlp", momentum=0.001)
    return diagnose(model, batches()[:14], nn.CrossEntropyLoss())


def units(dead: float, start: float | None = None) -> Statistics:
    layer = LayerStatistics(
        *("act", "ReLU", "activation"),
        units=64,
        dead=dead,
        dead_samples=2000,
        dead_at_start=start,
    )
    return Statistics((layer,), has_moved=True)


def watched(dead: float, *errors: float) -> Statistics:
    """A training whose ‖dL/dy‖ went through these values, five steps each."""
    seen = units(dead, start=0.0)
    series = tuple(error for error in errors for _ in range(5))
    out = LayerStatistics("out", "Linear", "weight", is_output=True)
    out = replace(out, gradient_norm=series)
    return replace(seen, layers=(*seen.layers, out), while_training=True)


WRONG = Evaluation((64, 64), (2.0, 2.1), (2.0, 2.1), shuffled_loss=(2.01, 2.09))
LEARNED = Evaluation((64, 64), (0.1, 0.11), (0.1, 0.11), shuffled_loss=(2.0, 2.1))


@pytest.mark.parametrize(
    ("statistics", "expected"),
    [
        (replace(units(0.3), evaluation=WRONG), "warning"),
        # Nothing shows that it does not learn.
        (units(0.3), "info"),
        (units(0.6), "error"),
        # What was dead from the start costs what it cost then.
        (units(0.3, start=0.28), "clear"),
        (units(0.6, start=0.05), "error"),
        # What has learned can do without them.
        (replace(units(0.45), evaluation=LEARNED), "info"),
        (replace(units(0.8), evaluation=LEARNED), "warning"),
        # So in a watch, which sees the error of the answers fall, or not.
        (watched(0.45, 0.1, 0.09, 0.07), "info"),
        (watched(0.8, 0.1, 0.09, 0.07), "warning"),
        (watched(0.45, 0.1, 0.07, 0.097), "warning"),
        (watched(0.45, 0.1, 0.1, 0.09), "info"),  # it learns where much is noise
        (watched(0.45, 0.1), "warning"),
        # A network of one or two inputs starts so.
        (replace(units(0.4), has_moved=False), "info"),
    ],
)
def test_d21_compares_with_the_start_and_asks_what_was_learned(
    statistics: Statistics, expected: str
) -> None:
    assert severity(statistics, "D21") == expected


def test_steps_that_shrink_as_a_training_arrives_are_no_fault() -> None:
    arrived = tuple(10 ** (-3 - 6 * i / 60) for i in range(60))
    for ratios, expected in ((arrived, "clear"), ((1e-7,) * 60, "warning")):
        assert severity(weights(1, update_ratio=ratios), "D27") == expected
        found = checks.run(weights(4, update_ratio=ratios), ["D24"])
        assert ("warning" in {f.severity for f in found}) is (expected == "warning")


def test_d27_weighs_each_update_by_the_steps_it_stands_for() -> None:
    """A watch observes each of the first 20 steps, and then every fiftieth."""
    at = (*range(20), *range(50, 400, 50))

    def found(first: float, later: float) -> str:
        ratios = (first,) * 20 + (later,) * 7
        return severity(weights(1, update_ratio=ratios, updated_at=at), "D27")

    assert found(0.2, 0.01) == "clear"
    assert found(0.01, 0.2) == "warning"
    assert found(0.2, 0.2) == "warning"
    weight = WeightStatistics(1.0, update_ratio=(1.0,) * 27, updated_at=at)
    assert steps_of(weight) == [1.0] * 19 + [16.0, 40.5] + [50.0] * 5 + [25.5]
    assert sum(steps_of(weight)) == at[-1] + 1
    weight = WeightStatistics(1.0, update_ratio=(3.0, 3.0, 3.0, 1.0, 1.0))
    assert median_step(weight) == 3.0
    assert median_step(replace(weight, updated_at=(0, 1, 2, 9, 16))) == 1.0
    weight = WeightStatistics(1.0, update_ratio=(4.0, 1.0, 2.0, 3.0))
    assert median_step(weight) == 2.5
    assert median_step(weight, without=0.25) == 2.0


def test_d27_a_watch_of_the_start_asks_whether_large_steps_have_ended() -> None:
    def found(*ratios: float) -> str:
        at = tuple(range(len(ratios)))
        return severity(weights(1, update_ratio=ratios, updated_at=at), "D27")

    falling = [0.34 * 0.93**i for i in range(20)]
    assert found(*falling) == "info"
    assert found(*[0.15] * 20) == "warning"
    # In a longer watch they were most of the training.
    assert found(*[0.15] * 40, *[0.05] * 20) == "warning"


def test_constant_columns_of_the_data_are_no_fault_of_the_network() -> None:
    behind = replace(of_norm([1.0, 1.0, 0.0]), has_moved=True)
    assert severity(behind, "D18") == "warning"
    assert severity(replace(behind, layers=behind.layers[1:]), "D18") == "info"


def test_a_batch_has_no_more_independent_values_than_values() -> None:
    """Batches of equal means: the ratio of variances alone would say infinity."""
    seen = None
    for part in torch.randn(40, 50, 3, dtype=torch.float64):
        found = moments(part - part.mean(0) + 1e-3 * torch.randn(3), 0)
        one = ChannelStatistics.of_batch(found, found)
        seen = one if seen is None else seen.merge(one)
    assert seen is not None
    ratio = seen.pooled.var / seen.batch_means.unbiased_var
    assert float(ratio.median()) > 1000
    assert effective_values(seen) == 50


def test_d08_without_an_optimizer_is_not_judged_and_says_why() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with watch(model) as seen:
        model(torch.randn(8, 4)).sum().backward()
    (found,) = [f for f in seen.readings() if f.id == "D08" and f.layer == ""]
    assert found.severity == "not_judged"
    assert "no optimizer was given" in found.evidence


def test_d14_names_a_call_that_makes_the_groups() -> None:
    decayed = Statistics(training=TrainingStatistics(weight_decay=0.01))
    (found,) = checks.run(decayed, ["D14"])
    call = found.fix.partition("SGD(")[2].partition(", …")[0]
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    groups = eval(call, {"normkit": normkit, "model": model})
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


def test_a_repair_says_which_line_of_the_program_must_change(
    wrong_momentum: Diagnosis,
) -> None:
    applied = wrong_momentum.repair(trained("mlp", momentum=0.001))
    assert "D04" in applied
    line = (
        "in code  D04: where the layers are made, write the momentum that the finding"
    )
    assert line in applied.to_text()


def test_the_head_of_a_watched_training_says_what_was_watched() -> None:
    model = trained("mlp", steps=0)
    with watch(model) as seen:
        model(batches()[0][0]).sum().backward()
    page = seen.to_html()
    lead = page[: page.index("<h2")]
    for words in ("Sequential; ", date.today().isoformat(), f"{torch.__version__}"):
        assert words in lead


def test_the_version_is_known_without_an_installed_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where `src` is on the path of Python, and nothing is installed."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert environment().normkit == normkit.__version__
    assert f"normkit {normkit.__version__}" in provenance()


def test_the_head_of_a_page_says_what_was_examined(wrong_momentum: Diagnosis) -> None:
    page = wrong_momentum.to_html(source="train.py:make, best.pt")
    lead = page[: page.index("<h2")]
    seed = wrong_momentum.case and wrong_momentum.case.seed
    for words in (
        "train.py:make, best.pt",
        f"Sequential, 14 batches of 64 samples, seed {seed}",
        date.today().isoformat(),
        f"torch {torch.__version__}",
        f"normkit {normkit.__version__}",
    ):
        assert words in lead
