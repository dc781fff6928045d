"""Statistics per named domain: kept apart, chosen for a block, adapted to a new one."""

import copy

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.errors import ArgumentError
from normkit.nn import BatchNorm1d, BatchNorm2d, DomainBatchNorm, use_domain

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

OFFSETS = {"day": 5.0, "night": -3.0}


def of(domain: str, *shape: int) -> Tensor:
    return OFFSETS[domain] + torch.randn(shape)


def layer_of(**kwargs) -> DomainBatchNorm:
    layer = DomainBatchNorm(BatchNorm1d(3, momentum=1.0), ("day", "night"), **kwargs)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


def test_each_domain_has_the_statistics_of_its_batches() -> None:
    layer, alone = layer_of(), {}
    batches = {name: of(name, 16, 3) for name in OFFSETS}
    for name, x in batches.items():
        alone[name] = BatchNorm1d(3, momentum=1.0)
        alone[name].weight, alone[name].bias = (
            layer.norms["day"].weight,
            layer.norms["day"].bias,
        )
        assert torch.equal(layer(x, domain=name), alone[name](x))
    for name in OFFSETS:
        x = of(name, 4, 3)
        assert torch.equal(layer.eval()(x, domain=name), alone[name].eval()(x))


def test_a_shared_affine_is_one_parameter_and_learns_from_all() -> None:
    layer = layer_of()
    assert len([*layer.parameters()]) == 2
    assert layer.norms["day"].weight is layer.norms["night"].weight
    apart = layer_of(shared_affine=False)
    assert len([*apart.parameters()]) == 4
    twin = copy.deepcopy(layer)
    assert twin.norms["day"].weight is twin.norms["night"].weight
    assert twin.norms["day"].weight is not layer.norms["day"].weight


def test_a_block_chooses_the_domain_of_every_layer_and_gives_it_back() -> None:
    model = nn.Sequential(layer_of(), nn.Linear(3, 3), layer_of())
    x = of("night", 16, 3)
    with use_domain(model, "night"):
        y = model(x)
        assert [model[0].domain, model[2].domain] == ["night", "night"]
    assert [model[0].domain, model[2].domain] == ["day", "day"]
    assert not model[2].norms["day"].num_batches_tracked
    assert torch.equal(model[0](x, domain="night"), model[0].norms["night"](x))
    with pytest.raises(ZeroDivisionError), use_domain(model, "night"):
        _ = 1 / 0
    assert model[0].domain == "day"
    assert y.shape == (16, 3)


def test_a_block_refuses_before_it_changes_anything() -> None:
    model = nn.Sequential(layer_of(), layer_of())
    model[0].add_domain("fog")
    with pytest.raises(ArgumentError, match="no domain 'fog'"):  # noqa: SIM117
        with use_domain(model, "fog"):
            pass
    assert model[0].domain == "day"
    with pytest.raises(ArgumentError, match="has none"):  # noqa: SIM117
        with use_domain(nn.Linear(2, 2), "day"):
            pass


def test_a_new_domain_is_adapted_to_by_calibration_alone() -> None:
    """Unlabelled data of the new domain; weights and other domains stay."""
    model = nn.Sequential(nn.Linear(3, 3), layer_of())
    model(of("day", 64, 3))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    model[1].add_domain("fog", like="day")
    start = model[1].norms["fog"].running_mean.clone()
    assert torch.equal(start, before["1.norms.day.running_mean"])
    batches = [100 + torch.randn(32, 3) for _ in range(3)]
    with use_domain(model, "fog"):
        normkit.calibrate(model, batches)
    inner = model[0](torch.cat(batches))
    torch.testing.assert_close(model[1].norms["fog"].running_mean, inner.mean(0))
    for key, tensor in before.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_masks_reach_the_layer() -> None:
    x = torch.randn(4, 3, 7)
    layer = DomainBatchNorm(BatchNorm1d(3), ("day",))
    mask = torch.arange(7) < 4
    y = layer(x, mask=mask)
    assert not y[..., 4:].any()
    torch.testing.assert_close(y[..., :4], layer(x[..., :4]))


def test_the_state_survives_a_round_trip() -> None:
    layer, other = layer_of(), layer_of()
    layer(of("night", 16, 3), domain="night")
    other.load_state_dict(layer.state_dict())
    x = of("night", 4, 3)
    assert torch.equal(other.eval()(x, domain="night"), layer.eval()(x, domain="night"))
    assert other.norms["day"].weight is other.norms["night"].weight


def test_the_mode_is_that_of_the_model_for_a_domain_added_later() -> None:
    layer = layer_of().eval()
    layer.add_domain("fog")
    assert not layer.norms["fog"].training
    assert layer.train().norms["fog"].training
    assert layer.domains == ("day", "night", "fog")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((BatchNorm2d(3, track_running_stats=False), ("a",)), "running statistics"),
        ((nn.LayerNorm(3), ("a",)), "got LayerNorm"),
        ((BatchNorm2d(3), ()), "a sequence of names"),
        ((BatchNorm2d(3), "day"), "a sequence of names"),
        ((BatchNorm2d(3), ("a", "a")), "new name"),
        ((BatchNorm2d(3), ("a.b",)), "without a dot"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(arguments: tuple, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        DomainBatchNorm(*arguments)


def test_an_unknown_domain_lists_the_known() -> None:
    with pytest.raises(ArgumentError, match="only 'day', 'night'; add_domain"):
        layer_of()(torch.randn(4, 3), domain="fog")
