"""Settings and scales that part eval mode from training: D03, D04, D16, D19."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from doctor.models import batches, build, train, trained
from normkit.doctor import Diagnosis, Finding, checks, diagnose
from normkit.doctor.finding import by_cause


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


def diagnosed(model: nn.Module, scale: float = 1.0) -> Diagnosis:
    data = [(scale * x, y) for x, y in batches()[:16]]
    return diagnose(model, data, F.cross_entropy)


def test_d04_a_momentum_of_zero_keeps_the_statistics_of_other_data() -> None:
    model = trained("mlp")
    for norm in norms(model):
        norm.momentum = 0.0
    # On the data of its statistics it is a way to freeze them.
    assert not diagnosed(model).named
    found = diagnosed(model, scale=0.2).findings
    assert found[0].id == "D04"
    assert "momentum 0" in found[0].evidence
    assert {f.follows for f in found if f.id == "D02"} == {"D04"}


def test_d03_a_flag_alone_does_not_keep_eval_mode_from_the_buffers() -> None:
    model = build("mlp")
    for norm in norms(model):
        norm.track_running_stats = False
    train(model, 120)
    found = diagnosed(model).findings
    assert (found[0].id, found[0].severity) == ("D03", "error")
    assert "track_running_stats" in found[0].evidence
    assert not {f.id for f in found if f.is_alarm and not f.follows} - {"D03"}
    assert not diagnosed(trained("mlp")).named


def test_d16_asks_whether_the_network_has_learned_with_its_eps() -> None:
    model = build("mlp")
    for norm in norms(model):
        norm.eps = 0.2
    train(model, 120)
    found = diagnosed(model)
    told = {f.severity for f in found.readings if f.id == "D16"}
    assert told == {"info"}
    assert found.statistics.evaluation is not None
    worse = replace(
        found.statistics.evaluation,
        running_metric=(0.1,) * len(found.statistics.evaluation.samples),
    )
    changed = replace(found.statistics, evaluation=worse)
    assert {f.severity for f in checks.run(changed, ["D16"])} == {"warning"}


@pytest.mark.parametrize(("factor", "expected"), [(0.02, True), (0.2, False)])
def test_d19_scales_that_are_all_small_explain_a_gap(
    factor: float, *, expected: bool
) -> None:
    model = trained("mlp")
    with torch.no_grad():
        for norm in norms(model):
            norm.weight *= factor
            norm.running_var *= 2.0
    last = model[-1]  # pyright: ignore[reportIndexIssue]
    last.weight.data /= factor
    found = diagnosed(model).findings
    told = [f for f in found if f.id == "D19" and f.is_alarm]
    assert bool(told) is expected
    assert "D02" in [f.id for f in found if f.is_alarm]


def test_d19_stands_before_the_gap_that_it_explains() -> None:
    gap = Finding("D02", "train_eval_gap", "", "error")
    small = Finding("D19", "collapsed_scale", "1", "warning")
    assert [(f.id, f.follows) for f in by_cause([gap, small])] == [
        ("D19", ""),
        ("D02", "D19"),
    ]


@pytest.mark.parametrize(("factor", "expected"), [(0.3, True), (0.8, False)])
def test_d01_a_frozen_network_is_told_of_other_inputs(
    factor: float, *, expected: bool
) -> None:
    """Without its first layer's scale, as where three channels become one."""
    model = copy.deepcopy(trained("mlp")).requires_grad_(False)
    assert isinstance(model, nn.Sequential)
    model[0].weight.data *= factor
    backbone, head = model[:-1].eval(), nn.Linear(48, 10)

    class FineTuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, head

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.backbone.eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(x))

    found = [f for f in diagnosed(FineTuned()).findings if f.id == "D01"]
    assert [f.severity for f in found if f.is_alarm] == ["warning"] * expected
    if expected:
        assert found[0].layers == ("backbone.1",)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_d19_scales_of_zero_that_stay_are_the_cause(*, is_frozen: bool) -> None:
    model = trained("mlp")
    first = norms(model)[0]
    with torch.no_grad():
        first.weight.zero_()
        # Nothing comes through the ReLU behind it.
        first.bias.fill_(0.0 if is_frozen else -1.0)
    first.requires_grad_(not is_frozen)
    found = diagnosed(model).findings
    assert found[0].id == "D19"
    assert ("they are frozen" in found[0].evidence) is is_frozen
    assert {f.follows for f in found if f.id in ("D18", "D21")} <= {"D19"}


def test_d19_scales_of_zero_are_a_start() -> None:
    model = build("mlp")
    for norm in norms(model):
        nn.init.zeros_(norm.weight)
    assert not [f for f in diagnosed(model).findings if f.id == "D19" and f.is_alarm]


@pytest.mark.parametrize(("is_new", "expected"), [(True, "info"), (False, "error")])
def test_d07_scales_of_a_new_layer_are_fixed_and_not_frozen(
    expected: str, *, is_new: bool
) -> None:
    model = trained("mlp")
    for norm in norms(model):
        norm.requires_grad_(False)
        if is_new:
            norm.weight.data.fill_(1.0)
            norm.bias.data.zero_()
    found = [f.severity for f in diagnosed(model).findings if f.id == "D07"]
    assert found == [expected]


def test_d12_stands_before_the_statistics_that_padding_spoils() -> None:
    stale = Finding("D01", "stale_statistics", "1", "error")
    gap = Finding("D02", "train_eval_gap", "", "error")
    padding = Finding("D12", "padding_contaminates", "1", "warning")
    assert [(f.id, f.follows) for f in by_cause([stale, gap, padding])] == [
        ("D12", ""),
        ("D01", "D12"),
        ("D02", "D12"),
    ]


def test_d38_explains_gradients_that_do_not_arrive() -> None:
    lost = Finding("D24", "gradients_vanish", "0", "error")
    start = Finding(
        "D38", "post_norm_without_warmup", "0", "warning", details={"is_origin": True}
    )
    assert [(f.id, f.follows) for f in by_cause([lost, start])] == [
        ("D38", ""),
        ("D24", "D38"),
    ]
