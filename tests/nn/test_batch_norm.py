"""Batch norm: what must hold for every input, and how its statistics run."""

import math

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
import oracles
from strategies import FILLS, filled

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

RANKS = [1, 2, 3]
SHAPES = {0: (17, 5), 1: (6, 5, 7), 2: (6, 5, 4, 3), 3: (4, 5, 2, 3, 4)}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
EPS32 = torch.finfo(torch.float32).eps


def layer_of(rank: int, channels: int = 5, **kwargs) -> nn.Module:
    return getattr(normkit.nn, f"BatchNorm{max(rank, 1)}d")(channels, **kwargs)


def with_random_state(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer


def laid_out(x: Tensor, is_channels_last: bool) -> Tensor:
    if not is_channels_last:
        return x
    return x.contiguous(memory_format=FORMATS[x.dim() - 2])


def over_all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


layouts = pytest.mark.parametrize(
    ("rank", "is_last"),
    [(0, False), (1, False), (2, False), (2, True), (3, False), (3, True)],
)


@layouts
@pytest.mark.parametrize("fill", FILLS)
def test_outputs_are_those_of_the_definition_however_far_the_mean(
    rank: int, is_last: bool, fill: str
) -> None:
    """2e-6 of max(1, |y|): the numerics contract, in float32, for every fill."""
    x = laid_out(filled(SHAPES[rank], fill, 3, torch.float32), is_last)
    layer = with_random_state(layer_of(rank))
    y = layer(x)
    wanted = oracles.batch_norm(x, layer.weight, layer.bias)
    assert ((y - wanted).abs() <= 2e-6 * wanted.abs().clamp(min=1)).all()


@layouts
def test_gradients_are_those_of_the_definition_under_a_random_cotangent(
    rank: int, is_last: bool
) -> None:
    x = laid_out(filled(SHAPES[rank], "offset", 3, torch.float32), is_last)
    x.requires_grad_()
    layer = with_random_state(layer_of(rank))
    wanted = [x, layer.weight, layer.bias]
    y = layer(x)
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, wanted, dy)
    truth = torch.autograd.grad(
        oracles.batch_norm(x, layer.weight, layer.bias), wanted, dy.double()
    )
    for a, b in zip(found, truth, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("rank", RANKS)
def test_normalized_output_has_mean_0_and_mean_square_var_over_var_plus_eps(
    rank: int,
) -> None:
    x = 3 + 0.01 * torch.randn(SHAPES[rank], dtype=torch.float64)
    layer = layer_of(rank, affine=False, eps=1e-4)
    y = layer(x)
    dims = over_all_but_channels(x)
    var = x.var(dims, correction=0)
    assert (y.mean(dims).abs() < 1e-12).all()
    torch.testing.assert_close(y.square().mean(dims), var / (var + 1e-4))


@pytest.mark.parametrize("rank", RANKS)
def test_an_affine_map_of_the_input_does_not_matter(rank: int) -> None:
    x = torch.randn(SHAPES[rank], dtype=torch.float64)
    layer = with_random_state(layer_of(rank, eps=1e-12).double())
    channels = [1, -1] + [1] * (x.dim() - 2)
    scale = (torch.rand(5, dtype=torch.float64) + 0.5).view(channels)
    shift = torch.randn(5, dtype=torch.float64).view(channels)
    torch.testing.assert_close(layer(scale * x + shift), layer(x))


def test_the_order_of_the_batch_does_not_matter() -> None:
    x, order = torch.randn(8, 5, 3, dtype=torch.float64), torch.randperm(8)
    layer = with_random_state(layer_of(1).double())
    torch.testing.assert_close(layer(x[order]), layer(x)[order])


@layouts
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_follow_the_moving_average(
    rank: int, is_last: bool, momentum: float
) -> None:
    batches = [laid_out(2 + k + torch.randn(SHAPES[rank]), is_last) for k in range(4)]
    layer = with_random_state(layer_of(rank, momentum=momentum))
    mean, var = oracles.running_after(
        layer.running_mean.clone(), layer.running_var.clone(), batches, momentum
    )
    for batch in batches:
        layer(batch)
    bound = 4 * len(batches) * EPS32
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=bound, atol=0)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=bound, atol=0)
    assert int(layer.num_batches_tracked) == 4


def test_without_momentum_every_batch_has_the_same_share() -> None:
    batches = [2 + k + torch.randn(6, 5, 7) for k in range(5)]
    layer = layer_of(1, momentum=None)
    for batch in batches:
        layer(batch)
    means = torch.stack([b.mean((0, 2)) for b in batches])
    variances = torch.stack([b.var((0, 2), correction=1) for b in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    torch.testing.assert_close(layer.running_var, variances.mean(0))
    assert int(layer.num_batches_tracked) == 5


def test_without_momentum_a_bad_batch_takes_no_share() -> None:
    good, bad = torch.randn(6, 5, 7), torch.full((6, 5, 7), math.inf)
    layer = layer_of(1, momentum=None)
    for batch in (good, bad, good[:0], 2 * good):
        layer(batch)
    torch.testing.assert_close(layer.running_mean, 1.5 * good.mean((0, 2)))
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_forward_waits_for_the_device(momentum: float | None) -> None:
    """A fake tensor has no values: reading one on the host would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = normkit.nn.BatchNorm2d(5, momentum=momentum)
        x = torch.randn(4, 5, 3, 3, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        layer.eval()(x)


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_on_a_gpu_never_synchronizes(momentum: float | None) -> None:
    layer = normkit.nn.BatchNorm2d(5, momentum=momentum).cuda()
    x = torch.randn(4, 5, 3, 3, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", RANKS)
def test_a_non_finite_batch_leaves_the_state_alone(rank: int, value: float) -> None:
    """torch#88474: one overflow must not poison eval for ever."""
    x = torch.randn(SHAPES[rank])
    x.view(-1)[3] = value
    layer = with_random_state(layer_of(rank))
    before = {name: b.clone() for name, b in layer.state_dict().items()}
    y = layer(x)
    assert not y[:, 0].isfinite().any()  # the channel is lost, as in torch
    assert y[:, 1:].isfinite().all()
    for name, value_after in layer.state_dict().items():
        assert torch.equal(value_after, before[name]), name
    layer(torch.randn(SHAPES[rank]))
    assert int(layer.num_batches_tracked) == 1
    assert int(layer.skipped) == 1
    assert "1 non-finite batches skipped" in repr(layer)


@pytest.mark.parametrize("rank", RANKS)
def test_an_empty_batch_is_not_a_batch(rank: int) -> None:
    layer = with_random_state(layer_of(rank))
    before = {name: b.clone() for name, b in layer.named_buffers()}
    x = torch.randn((0, *SHAPES[rank][1:]), requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert not layer.weight.grad.any()
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


@layouts
def test_eval_uses_the_running_statistics_alone(rank: int, is_last: bool) -> None:
    x = laid_out(torch.randn(SHAPES[rank]), is_last)
    layer = with_random_state(layer_of(rank)).eval()
    channels = [1, -1] + [1] * (x.dim() - 2)
    mean = layer.running_mean.view(channels)
    var = layer.running_var.view(channels)
    y = (x.double() - mean) / (var.double() + layer.eps).sqrt()
    wanted = y * layer.weight.view(channels) + layer.bias.view(channels)
    assert float((layer(x) - wanted).detach().abs().max()) <= 8 * EPS32


@layouts
def test_in_eval_a_sample_does_not_depend_on_its_batch(
    rank: int, is_last: bool
) -> None:
    """Bitwise, and a batch leaves no trace in the state."""
    x = laid_out(torch.randn(SHAPES[rank]), is_last)
    layer = with_random_state(layer_of(rank)).eval()
    before = {name: b.clone() for name, b in layer.named_buffers()}
    whole = layer(x)
    for k in range(len(x)):
        assert torch.equal(layer(x[k : k + 1]), whole[k : k + 1])
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_without_tracking_eval_uses_the_batch_too() -> None:
    x = torch.randn(6, 5, 7)
    layer = layer_of(1, track_running_stats=False)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert layer.running_mean is None


def test_tracking_switched_off_later_keeps_the_statistics_for_eval() -> None:
    """bn.track_running_stats = False is a freeze that users of torch rely on."""
    x = torch.randn(6, 5, 7)
    for cls in (nn.BatchNorm1d, normkit.nn.BatchNorm1d):
        layer = cls(5)
        layer(x)
        layer.track_running_stats = False
        before = layer.running_mean.clone()
        layer(x + 1)
        assert torch.equal(layer.running_mean, before)
        assert int(layer.num_batches_tracked) == 1
        expected = (x - before.view(1, -1, 1)) / (
            layer.running_var.view(1, -1, 1) + layer.eps
        ).sqrt()
        torch.testing.assert_close(layer.eval()(x), expected)


def test_a_dropped_counter_is_not_needed_with_a_momentum() -> None:
    layer = layer_of(1)
    layer.num_batches_tracked = None
    layer(torch.randn(6, 5, 7))
    assert layer.running_mean.any()


@pytest.mark.parametrize("as_weights", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_masked_positions_do_not_exist(as_weights: bool, training: bool) -> None:
    """Outputs, gradients and statistics are those of the valid values alone."""
    x = torch.randn(6, 5, 7, dtype=torch.float64)
    lengths = torch.tensor([7, 3, 1, 5, 2, 4])
    valid = torch.arange(7) < lengths[:, None]
    x[~valid[:, None].expand_as(x)] = math.nan
    mask = valid[:, None].double() if as_weights else valid[:, None]
    packed = x.transpose(1, 2)[valid]  # (22, 5): the valid values, as (N, C)

    layer = with_random_state(layer_of(1).double()).train(training)
    torch.manual_seed(20150211)
    twin = with_random_state(layer_of(1).double()).train(training)
    twin.load_state_dict(layer.state_dict())
    x, packed = x.requires_grad_(), packed.detach().requires_grad_()
    y, wanted = layer(x, mask=mask), twin(packed)

    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    truth = torch.autograd.grad(
        wanted, [packed, *twin.parameters()], dy.transpose(1, 2)[valid]
    )
    torch.testing.assert_close(y.transpose(1, 2)[valid], wanted)
    torch.testing.assert_close(grads[0].transpose(1, 2)[valid], truth[0])
    torch.testing.assert_close(grads[1:], truth[1:])
    hidden = ~valid[:, None].expand_as(y)
    assert not y[hidden].any()
    assert not grads[0][hidden].any()
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_float32_layer_takes_half_inputs_and_keeps_float32_state(
    dtype: torch.dtype, training: bool
) -> None:
    """Statistics held in half would be off by percents at this offset."""
    x = (50 + torch.randn(64, 5, 9)).to(dtype)
    layer = with_random_state(layer_of(1)).train(training)
    twin = with_random_state(layer_of(1).double()).train(training)
    twin.load_state_dict(layer.state_dict())
    y, wanted = layer(x), twin(x.double())
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    scale = float(wanted.detach().abs().max())
    assert float((y - wanted).detach().abs().max()) <= torch.finfo(dtype).eps * scale
    torch.testing.assert_close(layer.running_var.double(), twin.running_var)


def test_two_forwards_before_one_backward_are_allowed() -> None:
    """torch#175024: GAN and contrastive losses run a layer twice, then go back."""
    layer = with_random_state(layer_of(1).double())
    a, b = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    eval_twin = (layer.eval()(a) * torch.randn(6, 5, 7)).sum()
    loss = eval_twin + sum(
        (layer.train()(v) * torch.randn(6, 5, 7)).sum() for v in (a, b)
    )
    (grad,) = torch.autograd.grad(loss, layer.weight)
    assert grad.isfinite().all()
    assert grad.any()
    assert int(layer.num_batches_tracked) == 2


# torch does not nest forward mode.
@pytest.mark.parametrize(
    "route", ["kernels", "reference", "fixed order"], indirect=True
)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_func_transforms_work_in_training_and_update_once(transform: str) -> None:
    """torch#85533: torch.nn refuses here."""
    layer = with_random_state(layer_of(1, 3).double())
    twin = with_random_state(layer_of(1, 3).double())
    twin.load_state_dict(layer.state_dict())
    x, c = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    found = getattr(torch.func, transform)(lambda x: (layer(x).exp() * c).sum())(x)

    def truth(x: Tensor) -> Tensor:
        return (oracles.batch_norm(x, twin.weight, twin.bias).exp() * c).sum()

    wanted = getattr(torch.func, transform)(truth)(x)
    torch.testing.assert_close(found, wanted)
    twin(x)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
        assert type(a) is Tensor
        assert not a.requires_grad
