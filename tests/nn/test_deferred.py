"""A deferred output stands for its values under everything that may read it."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normkit.nn import BatchNorm2d
from normkit.nn.deferral import ChangedInPlaceError
from normkit.nn.deferred import DeferredTensor


@pytest.fixture(autouse=True)
def small_inputs_are_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normkit.nn.deferral.MIN_VALUES", 0)


class Model(nn.Module):
    """`run(self, y, r)` on the output y of a batch norm, and the input r."""

    def __init__(self, run: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.bn = BatchNorm2d(4)
        self.relu, self.after = nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.run = run
        self.seen: list[type] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        self.seen.append(type(y))
        return self.run(self, y, x)


def pair(run: Callable[[Any, Tensor, Tensor], Tensor]) -> tuple[Model, Model]:
    """The same model with a layer that defers, and one that does not."""
    plain = Model(run).double()
    for p in plain.bn.parameters():
        nn.init.normal_(p)
    deferring = copy.deepcopy(plain)
    deferring.bn.defers = True
    return deferring, plain


def images() -> Tensor:
    return torch.randn(3, 4, 6, 6, dtype=torch.double)


def gradients(model: Model, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    y.backward(dy)  # a reentrant checkpoint refuses autograd.grad
    return [y.detach(), *(t.grad for t in (x, *model.parameters())), *model.buffers()]


def check(run: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    deferring, plain = pair(run)
    x = images()
    for ours, theirs in zip(gradients(deferring, x), gradients(plain, x), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert deferring.seen == [DeferredTensor]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return 2 * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0]


class DoubledInPlace(Doubled):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        y.mul_(2)
        return y


def _hooked(module: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    module.register_full_backward_hook(lambda *_: None)
    return module


def _written(m: Any, y: Tensor, x: Tensor) -> Tensor:
    y.mul_(3)
    return _hooked(m.after)(y)


def _rectified(m: Any, y: Tensor, x: Tensor) -> Tensor:
    F.relu_(y)
    return _hooked(m.after)(y)


def _added_to(m: Any, y: Tensor, x: Tensor) -> Tensor:
    y += x
    return Doubled.apply(y)


def _alias(m: Any, y: Tensor, x: Tensor) -> Tensor:
    alias = y
    y += x
    return m.relu(alias)


def _written_by_a_function(m: Any, y: Tensor, x: Tensor) -> Tensor:
    DoubledInPlace.apply(y)
    return m.relu(y)


READERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "relu": lambda m, y, x: m.relu(y),
    "sum and relu": lambda m, y, x: m.relu(y + x),
    "relu of twice itself": lambda m, y, x: m.relu(y + y),
    "any function": lambda m, y, x: torch.cat([y, x]).sin() * y.mean(),
    "relu and another": lambda m, y, x: m.relu(y) + y.sin(),
    "relu of an alias": _alias,
    "relu of a sum that is added to": lambda m, y, x: m.relu(y + x + x),
    "approximate gelu": lambda m, y, x: F.gelu(y, approximate="tanh"),
    "hook on the activation": lambda m, y, x: _hooked(m.relu)(y),
    "hook on the activation of a sum": lambda m, y, x: _hooked(m.relu)(y + x),
    "hook on what follows": lambda m, y, x: _hooked(m.after)(y),
    "hook after a write": _written,
    "hook after an activation in place": _rectified,
    "autograd function": lambda m, y, x: Doubled.apply(y),
    "autograd function on a sum": lambda m, y, x: Doubled.apply(y + x),
    "autograd function on a sum in place": _added_to,
    "autograd function in place": _written_by_a_function,
    "reentrant checkpoint": lambda m, y, x: checkpoint(m.relu, y, use_reentrant=True),
    "checkpoint": lambda m, y, x: checkpoint(m.relu, y, use_reentrant=False),
    "hook on the tensor": lambda m, y, x: (y.register_hook(lambda g: 2 * g), m.relu(y))[
        1
    ],
    "scripted": lambda m, y, x: torch.jit.script(nn.ReLU())(y),
    "scripted, in place": lambda m, y, x: torch.jit.script(nn.ReLU(True))(y),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("reader", READERS)
def test_values_gradients_and_statistics_are_those_of_the_layer_alone(
    reader: str,
) -> None:
    check(READERS[reader])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_reader_gets_the_values() -> None:
    check(lambda m, y, x: torch.compile(m.relu, backend="aot_eager")(y))
    check(lambda m, y, x: torch.compile(torch.relu, backend="aot_eager")(y + x))


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_an_output_leaves_a_checkpoint_with_its_gradient(is_reentrant: bool) -> None:
    deferring, plain = pair(lambda m, y, x: y)
    x, found = images(), []
    for model in (deferring, plain):
        given = x.clone().requires_grad_()
        y = model.relu(checkpoint(model.bn, given, use_reentrant=is_reentrant))
        y.sin().sum().backward()
        found.append([given.grad, model.bn.weight.grad, *model.bn.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_second_derivatives_go_through_it() -> None:
    def run(m: Any, y: Tensor, x: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(Doubled.apply(y).sin().sum(), x, create_graph=True)
        return dx.square()

    check(run)


def test_an_output_that_nothing_reads_counts_its_batch() -> None:
    deferring, plain = pair(lambda m, y, x: m.relu(x))
    x = images()
    deferring(x), plain(x)
    gc.collect()
    assert int(deferring.bn.num_batches_tracked) == 1
    torch.testing.assert_close(deferring.state_dict(), plain.state_dict())


def test_grad_mode_is_that_of_each_call() -> None:
    deferring, _ = pair(lambda m, y, x: y)
    x, added = images(), images().requires_grad_()
    with torch.no_grad():
        y = deferring.bn(x)
    assert not y.requires_grad
    assert not torch.relu(y).requires_grad
    assert torch.relu(y + added).requires_grad
    y = deferring.bn(x)
    assert y.requires_grad
    with torch.no_grad():
        assert not torch.relu(y).requires_grad
        y += added
    z = torch.relu(y)
    (found,) = torch.autograd.grad(z.sum(), [added], allow_unused=True)
    assert found is None
    assert z.requires_grad


def test_the_state_is_that_of_the_call() -> None:
    layer, x = BatchNorm2d(4).double(), images()
    layer.defers = True
    other = {"weight": torch.full((4,), 3.0).double(), "bias": torch.zeros(4).double()}
    y = torch.func.functional_call(layer, other, (x,))
    layer.eval()
    assert isinstance(y, DeferredTensor)
    wanted = F.batch_norm(x, None, None, other["weight"], other["bias"], True)
    torch.testing.assert_close(torch.relu(y), wanted.relu())


def test_facts_are_told_without_computing() -> None:
    layer, x = BatchNorm2d(4), torch.randn(3, 4, 6, 6)
    layer.defers = True
    y = layer(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    assert (y.device, len(y), y.requires_grad) == (x.device, 3, True)
    assert int(layer.num_batches_tracked) == 0
    y.sum()
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("which", ["input", "weight", "residual", "running mean"])
def test_what_it_needs_changed_in_place_raises(which: str) -> None:
    layer, x, r = BatchNorm2d(4), torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    layer.defers = True
    layer.train(which != "running mean")
    with torch.no_grad():
        y = layer(x) + r
        changed = {
            "input": x,
            "weight": layer.weight,
            "residual": r,
            "running mean": layer.running_mean,
        }
        changed[which].add_(1)  # pyright: ignore[reportOptionalMemberAccess]
        with pytest.raises(ChangedInPlaceError, match="changed in place"):
            y.relu()


def test_layers_that_are_watched_do_not_defer() -> None:
    layer, x = BatchNorm2d(4).double(), images()
    layer.defers = True
    assert type(layer(x, residual=x)) is Tensor
    assert type(torch.func.grad(lambda x: layer(x).sum())(x)) is Tensor
    assert type(layer(x.transpose(2, 3))) is Tensor
    with torch.inference_mode():
        assert type(layer(x + 1)) is Tensor
    seen: list[type] = []
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(type(y)))
    layer(x)
    handle.remove()
    assert seen == [Tensor]
    assert isinstance(layer(x), DeferredTensor)


def test_small_inputs_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = BatchNorm2d(4), torch.randn(3, 4, 6, 6)
    layer.defers = True
    monkeypatch.setattr("normkit.nn.deferral.MIN_VALUES", x.numel() + 1)
    assert type(layer(x)) is Tensor
    layer.memory = "recompute"
    assert isinstance(layer(x), DeferredTensor)
