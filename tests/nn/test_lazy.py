"""Layers that take the number of channels from their first input."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import normkit.nn

SHAPES = {1: (4, 3, 7), 2: (4, 3, 5, 4), 3: (4, 3, 2, 3, 4)}
each_lazy = pytest.mark.parametrize(
    ("family", "rank"),
    [(f, r) for f in ("BatchNorm", "InstanceNorm") for r in (1, 2, 3)],
)


def lazy(family: str, rank: int, **kwargs) -> nn.Module:
    kwargs = {"affine": True, "track_running_stats": True, **kwargs}
    return getattr(normkit.nn, f"Lazy{family}{rank}d")(**kwargs)


@each_lazy
@pytest.mark.parametrize("bias", [True, False])
def test_the_first_forward_makes_it_the_layer_itself(
    family: str, rank: int, bias: bool
) -> None:
    layer, x = lazy(family, rank, momentum=0.3, bias=bias), torch.randn(SHAPES[rank])
    theirs = getattr(nn, f"Lazy{family}{rank}d")
    assert isinstance(layer, theirs)
    assert layer.has_uninitialized_params()
    y = layer(x)
    eager_class = getattr(normkit.nn, f"{family}{rank}d")
    assert type(layer) is eager_class
    eager = eager_class(
        3, momentum=0.3, affine=True, track_running_stats=True, bias=bias
    )
    torch.testing.assert_close(y, eager(x))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert repr(layer) == repr(eager)


@each_lazy
def test_a_wrong_first_input_leaves_it_lazy(family: str, rank: int) -> None:
    layer = lazy(family, rank)
    with pytest.raises(ValueError, match=r"expected .* input"):
        layer(torch.randn(2, 3, 4, 4, 4, 4))
    assert layer.has_uninitialized_params()
    layer(torch.randn(SHAPES[rank]))
    assert layer.num_features == 3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_sample_without_its_batch_dimension_has_its_channels_first(
    rank: int,
) -> None:
    """In torch the second dimension becomes num_features, whatever it is."""
    layer = lazy("InstanceNorm", rank)
    layer(torch.randn(SHAPES[rank][1:]))
    assert layer.num_features == 3


def test_the_first_forward_may_carry_a_mask() -> None:
    x = torch.randn(4, 3, 7)
    x[..., 5:] = math.nan
    y = lazy("BatchNorm", 1)(x, mask=torch.arange(7) < 5)
    assert y.isfinite().all()


@each_lazy
def test_it_loads_a_checkpoint_before_its_first_input(family: str, rank: int) -> None:
    eager = getattr(nn, f"{family}{rank}d")(3, affine=True, track_running_stats=True)
    with torch.no_grad():
        eager.weight.uniform_()
        eager.running_mean.uniform_()
    layer = lazy(family, rank)
    assert not any(layer.load_state_dict(eager.state_dict()))
    x = torch.randn(SHAPES[rank])
    torch.testing.assert_close(layer.eval()(x), eager.eval()(x))
    assert layer.num_features == 3


@each_lazy
def test_without_state_it_learns_its_features_too(family: str, rank: int) -> None:
    layer = lazy(family, rank, affine=False, track_running_stats=False)
    layer(torch.randn(SHAPES[rank]))
    assert layer.num_features == 3
    layer(torch.randn(SHAPES[rank]))  # and does not warn of 0 any more


@each_lazy
def test_it_is_copied_and_pickled_while_lazy(family: str, rank: int) -> None:
    layer = lazy(family, rank)
    twins = [pickle.loads(pickle.dumps(layer))]
    # torch's uninitialized buffers, unlike its parameters, cannot be deep-copied.
    twins.append(copy.deepcopy(lazy(family, rank, track_running_stats=False)))
    for twin in twins:
        assert twin.has_uninitialized_params()
        twin(torch.randn(SHAPES[rank]))
        assert twin.num_features == 3
    assert layer.has_uninitialized_params()
