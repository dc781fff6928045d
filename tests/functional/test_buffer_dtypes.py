"""Running statistics and counters of any dtype: right, or refused and left as they are.

Native kernels read them by address, so each lies between neighbours that must stay.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
import oracles
from normkit.functional import signature
from normkit.nn import BatchNorm1d, InstanceNorm1d

CHANNELS, RATE = 3, 0.25
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
COUNTERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, *FLOATS)
REFUSALS = (normkit.errors.NormkitError, RuntimeError)


class Beside:
    """A buffer between neighbours of its own dtype."""

    def __init__(self, values: Any, dtype: torch.dtype) -> None:
        values = torch.as_tensor(values)
        self.memory = torch.ones(3 * values.numel(), dtype=dtype)
        self.buffer = self.memory.view(3, -1)[1].view(values.shape)
        self.buffer.copy_(values)
        self.before = self.memory.clone()

    def assert_neighbours_kept(self) -> None:
        memory, before = self.memory.view(3, -1), self.before.view(3, -1)
        assert torch.equal(memory[::2], before[::2]), "a neighbour is written"

    def assert_kept(self) -> None:
        assert torch.equal(self.memory, self.before), "it was refused, and written"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape) + torch.arange(CHANNELS).view(CHANNELS, 1) * 2


def batch_norm(x: Tensor, mean: Any, var: Any, count: Any, **options: Any) -> Tensor:
    return normkit.functional.batch_norm(
        *(x, mean, var), training=True, momentum=RATE, num_batches_tracked=count,
        **options,
    )  # fmt: skip


def _masked(x: Tensor, *buffers: Any) -> Tensor:
    return batch_norm(x, *buffers, mask=torch.ones(x.shape, dtype=torch.bool))


def _weighted(x: Tensor, *buffers: Any) -> Tensor:
    return batch_norm(x, *buffers, mask=torch.ones(x.shape))


def _reference(x: Tensor, *buffers: Any) -> Tensor:
    with normkit.backend("reference"):
        return batch_norm(x, *buffers)


def _recorded(x: Tensor, *buffers: Any) -> Tensor:
    return batch_norm(x.clone().requires_grad_(), *buffers).detach()


def _transformed(x: Tensor, *buffers: Any) -> Tensor:
    return torch.func.vjp(lambda x: batch_norm(x, *buffers), x)[0]


def _layer(x: Tensor, mean: Any, var: Any, count: Any, **options: Any) -> Tensor:
    layer = BatchNorm1d(CHANNELS, momentum=RATE, affine=False, **options)
    layer.running_mean, layer.running_var = mean, var
    layer.num_batches_tracked = count
    return layer(x)


def _deferred(x: Tensor, *buffers: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normkit.nn.deferral.MIN_VALUES", 0)
        patch.setattr(BatchNorm1d, "defers", True)
        y = _layer(x, *buffers)
        torch.relu(y)
        return y + 0


def _instances(x: Tensor, mean: Any, var: Any, count: Any) -> Tensor:
    return normkit.functional.instance_norm(
        x, mean, var, momentum=None, num_batches_tracked=count
    )


def _updated(x: Tensor, mean: Any, var: Any, count: Any) -> Tensor:
    y, measured = normkit.functional.normalize(x, (0, 2))
    normkit.functional.update_running(
        mean, var, measured, RATE, num_batches_tracked=count
    )
    return y


ROUTES: dict[str, Callable[..., Tensor]] = {
    "native": batch_norm,
    "recorded": _recorded,
    "masked": _masked,
    "weighted": _weighted,
    "reference": _reference,
    "torch.func": _transformed,
    "layer": _layer,
    "recompute": lambda *given: _layer(*given, memory="recompute"),
    "ghosts": lambda *given: _layer(*given, ghost_size=2),
    "debiased": lambda *given: _layer(*given, debias=True),
    "biased": lambda *given: _layer(*given, estimator="biased"),
    "running": lambda *given: _layer(*given, on_small_batch="running"),
    "deferred": _deferred,
    "instances": _instances,
    "update_running": _updated,
}


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    signature.calls.clear()
    yield
    signature.calls.clear()


def expected(route: str, x: Tensor, mean: Tensor, var: Tensor) -> Any:
    if route == "instances":
        batch_var, batch_mean = torch.var_mean(x.double(), 2)
        rate = 1 / 6
        batch = batch_mean.mean(0), batch_var.mean(0)
        pairs = zip((mean, var), batch, strict=True)
        return tuple((1 - rate) * old.double() + rate * new for old, new in pairs)
    rate = RATE
    if route == "debiased":
        rate = RATE / (1 - (1 - RATE) ** 6)
    wanted = oracles.running_after(mean, var, [x], rate)
    if route == "biased":
        count = x.numel() // CHANNELS
        batch = torch.var(x.double(), (0, 2), correction=0)
        assert count > 1
        wanted = wanted[0], (1 - rate) * var.double() + rate * batch
    return wanted


def _check(route: str, of_mean: Any, of_var: Any, of_count: Any) -> bool:
    """Run; what is not refused is right, what is refused is as it was."""
    x = draw(4, CHANNELS, 5)
    run = ROUTES[route]
    held = (
        Beside([0.5, 1.0, 2.0], of_mean),
        Beside([1.0, 2.0, 1.5], of_var),
        Beside(5, of_count),
    )
    mean, var, count = (each.buffer for each in held)
    old = mean.clone(), var.clone()
    counted = int(count.float()) + 1
    try:
        y = run(x, mean, var, count)
    except REFUSALS:
        for each in held:
            each.assert_kept()
        return False
    for each in held:
        each.assert_neighbours_kept()
    dims = (2,) if route == "instances" else (0, 2)
    if route != "ghosts":
        exact = oracles.normalized(x, dims)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert int(count) == counted, f"{route}: counts {int(count)}"
    for found, before, wanted in zip(
        (mean, var), old, expected(route, x, *old), strict=True
    ):
        if not found.dtype.is_floating_point:
            raise AssertionError(f"{route}: {found.dtype} was taken for an average")
        eps = max(torch.finfo(found.dtype).eps, 1e-6)
        gap = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert gap <= eps, f"{route}: off by {float(gap):.1e}, was {before}"
    return True


@pytest.mark.parametrize("route", ROUTES)
def test_buffers_of_every_dtype_are_right_or_refused_and_left(route: str) -> None:
    taken = set()
    for of_mean, of_var in itertools.product((*FLOATS, *OTHERS), repeat=2):
        for before in (None, (torch.float32, torch.float32)):
            signature.calls.clear()
            if before is not None:  # a call that is remembered reads other buffers
                assert _check(route, *before, torch.int64)
            if _check(route, of_mean, of_var, torch.int64):
                taken.add((of_mean, of_var))
    assert taken == set(itertools.product(FLOATS, repeat=2))


@pytest.mark.parametrize("route", ROUTES)
def test_counters_of_every_dtype_are_right_or_refused_and_left(route: str) -> None:
    for dtype in COUNTERS:
        for before in (None, torch.int64):
            signature.calls.clear()
            if before is not None:
                assert _check(route, torch.float32, torch.float32, before)
            is_taken = _check(route, torch.float32, torch.float32, dtype)
            assert is_taken == (dtype == torch.int64), f"{dtype}: {is_taken}"


def _recurrent() -> Any:
    return normkit.nn.RecurrentBatchNorm(CHANNELS, 4, affine=False)


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "per activation": (lambda: normkit.nn.PerActivationBatchNorm((3, 5)), (4, 3, 5)),
    "recurrent": (_recurrent, (4, 6, 3)),
    "whitening": (lambda: normkit.nn.WhiteningBatchNorm(4), (9, 4, 5)),
    "renorm": (lambda: normkit.nn.BatchRenorm1d(3), (4, 3, 5)),
    "instance": (lambda: InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "average": (
        lambda: InstanceNorm1d(3, momentum=None, track_running_stats=True),
        (4, 3, 5),
    ),
    "sync": (lambda: normkit.nn.SyncBatchNorm(3), (4, 3, 5)),
    "domain": (
        lambda: normkit.nn.DomainBatchNorm(BatchNorm1d(3), ("a",)).norms["a"],
        (4, 3, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_buffers_of_every_dtype_or_refuse_and_leave_them(name: str) -> None:
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    taken = set()
    for buffer, before in make().named_buffers():
        counts = buffer.startswith("num_")
        for dtype in COUNTERS if counts else (*FLOATS, *OTHERS):
            plain, layer = make(), make()
            held = Beside(before, dtype)
            setattr(layer, buffer, held.buffer)
            others = {k: v.clone() for k, v in layer.named_buffers() if k != buffer}
            wanted = plain(x)
            try:
                y = layer(x)
            except normkit.errors.NormkitError:
                held.assert_kept()
                state = dict(layer.named_buffers())
                assert all(torch.equal(state[k], v) for k, v in others.items())
                continue
            taken.add((counts, dtype))
            held.assert_neighbours_kept()
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
            found = dict(layer.named_buffers())
            for key, value in plain.named_buffers():
                eps = 1e-6
                if found[key].dtype.is_floating_point:
                    eps = max(torch.finfo(found[key].dtype).eps, eps)
                gap = (found[key].double() - value.double()).abs().max()
                assert gap <= eps * value.double().abs().max().clamp(min=1), key
    assert {dtype for counts, dtype in taken if not counts} == set(FLOATS)
    if name != "instance":  # whose counter nothing reads, as torch's
        assert {dtype for counts, dtype in taken if counts} == {torch.int64}
