"""Batch renorm: the paper's algorithm, its schedule, and eval mode of batch norm."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
import oracles
from normkit.errors import ArgumentError

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

SHAPES = {1: (6, 3, 5), 2: (6, 3, 4, 5), 3: (6, 3, 2, 3, 4)}
ranks = pytest.mark.parametrize("rank", [1, 2, 3])
AT_ONCE = {"renorm_from": 0, "d_max_at": 0, "r_max_at": 0}


def layer_of(rank: int, **kwargs) -> nn.Module:
    layer = getattr(normkit.nn, f"BatchRenorm{rank}d")(3, **{**AT_ONCE, **kwargs})
    with torch.no_grad():
        layer.running_mean.copy_(torch.randn(3))
        layer.running_var.copy_(torch.tensor([0.01, 1.0, 30.0]))
        if layer.affine:
            layer.weight.copy_(torch.randn(3))
            layer.bias.copy_(torch.randn(3))
    return layer


def truth(x: Tensor, layer: nn.Module, r_max: float = 3.0, d_max: float = 5.0):
    return oracles.batch_renorm(
        *(x, layer.running_mean.clone(), layer.running_var.clone()),
        *(layer.weight, layer.bias, r_max, d_max, layer.eps),
    )


@ranks
def test_outputs_and_gradients_are_those_of_the_definition(rank: int) -> None:
    """The variances are such that r is clipped above, not at all, and below."""
    x = (2 + torch.randn(SHAPES[rank])).requires_grad_()
    layer = layer_of(rank)
    wanted = truth(x, layer)
    y, dy = layer(x), torch.randn(SHAPES[rank])
    assert ((y - wanted).abs() <= 2e-6 * wanted.abs().clamp(min=1)).all()
    inputs = [x, layer.weight, layer.bias]
    found = torch.autograd.grad(y, inputs, dy)
    exact = torch.autograd.grad(wanted, inputs, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


# torch does not nest forward mode.
@pytest.mark.parametrize(
    "route", ["kernels", "reference", "fixed order"], indirect=True
)
def test_gradcheck_where_every_bound_holds() -> None:
    """Clipped, r and d are constants for finite differences too."""
    layer = layer_of(1, r_max=1.01, d_max=0.01).double()
    layer.running_mean.fill_(50)
    layer.running_var.fill_(1e-3)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    layer.momentum = 0.0
    vectors = [layer.weight, layer.bias]
    assert torch.autograd.gradcheck(layer, [x], check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), [x, *vectors])
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), [x, *vectors])


@ranks
def test_training_within_the_bounds_is_eval(rank: int) -> None:
    x = torch.randn(SHAPES[rank])
    layer = layer_of(rank, r_max=1e3, d_max=1e3)
    wanted = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), wanted, rtol=2e-6, atol=1e-5)


def test_eval_is_that_of_batch_norm_and_a_checkpoint_goes_both_ways() -> None:
    x, layer = torch.randn(SHAPES[2]), layer_of(2)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    again = normkit.nn.BatchRenorm2d(3)
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again.eval()(x), plain(x))


def test_running_statistics_move_as_in_batch_norm() -> None:
    x, layer = 3 + torch.randn(SHAPES[1]), layer_of(1, momentum=0.3)
    mean, var = oracles.running_after(
        layer.running_mean.clone(), layer.running_var.clone(), [x], 0.3
    )
    layer(x)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)


def test_it_is_batch_norm_until_the_schedule_begins() -> None:
    x = 5 + torch.randn(SHAPES[1])
    layer = layer_of(1, renorm_from=1, d_max_at=3, r_max_at=5)
    plain = nn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))


def test_the_bounds_grow_linearly_to_their_ends() -> None:
    layer = layer_of(1, renorm_from=10, d_max_at=20, r_max_at=50)
    for batches, r, d in (
        *((0, 1.0, 0.0), (10, 1.0, 0.0), (15, 1.25, 2.5), (20, 1.5, 5.0)),
        *((50, 3.0, 5.0), (99, 3.0, 5.0)),
    ):
        layer.num_batches_tracked.fill_(batches)
        found_r, found_d = layer.limits()
        assert (float(found_r), float(found_d)) == (r, d)


def test_a_wide_bound_makes_small_batches_train_the_network_of_eval() -> None:
    """What the layer is for: batches unlike the data leave the output in place."""
    x = torch.randn(4096, 3)
    outputs = {}
    for name, layer in (
        ("renorm", layer_of(1, momentum=0.0, affine=False)),
        ("batch", normkit.nn.BatchNorm1d(3, affine=False, momentum=0.0)),
    ):
        layer.running_mean.copy_(x.mean(0))
        layer.running_var.copy_(x.var(0))
        trained = torch.cat([layer(part) for part in x.split(4)])
        outputs[name] = (trained - layer.eval()(x)).abs().mean()
    assert outputs["renorm"] < 0.1 * outputs["batch"]


def test_masked_positions_do_not_exist() -> None:
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 5, 3, 4]).view(6, 1, 1)
    layer = layer_of(1).double()
    values = x.transpose(1, 2)[mask.expand(6, 1, 5)[:, 0]]
    wanted = truth(values, layer)
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    torch.testing.assert_close(y.transpose(1, 2)[mask[:, 0].expand(6, 5)], wanted)
    assert not y.masked_select(~mask).any()


def test_a_poisoned_batch_shows_and_leaves_the_state_alone() -> None:
    x, layer = torch.randn(SHAPES[1]), layer_of(1)
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    x[0, 1, 2] = math.inf
    assert layer(x)[:, 1].isnan().any()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert int(layer.skipped) == 1


def test_checkpointing_is_refused_rather_than_wrong() -> None:
    """The second forward would correct by statistics that the first one moved."""
    x, layer = torch.randn(SHAPES[1]).requires_grad_(), layer_of(1)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(ArgumentError, match="leave the layer out"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"r_max": 0.5}, "r_max of at least 1"),
        ({"d_max": -1.0}, "d_max of at least 0"),
        ({"renorm_from": 9, "d_max_at": 5}, "renorm_from"),
        ({"momentum": 1.5}, r"momentum in \[0, 1\]"),
    ],
)
def test_arguments_that_make_no_sense_are_told(arguments: dict, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        normkit.nn.BatchRenorm1d(3, **arguments)


def test_a_wrong_rank_names_the_layer_to_use() -> None:
    with pytest.raises(ArgumentError, match="use BatchRenorm2d"):
        normkit.nn.BatchRenorm1d(3)(torch.randn(2, 3, 4, 4))


def test_bounds_are_as_precise_as_a_float64_input() -> None:
    """1.2 in float32 is off by 4e-8, and so were the outputs at the bound."""
    layer = normkit.nn.BatchRenorm1d(
        1, affine=False, r_max=1.2, d_max=0.3, renorm_from=0, d_max_at=0, r_max_at=0
    )
    x = torch.tensor([[10.0], [30.0]], dtype=torch.float64)
    y = layer.double()(x)
    wanted = 1.2 * (x - 20) / (x.var(0, correction=0) + layer.eps).sqrt() + 0.3
    torch.testing.assert_close(y, wanted, rtol=1e-13, atol=1e-13)


def test_the_gradient_of_a_half_weight_is_rounded_once() -> None:
    """It is a sum over r and one over d, which nearly cancel here."""
    halves = layer_of(1, r_max=3.0, d_max=5.0)
    halves.running_mean.fill_(-4)
    halves.train().to(torch.bfloat16)
    exact = copy.deepcopy(halves).double()
    for name in ("running_mean", "running_var"):
        getattr(exact, name).copy_(getattr(halves, name))
    x = torch.randn(64, 3, 4).to(torch.bfloat16)
    centred = x.double() - x.double().mean((0, 2), keepdim=True)
    # r is about 1 and d is 4.
    dy = (1 - 4 * centred / centred.std((0, 2), keepdim=True)).to(torch.bfloat16)
    (found,) = torch.autograd.grad(halves(x), [halves.weight], dy)
    (wanted,) = torch.autograd.grad(exact(x.double()), [exact.weight], dy.double())
    allowed = 0.51 * torch.finfo(torch.bfloat16).eps * wanted.abs() + 1e-2
    assert ((found.double() - wanted).abs() <= allowed).all()
