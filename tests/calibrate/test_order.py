"""Eval order: each layer measured on what earlier layers output in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrate.models import FAMILIES, ConvNet, images, scrambled
from normkit.calibrate import calibrate
from normkit.errors import ArgumentError


def inputs_in_eval(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """What reaches each batch norm of a model in eval mode."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen.setdefault(name, []).append(args[0].clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    model.eval()
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def gaps(model: nn.Module, data: list[Tensor]) -> list[float]:
    """|running − true| per layer, on the inputs that eval mode gives it."""
    found = []
    for name, x in inputs_in_eval(model, data).items():
        module = model.get_submodule(name)
        flat = x.double().transpose(0, 1).flatten(1)
        mean = (flat.mean(1) - module.running_mean).abs() / flat.std(1)  # type: ignore[operator]
        var = (flat.var(1) / module.running_var).log().abs()  # type: ignore[operator]
        found.append(float(torch.maximum(mean, var).max()))
    return found


@pytest.mark.parametrize("mode", ["exact", "average"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eval_order_fits_what_eval_mode_feeds_each_layer(
    family: Any, mode: str
) -> None:
    """Small batches: earlier layers' batch noise makes the train order miss here."""
    model = scrambled(ConvNet(family))
    data = images(*[2] * 12)
    calibrate(model, data, order="train")
    assert gaps(model, data)[1] > 0.02
    scrambled(model)  # or the first layer would have its statistics already
    report = calibrate(model, data, order="eval", mode=mode)
    if mode == "exact":
        assert max(gaps(model, data)) < 1e-5
    else:
        # The average leaves the variance between batches out, so it cannot fit.
        assert gaps(model, data)[0] > 1e-3
    assert report.order == "eval"
    assert [layer.name for layer in report.layers] == ["bn1", "bn2"]


class Residual(nn.Module):
    """Modules in another order than they run, a branch, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(4)
        self.side = nn.BatchNorm1d(4)
        self.twice = nn.BatchNorm1d(4)
        self.first = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.twice(self.linear(x).tanh())
        h = self.twice(h.tanh())
        return self.last(h + self.side(x.square()))


def test_eval_order_is_that_of_the_calls_not_of_the_modules() -> None:
    model = scrambled(Residual())
    data = [torch.randn(3, 4) * 2 + 1 for _ in range(10)]
    calibrate(model, data, order="eval")
    fits = dict(
        zip(inputs_in_eval(model, data), gaps(model, data), strict=True),
    )
    # The layer that runs twice feeds itself; no statistics need fit both.
    fits.pop("twice")
    assert set(fits) == {"first", "side", "last"}
    assert max(fits.values()) < 1e-5


def test_eval_order_leaves_forward_once_the_layer_is_measured() -> None:
    model = scrambled(ConvNet())
    runs = [0]
    model.head.register_forward_hook(lambda m, i, o: runs.__setitem__(0, runs[0] + 1))
    calibrate(model, images(2, 2), order="eval")
    assert runs[0] == 2  # the first pass alone goes to the end


def test_eval_order_uses_the_kept_share_that_eval_will_use() -> None:
    model = scrambled(ConvNet())
    data = images(6, 6)
    calibrate(model, data, order="eval", keep=0.5)
    inputs = inputs_in_eval(model, data)["bn2"]
    report = calibrate(model, data, layers=["bn2"], order="eval")
    torch.testing.assert_close(
        report.layers[0].mean.float(), inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-4
    )


def test_an_iterator_cannot_be_gone_through_twice() -> None:
    def once() -> Iterator[Tensor]:
        yield torch.randn(4, 2)

    with pytest.raises(ArgumentError, match="ends after one"):
        calibrate(nn.BatchNorm1d(2), once(), order="eval")
