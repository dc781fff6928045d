import copy
import json

import pytest
import torch
from torch import nn

from doctor.models import batches, build, norms, trained
from normkit.doctor import diagnose, explain_gap
from normkit.errors import ArgumentError

LOSS = nn.CrossEntropyLoss()


def state(model: nn.Module) -> list[bytes]:
    return [t.numpy().tobytes() for t in model.state_dict().values()]


@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_the_fix_of_stale_statistics_is_shown_to_help(net: str) -> None:
    model = trained(net, momentum=0.001)
    before = state(model)
    diagnosis = diagnose(model, batches()[:14], LOSS)
    confirmed = diagnosis.confirm()
    assert state(model) == before
    found = {c.id: c for c in confirmed.confirmations}
    assert {"D04", "D01"} <= found.keys()
    assert all(c.helps for c in found.values())
    reached = diagnosis.statistics.evaluation.batch_metric
    assert found["D01"].after > sum(reached) / len(reached) - 0.02
    assert found["D01"].before < found["D01"].after - 0.05
    raised = {f.severity for f in confirmed.readings if f.id == "D03" and f.is_alarm}
    assert raised == {"error"}
    assert "its fix helps" in confirmed.to_text()
    assert json.loads(confirmed.to_json())["confirmations"][0]["helps"] is True


def test_a_warning_whose_fix_does_not_help_stays_a_warning() -> None:
    model = trained("mlp")
    for norm in norms(model).values():
        norm.momentum = 0.6
    diagnosis = diagnose(model, batches()[:14], LOSS)
    assert {f.severity for f in diagnosis.findings if f.id == "D04"} == {"warning"}
    confirmed = diagnosis.confirm()
    assert [c.helps for c in confirmed.confirmations] == [False]
    assert {f.severity for f in confirmed.findings if f.id == "D04"} == {"warning"}


def test_a_model_that_gives_nan_is_cured() -> None:
    model = trained("mlp")
    norms(model)["4"].running_var[:] = float("nan")
    confirmed = diagnose(model, batches()[:14], LOSS).confirm()
    assert confirmed.confirmations[0].id == "D17"
    assert confirmed.confirmations[0].helps


def test_repair_does_what_was_confirmed_and_touches_no_weight() -> None:
    model = trained("mlp", momentum=0.001)
    weights = [p.detach().clone() for p in model.parameters()]
    diagnosis = diagnose(model, batches(), LOSS)
    assert diagnosis.repair()[:2] == ["D04", "D01"]
    assert all(map(torch.equal, weights, model.parameters()))
    assert {norm.momentum for norm in norms(model).values()} == {0.1}
    after = diagnose(model, batches(), LOSS)
    assert after.named == []


def test_dropout_is_off_in_the_statistics_that_its_repair_writes() -> None:
    model = trained("mlp", dropout=0.5)
    diagnosis = diagnose(model, batches()[:14], LOSS)
    assert "D11" in diagnosis.named
    diagnosis.repair()
    layer = next(s for s in diagnosis.statistics.layers if s.name == "5")
    quiet, noisy = layer.norm.without_dropout.pooled, layer.norm.in_training.pooled
    found = norms(model)["5"].running_var.double()
    assert torch.allclose(found, quiet.unbiased_var, rtol=1e-5)
    assert not torch.allclose(found, noisy.unbiased_var, rtol=1e-2)


def test_confirm_needs_a_loss() -> None:
    diagnosis = diagnose(trained("mlp", momentum=0.001), batches()[:8])
    with pytest.raises(ArgumentError, match="loss"):
        diagnosis.confirm()


def test_the_parts_of_the_gap_add_up() -> None:
    model = trained("residual", momentum=0.003)
    before = state(model)
    found = explain_gap(model, batches()[:14])
    assert state(model) == before
    assert found.gap > 0.02
    assert sum(part.value for part in found.causes) == pytest.approx(found.gap)
    stale = next(p for p in found.causes if p.name == "stale statistics")
    layers = sum(part.value for part in found.layers)
    assert layers + found.interaction == pytest.approx(stale.value)
    assert [p.name for p in found.layers] == list(norms(model))
    assert json.dumps(found.to_json(), allow_nan=False)
    assert "interaction" in found.to_text()


def test_the_layer_that_was_broken_is_named() -> None:
    model = trained("mlp")
    norms(model)["7"].running_mean += 3.0
    found = explain_gap(model, batches()[:14])
    assert found.layer.name == "7"
    assert found.cause.name == "stale statistics"
    assert found.layer.value == pytest.approx(found.gap, abs=0.02)
    low, high = found.layer.interval
    assert low > 0.05
    assert high > low


def test_the_start_of_a_short_average_is_told_from_staleness() -> None:
    """With frozen weights the average is cold and not stale."""
    model = trained("mlp")
    for norm in norms(model).values():
        norm.reset_running_stats()
        norm.momentum = 0.02
    model.train()
    with torch.no_grad():
        for x, _ in batches()[:6]:
            model(x)
    for norm in norms(model).values():
        norm.running_mean += 0  # the buffers as six batches left them
    found = explain_gap(model, batches(), lambda out, y: -LOSS(out, y).item())
    assert found.cause.name == "start of the average"
    assert found.cause.value > 0.7 * found.gap
    assert abs(found.causes[1].value) < 0.2 * found.gap


def test_another_domain_is_told_from_stale_statistics() -> None:
    model, train_data = trained("mlp"), batches()[:14]
    darker = [(0.5 * x - 1, y) for x, y in train_data]
    found = explain_gap(model, darker, train_loader=train_data)
    parts = {part.name: part.value for part in found.causes}
    assert sum(parts.values()) == pytest.approx(found.gap)
    assert found.gap > 0.05
    assert found.cause.name == "domain shift"
    assert abs(parts["stale statistics"]) < 0.2 * found.gap
    layers = sum(part.value for part in found.layers)
    assert layers + found.interaction == pytest.approx(parts["stale statistics"])
    for norm in norms(model).values():
        norm.running_mean += 2.0
    found = explain_gap(model, train_data, train_loader=train_data)
    assert found.cause.name == "stale statistics"
    parts = {part.name: part.value for part in found.causes}
    assert parts["domain shift"] == 0


def test_dropout_is_told_from_the_rest() -> None:
    model = trained("mlp", dropout=0.7)
    repaired = diagnose(model, batches(), LOSS)
    for layer, norm in repaired.statistics.norms:
        own = norms(model)[layer.name]
        own.running_mean.copy_(norm.in_training.pooled.mean)
        own.running_var.copy_(norm.in_training.pooled.unbiased_var)
    found = explain_gap(model, batches(), lambda out, y: -LOSS(out, y).item())
    parts = {part.name: abs(part.value) for part in found.causes}
    assert parts["stale statistics"] < 1e-3
    assert parts["start of the average"] < 1e-2
    assert parts["dropout before batch norm"] == max(parts.values())


def test_a_gap_without_a_metric_is_refused() -> None:
    data = [(x, x) for x, _ in batches()[:2]]
    with pytest.raises(ArgumentError, match="metric="):
        explain_gap(build("mlp"), data)


def test_a_repair_that_harms_batches_outside_the_diagnosis_is_declined() -> None:
    model = trained("mlp", 200)
    usual = batches()
    # The running statistics fit the data; those of the examined batches do not.
    bright = [(1.5 * x + 3, y) for x, y in usual[:12]]
    within = diagnose(model, bright, LOSS)
    assert "D01" in within.named
    assert {c.id: c.improves for c in within.confirm().confirmations}["D01"]
    before = copy.deepcopy(model.state_dict())
    beyond = diagnose(model, [*bright, *usual[12:22]], LOSS, max_batches=12)
    assert beyond.named == within.named
    applied = beyond.repair()
    assert list(applied) == []
    assert "D01" in applied.declined
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_batches_held_out_are_read_by_no_pass_of_the_diagnosis() -> None:
    model = trained("mlp", 200)
    poison = [(torch.full_like(x, torch.nan), y) for x, y in batches()[:10]]
    found = diagnose(model, [*batches()[:12], *poison], LOSS, max_batches=12)
    assert found.named == []
    assert found.case is not None
    assert len(found.case.held_out) == 10
