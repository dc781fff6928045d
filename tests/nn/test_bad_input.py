"""Bad input: the error names what arrived, what is required and what to do.

Where torch.nn raises, normkit raises the same type or a subclass of it.
"""

import math
import warnings

import pytest
import torch
from torch import nn

import normkit.nn
from normkit.errors import NormkitError

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

X = torch.randn(4, 3, 5, 5)

# name: constructor arguments, input, words of the message, does torch raise
CASES: dict[str, tuple[str, tuple, dict, torch.Tensor, tuple[str, ...], bool]] = {
    "batch norm, another rank": (
        *("BatchNorm2d", (3,), {}, X[0]),
        *(("got 3D input", "(3, 5, 5)", "(N, C, H, W)", "use BatchNorm1d"), True),
    ),
    "batch norm, a rank of nobody": (
        *("BatchNorm2d", (3,), {}, X[None, None]),
        *(("got 6D input", "(N, C, H, W)", "reshape"), True),
    ),
    "instance norm, another rank": (
        *("InstanceNorm1d", (3,), {}, X),
        *(("got 4D input", "(C, L) or (N, C, L)", "use InstanceNorm2d"), True),
    ),
    "batch norm, other channels": (
        *("BatchNorm2d", (4,), {}, X),
        *(("3 elements", "not 4"), True),
    ),
    "batch norm in eval, other channels": (
        *("BatchNorm2d.eval", (4,), {}, X),
        *(("3 elements", "not 4"), True),
    ),
    "instance norm, other channels": (
        *("InstanceNorm2d", (4,), {"affine": True}, X),
        *(("dim=1", "num_features (4)", "got: 3", "(4, 3, 5, 5)"), True),
    ),
    "group norm, other channels": (
        *("GroupNorm", (3, 6), {}, torch.randn(2, 9, 4)),
        *(("[6]", "[2, 9, 4]"), True),
    ),
    "group norm, indivisible channels": (
        *("GroupNorm", (3, 6), {}, torch.randn(2, 7, 4)),
        *(("num_groups=3", "[2, 7, 4]"), True),
    ),
    "group norm, one dimension": (
        *("GroupNorm", (3, 6), {}, torch.randn(6)),
        *(("at least 2 dimensions", "1", "(N, C, *)"), True),
    ),
    "layer norm, another shape": (
        *("LayerNorm", ((5, 6),), {}, X),
        *(("[5, 6]", "[4, 3, 5, 5]"), True),
    ),
    "rms norm, another shape": (
        *("RMSNorm", (6,), {}, X),
        *(("[6]", "[4, 3, 5, 5]"), True),
    ),
    "batch norm, one value per channel": (
        *("BatchNorm2d", (3,), {}, X[:1, :, :1, :1]),
        *(("more than one value per channel", "(1, 3, 1, 1)", "larger batch"), True),
    ),
    "instance norm, one position": (
        *("InstanceNorm2d", (3,), {}, X[:, :, :1, :1]),
        *(("more than one position", "(4, 3, 1, 1)"), True),
    ),
    "group norm, one value per group": (
        *("GroupNorm", (3, 3), {}, torch.randn(1, 3)),
        *(("more than one value per group", "(1, 3)", "fewer groups"), True),
    ),
    **{
        f"{name}, integers": (
            *(name, arguments, {}, torch.arange(300).view(4, 3, 5, 5)),
            *(("torch.int64", "x.float()"), True),
        )
        for name, arguments in {
            "BatchNorm2d": (3,),
            "BatchNorm2d.eval": (3,),
            "InstanceNorm2d": (3,),
            "GroupNorm": (3, 3),
            "LayerNorm": (5,),
            "RMSNorm": (5,),
        }.items()
    },
    **{
        f"{name}, eps {eps}": (
            *(name, arguments, {"eps": eps}, X),
            *(("eps", str(eps)), eps < 0),
        )
        for name, arguments in {
            "BatchNorm2d": (3,),
            "InstanceNorm2d": (3,),
            "GroupNorm": (3, 3),
            "LayerNorm": (5,),
            "RMSNorm": (5,),
        }.items()
        for eps in (math.nan, math.inf, *((-1.0,) if name == "BatchNorm2d" else ()))
    },
}


IS_PINNED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def raised_by(namespace: object, case: str) -> BaseException | None:
    name, arguments, kwargs, x, _, _ = CASES[case]
    name, _, mode = name.partition(".")
    layer = getattr(namespace, name)(*arguments, **kwargs).train(mode != "eval")
    try:
        layer(x)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_named_with_the_type_of_torch(case: str) -> None:
    words, torch_raises = CASES[case][-2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of mixed dtypes, then raises
        theirs = raised_by(nn, case)
    if IS_PINNED:  # older ones take more
        assert (theirs is not None) == torch_raises
    ours = raised_by(normkit.nn, case)
    assert isinstance(ours, NormkitError)
    if theirs is not None:
        assert isinstance(ours, type(theirs)), f"{type(ours)} is no {type(theirs)}"
    for word in words:
        assert word in str(ours), f"{word!r} is not in {str(ours)!r}"


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_changes_nothing(case: str) -> None:
    name, arguments, kwargs, x, _, _ = CASES[case]
    name, _, mode = name.partition(".")
    cls = getattr(normkit.nn, name)
    layer = cls(*arguments, **kwargs).train(mode != "eval")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(NormkitError):
        layer(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("momentum", [-0.1, 1.5, 9, math.nan])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm3d", "InstanceNorm2d"])
def test_a_momentum_outside_0_to_1_is_refused_at_once(name: str, momentum) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*\[0, 1\].*{momentum}; a decay of"):
        getattr(normkit.nn, name)(3, momentum=momentum)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_a_momentum_set_later_is_refused_in_training_alone(name: str) -> None:
    layer = getattr(normkit.nn, name)(3, track_running_stats=True)
    layer.momentum = 2.0
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\].*got 2.0"):
        layer(X)
    assert not layer.running_mean.any()
    layer.eval()(X)


@pytest.mark.parametrize(("num_groups", "num_channels"), [(0, 6), (-3, 6)])
def test_fewer_groups_than_one_are_refused(num_groups: int, num_channels: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups={num_groups}"):
        normkit.nn.GroupNorm(num_groups, num_channels)


@pytest.mark.parametrize(
    "layer",
    [
        normkit.nn.BatchNorm2d(3),
        normkit.nn.InstanceNorm2d(3),
        normkit.nn.GroupNorm(3, 3),
        normkit.nn.LayerNorm(5),
        normkit.nn.RMSNorm(5),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mask_that_does_not_fit_is_named(layer: nn.Module, training: bool) -> None:
    layer.train(training)
    with pytest.raises(ValueError, match=r"mask of shape \(4, 7\).*\(4, 3, 5, 5\)"):
        layer(X, mask=torch.ones(4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool.*torch.int64.*mask.bool"):
        layer(X, mask=torch.ones(4, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask is a list, but must be a tensor"):
        layer(X, mask=[True, False, True, True])


def test_instance_norm_warns_of_features_that_it_does_not_use() -> None:
    for namespace in (nn, normkit.nn):
        layer = namespace.InstanceNorm2d(4)
        with pytest.warns(
            UserWarning, match="size at dim=1 does not match num_features"
        ):
            layer(X)


@pytest.mark.parametrize("hidden", [-1e9, -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "layer",
    [
        normkit.nn.BatchNorm2d(3),
        normkit.nn.FrozenBatchNorm(3),
        normkit.nn.InstanceNorm2d(3, track_running_stats=True),
        normkit.nn.GroupNorm(3, 3),
        normkit.nn.LayerNorm(5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_negative_or_nan_weight_is_refused_in_both_modes(
    layer: nn.Module, training: bool, hidden: float
) -> None:
    """An additive mask, 0 where a value counts, would hide just those values."""
    mask = torch.zeros(4, 1, 1, 5)
    mask[..., 3:] = hidden
    told = "pass mask == 0" if hidden < 0 else "mask has NaN values"
    with pytest.raises(ValueError, match=told):
        layer.train(training)(X, mask=mask)
