"""Each planted fault is named first or second, its clean twin is silent."""

import copy

import pytest
import torch
from torch import nn

from doctor.models import NETS, batches, build, norms, train, trained
from normkit.doctor import Diagnosis, diagnose, watch

LOSS = nn.CrossEntropyLoss()
# The first seed is that of test_faults.py.
OTHER_SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)]


def examined(model: nn.Module, **options: object) -> Diagnosis:
    return diagnose(model, batches()[:14], LOSS, **options)


def worst(diagnosis: Diagnosis, id_: str) -> float:
    values = [f.value for f in diagnosis.readings if f.id == id_]
    return max(values)


@pytest.mark.parametrize("seed", [0, *OTHER_SEEDS])
@pytest.mark.parametrize("net", NETS)
def test_a_healthy_network_is_clear(net: str, seed: int) -> None:
    # At 120 steps the weights of some seeds still move, and D02 rightly says so.
    diagnosis = examined(trained(net, 200, seed=seed))
    assert diagnosis.named == []
    assert {f.id for f in diagnosis.clear} >= {"D01", "D02", "D03", "D04", "D24"}


@pytest.mark.parametrize("seed", OTHER_SEEDS)
@pytest.mark.parametrize("net", NETS)
def test_statistics_of_older_weights_are_stale(net: str, seed: int) -> None:
    model = trained(net, seed=seed)
    old = trained(net, 4, seed=seed)
    for name, norm in norms(model).items():
        norm.running_mean.copy_(norms(old)[name].running_mean)
        norm.running_var.copy_(norms(old)[name].running_var)
    diagnosis = examined(model)
    assert diagnosis.named[0] == "D01"
    assert set(diagnosis.named) <= {"D01", "D02"}
    assert diagnosis.findings[0].severity == "error"


@pytest.mark.parametrize("seed", OTHER_SEEDS)
@pytest.mark.parametrize("net", NETS)
def test_a_short_training_leaves_the_average_cold(net: str, seed: int) -> None:
    """An alarm where it has learned by then, information where it has just begun."""
    diagnosis = examined(trained(net, 12, seed=seed))
    told = [f.id for f in diagnosis.findings if f.is_alarm or not diagnosis.named]
    assert "D03" in told[:2]
    assert set(diagnosis.named) <= {"D01", "D02", "D03"}


@pytest.mark.parametrize("seed", OTHER_SEEDS)
@pytest.mark.parametrize("net", NETS)
def test_a_momentum_of_the_other_convention_is_named(net: str, seed: int) -> None:
    diagnosis = examined(trained(net, seed=seed, momentum=0.001))
    assert diagnosis.named[:2] == ["D04", "D01"]
    assert set(diagnosis.named) <= {"D01", "D02", "D03", "D04"}
    assert diagnosis.findings[0].layers == tuple(norms(build(net)))


def test_a_momentum_that_forgets_at_once_is_named() -> None:
    diagnosis = examined(trained("mlp", size=16, momentum=0.99))
    assert diagnosis.named[0] == "D04"
    assert "are those of the last batch" in diagnosis.findings[0].evidence
    assert "momentum=0.01" in diagnosis.findings[0].fix


def test_a_small_momentum_that_has_arrived_is_no_warning() -> None:
    model = trained("mlp", momentum=0.1)
    for norm in norms(model).values():
        norm.momentum = 0.003
        norm.num_batches_tracked.fill_(2000)
    diagnosis = examined(model)
    assert diagnosis.named == []
    assert {f.severity for f in diagnosis.readings if f.id == "D04"} == {"info"}


def test_staleness_grows_as_momentum_falls() -> None:
    readings = [
        examined(trained("mlp", momentum=m), checks_to_run=["D01", "D02"])
        for m in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
    ]
    distances = [worst(r, "D01") for r in readings]
    assert distances == sorted(distances)
    severities = [
        "error" if r.errors else "warning" if r.warnings else "clear" for r in readings
    ]
    order = ("clear", "warning", "error")
    assert severities == sorted(severities, key=order.index)
    assert severities[0] == "clear"
    assert severities[-1] == "error"


def saturated(gain: float, *, normalized: bool, act: type) -> nn.Module:
    model = build("mlp", act=act, normalized=normalized, width=64)
    with torch.no_grad():
        for module in model[:-1]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                module.weight *= gain
    return model


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_large_weights_saturate_and_batch_norm_prevents_it(act: type) -> None:
    gain = {nn.Sigmoid: 16.0, nn.Tanh: 6.0}[act]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sick = saturated(gain, normalized=False, act=act)
        twin = saturated(gain, normalized=True, act=act)
    steps = [train(model, 40, lr=0.1) for model in (sick, twin)]
    assert steps
    found = examined(sick)
    assert "D20" in found.named[:2]
    assert set(found.named) <= {"D20", "D24"}
    healthy = examined(twin)
    assert not {"D20", "D22", "D24"} & set(healthy.named)


def test_saturation_grows_with_the_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = saturated(1.0, normalized=False, act=nn.Tanh)
    shares = []
    for gain in (0.5, 1, 2, 4, 8, 16):
        model = copy.deepcopy(start)
        with torch.no_grad():
            for module in model[:-1]:
                if isinstance(module, nn.Linear):
                    module.weight *= gain
        readings = examined(model, checks_to_run=["D20"]).readings
        shares.append(sum(f.value for f in readings) / len(readings))
    assert shares == sorted(shares)
    assert shares[1] < 0.4 < 0.6 < shares[-1]


def rescaled(net: str, gain: float, *, normalized: bool) -> nn.Module:
    """A deep tanh network whose weights have `gain` times Xavier's size."""
    act = nn.Tanh
    model = build(net, act=act, depth=6, normalized=normalized, width=None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain)
                nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_small_weights_make_activations_vanish(net: str) -> None:
    found = examined(rescaled(net, 0.3, normalized=False))
    assert found.named[0] == "D22"
    assert set(found.named) <= {"D22", "D24"}
    twin = rescaled(net, 0.3, normalized=True)
    train(twin, 40)
    assert not {"D20", "D22", "D24"} & set(examined(twin).named)


def test_activations_shrink_with_the_weights() -> None:
    ratios = [
        worst(examined(rescaled("mlp", gain, normalized=False)), "D22")
        for gain in (1.0, 0.8, 0.6, 0.4, 0.2)
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 0.2 > 0.02 > ratios[-1]


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_a_deep_sigmoid_network_loses_its_gradients(net: str) -> None:
    sick = build(net, act=nn.Sigmoid, depth=6, normalized=False)
    train(sick, 20)
    found = examined(sick)
    assert found.named[0] == "D24"
    # D34: it has learned nothing.
    assert set(found.named) <= {"D22", "D24", "D34"}
    twin = build(net, act=nn.Sigmoid, depth=6)
    train(twin, 40)
    assert not {"D20", "D22", "D24"} & set(examined(twin).named)


def test_gradients_vanish_with_depth() -> None:
    ratios = [
        worst(
            examined(build("mlp", act=nn.Sigmoid, depth=depth, normalized=False)), "D24"
        )
        for depth in (3, 4, 6, 8)
    ]
    assert ratios == sorted(ratios, reverse=True)


def test_watching_names_what_a_diagnosis_would() -> None:
    model = build("mlp", act=nn.Sigmoid, depth=6, normalized=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    with watch(model, optimizer, every=2) as seen:
        train(model, 20, optimizer=optimizer)
    found = [f for f in seen.findings() if f.id == "D24"]
    assert {f.severity for f in found} == {"error", "warning"}
    assert any("of their weight in a step" in f.evidence for f in found)
