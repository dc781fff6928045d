"""Small batches that stand for a large one: one update, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.errors import ArgumentError
from normkit.nn import (
    BatchNorm1d,
    BatchNorm2d,
    accumulate,
    backward_as_whole,
)

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")


def test_torch_46516_one_update_for_all_parts_of_a_step() -> None:
    x = 3 + 2 * torch.randn(23, 4, 5, dtype=torch.float64)
    theirs = nn.BatchNorm1d(4, dtype=torch.float64)
    whole, ours = (BatchNorm1d(4, dtype=torch.float64) for _ in range(2))
    with accumulate(ours):
        for part in x.split(5):
            theirs(part)
            before = ours.running_mean.clone()
            ours(part)
            assert torch.equal(ours.running_mean, before)
    whole(x)
    assert not torch.allclose(theirs.running_var, whole.running_var, rtol=1e-2)
    torch.testing.assert_close(ours.state_dict(), whole.state_dict())


def test_parts_merge_under_masks_and_ghosts() -> None:
    x = torch.randn(24, 3, 6, dtype=torch.float64)
    mask = torch.rand(24, 1, 6) < 0.7
    layer = BatchNorm1d(3, dtype=torch.float64, ghost_size=4)
    whole = BatchNorm1d(3, dtype=torch.float64)
    with accumulate(layer):
        for part, valid in zip(x.split(8), mask.split(8), strict=True):
            layer(part, mask=valid)
    whole(x, mask=mask)
    torch.testing.assert_close(layer.state_dict(), whole.state_dict())


def test_a_non_finite_part_is_left_out_alone() -> None:
    x = torch.randn(3, 8, 2, dtype=torch.float64)
    layer, others = (BatchNorm1d(2, dtype=torch.float64) for _ in range(2))
    with accumulate(layer):
        for part in (x[0], x[1] * torch.nan, x[2]):
            layer(part)
    others(torch.cat([x[0], x[2]]))
    torch.testing.assert_close(layer.state_dict(), others.state_dict())
    assert int(layer.skipped) == 1


def test_after_an_error_nothing_has_moved_and_nothing_is_left() -> None:
    layer = BatchNorm1d(2)
    before = {k: v.clone() for k, v in layer.state_dict().items()}

    def fails() -> None:
        with accumulate(layer):
            layer(torch.randn(4, 2))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(torch.randn(4, 2))
    assert int(layer.num_batches_tracked) == 1


def test_a_layer_of_torch_and_a_nested_block_are_refused_by_name() -> None:
    with (
        pytest.raises(ArgumentError, match="'0' is BatchNorm1d"),
        accumulate(nn.Sequential(nn.BatchNorm1d(2))),
    ):
        pass
    layer = BatchNorm1d(2)
    with (
        pytest.raises(ArgumentError, match="do not nest"),
        accumulate(layer),
        accumulate(layer),
    ):
        pass


class Masked(nn.Module):
    """Two batch norms, one called twice, one masked; dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.twice, self.masked = BatchNorm1d(4), BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        with torch.no_grad():
            for layer in (self.twice, self.masked):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.drop(self.twice(self.first(x)).tanh())
        h = self.masked(self.second(h), mask=mask)
        return self.twice(h.sin() + h)


def test_the_gradients_of_parts_are_those_of_the_whole() -> None:
    """Without dropout, to 1e-10 in float64, with one layer called twice."""
    model = Masked()
    model.drop.p = 0.0
    x, dy = torch.randn(13, 3).double(), torch.randn(13, 4).double()
    mask = torch.rand(13, 1) < 0.8

    def loss_of(part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (model(part[0], part[1]) * part[2]).sum()

    start = {k: v.clone() for k, v in model.state_dict().items()}
    loss = loss_of((x, mask, dy))
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    once = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    parts = list(zip(x.split(5), mask.split(5), dy.split(5), strict=True))
    found = backward_as_whole(model, parts, loss_of)
    torch.testing.assert_close(found, loss.detach())
    for (name, p), truth in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, truth, rtol=1e-9, atol=1e-10, msg=name)
    torch.testing.assert_close(model.state_dict(), once)


def test_random_numbers_are_drawn_as_in_one_pass() -> None:
    model = Masked()
    x, mask = torch.randn(12, 3).double(), torch.ones(12, 1).bool()
    parts = list(x.split(4))

    def loss_of(part: Tensor) -> Tensor:
        return model(part, mask[:4]).square().sum()

    torch.manual_seed(1)
    for part in parts:
        loss_of(part)
    wanted = torch.rand(())
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(backward_as_whole(model, parts, loss_of))
        assert torch.equal(torch.rand(()), wanted)
    assert torch.equal(*losses)


def test_parts_that_run_other_layers_are_refused() -> None:
    model = nn.Sequential(BatchNorm1d(2), BatchNorm1d(2))
    ran = []

    def loss_of(part: Tensor) -> Tensor:
        ran.append(part)
        return model[len(ran) % 2](part).sum()

    with pytest.raises(ArgumentError, match="same layers"):
        backward_as_whole(model, [torch.randn(4, 2)] * 2, loss_of)
    with pytest.raises(ArgumentError, match="at least one batch"):
        backward_as_whole(model, [], loss_of)
    with pytest.raises(ArgumentError, match="ghost"):
        backward_as_whole(BatchNorm1d(2, ghost_size=2), [1], loss_of)
    assert all(layer._observer is None for layer in model)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_torch_96136_a_checkpoint_moves_the_statistics_once(reentrant: bool) -> None:
    x = torch.randn(6, 2, 3, 3, requires_grad=True)
    for cls, updates in ((nn.BatchNorm2d, 2), (BatchNorm2d, 1)):
        layer: Any = cls(2)
        model = nn.Sequential(nn.Conv2d(2, 2, 1), layer)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert int(layer.num_batches_tracked) == updates
        for extras in ({"ghost_size": 2}, {"debias": True}) if updates == 1 else ():
            layer = BatchNorm2d(2, **extras)
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
            assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize(
    "layer",
    [
        normkit.nn.BatchRenorm1d(3),
        normkit.nn.WhiteningBatchNorm(3),
        normkit.nn.PerActivationBatchNorm(3),
        normkit.nn.RecurrentBatchNorm(3, max_steps=2),
        normkit.nn.InstanceNorm1d(3, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_whose_statistics_cannot_be_collected_is_refused(layer) -> None:
    model = nn.Sequential(BatchNorm1d(3), layer)
    refused = pytest.raises(ArgumentError, match=r"'1' is .* cannot be collected")
    with refused, accumulate(model):
        pass
    with refused:
        backward_as_whole(model, [torch.ones(2, 3)], lambda x: model(x).sum())
    assert model[0]._observer is None


def test_a_domain_moves_once_and_the_others_not_at_all() -> None:
    x = torch.randn(12, 3)
    whole = BatchNorm1d(3)
    layer = normkit.nn.DomainBatchNorm(BatchNorm1d(3), ("day", "night"))
    with accumulate(layer):
        for part in x.split(5):
            layer(part, domain="night")
    whole(x)
    night, day = layer.norms["night"], layer.norms["day"]
    torch.testing.assert_close(night.running_var, whole.running_var)
    assert int(night.num_batches_tracked) == 1
    assert int(day.num_batches_tracked) == 0
