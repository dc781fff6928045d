"""Dose curves on a GRU and a transformer: the more of a fault, the worse it reads."""

import pytest
import torch
from torch import nn

from doctor.faults.planting import LOSS, usual
from doctor.models import SEQUENCES, Batches, batches, build, digits
from normkit.doctor import Diagnosis, diagnose


def examined(model: nn.Module, data: Batches | None = None) -> Diagnosis:
    return diagnose(model, data or batches()[:24], LOSS)


def most(diagnosis: Diagnosis, id_: str) -> float:
    return max(f.value for f in diagnosis.readings if f.id == id_)


@pytest.mark.slow
@pytest.mark.parametrize("net", SEQUENCES)
def test_staleness_grows_as_momentum_falls(net: str) -> None:
    doses = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
    found = [examined(usual(net, momentum=m)) for m in doses]
    distances = [most(d, "D01") for d in found]
    assert distances == sorted(distances)
    assert found[0].named == []
    assert found[-1].errors


@pytest.mark.slow
@pytest.mark.parametrize("net", SEQUENCES)
def test_the_variance_falls_as_dropout_rises(net: str) -> None:
    model, ratios = usual(net, dropout=0.1), []
    for p in (0.0, 0.1, 0.3, 0.5, 0.7):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        readings = examined(model).readings
        ratios.append(min(f.value for f in readings if f.id == "D11"))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == 1
    assert ratios[-1] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("net", SEQUENCES)
def test_batches_are_mixed_the_less_the_smaller_the_buffer(net: str) -> None:
    model, (x, y) = usual(net), digits()
    values = []
    for buffer in (1700, 400, 100, 1):
        source = torch.Generator().manual_seed(0)
        waiting, order = [], []
        for index in y.argsort(stable=True).tolist():
            waiting.append(index)
            if len(waiting) >= buffer:
                place = int(torch.randint(len(waiting), (), generator=source))
                order.append(waiting.pop(place))
        mixed = torch.randperm(len(waiting), generator=source)
        order += [waiting[i] for i in mixed.tolist()]
        parts = torch.tensor(order).split(64)
        data = [(x[i], y[i]) for i in parts if len(i) == 64]
        values.append(most(examined(model, data), "D13"))
    assert values == sorted(values)
    assert values[0] < 2.5 < values[-1]


@pytest.mark.slow
def test_padding_shifts_the_more_the_longer_it_is() -> None:
    """What stands behind the end of a sequence, in a transformer."""
    shifts = []
    for share in (0.0, 0.25, 0.5, 0.75):
        model = build("transformer")
        with torch.no_grad():
            model.position.zero_()
        data = []
        for x, y in batches()[:24]:
            rows = x.view(-1, 8, 8).clone()
            rows[:, 8 - round(8 * share) :] = 0
            data.append((rows.flatten(1), y))
        shifts.append(most(examined(model, data), "D12"))
    assert shifts == sorted(shifts)
    assert shifts[0] < 0.02
    assert shifts[-1] > 0.1
