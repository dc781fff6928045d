"""Batch norms compute with the activation or sum after them, where one reads them."""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from normkit.bench.steps import resnet
from normkit.convert.fused import fuse
from normkit.errors import ArgumentError
from normkit.nn import BatchNorm2d


class Basic(nn.Module):
    """A residual block that uses one relu twice, as torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Calls(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.act = BatchNorm2d(4), nn.SiLU()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Counting(nn.Module):
    """Gives another output in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


def images() -> Tensor:
    return torch.randn(3, 4, 6, 6)


@contextmanager
def nothing_read_plainly() -> Iterator[None]:
    """Fail where the values of a deferred output are computed without what follows."""

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a deferred output was read before its activation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normkit.nn.deferred._plain_values", refuse)
        yield


def trained(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], dy)]


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.LeakyReLU(0.3), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh()],
    ids=lambda a: type(a).__name__,
)
def test_every_activation_is_fused_with_equal_values_and_gradients(
    activation: nn.Module,
) -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm2d(4), activation))
    plain, x = copy.deepcopy(model), images()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = fuse(model, x)
    assert list(report.fused) == ["1"]
    assert model[2] is activation
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(m.training for m in model.modules())
    with nothing_read_plainly():
        found = gradients(model, x)
    for ours, theirs in zip(found, gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_relu_that_a_block_uses_twice_is_fused_at_both_places() -> None:
    model = trained(nn.Sequential(Basic(), Basic()))
    plain, x = copy.deepcopy(model), images()
    report = fuse(model, x)
    both = {"bn1": "relu", "bn2": "add+relu"}
    assert report.fused == {f"{k}.{n}": act for k in "01" for n, act in both.items()}
    assert not report.left
    assert type(model[0].relu) is nn.ReLU
    with nothing_read_plainly():
        found = gradients(model, x)
    for ours, theirs in zip(found, gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    other = pickle.loads(pickle.dumps(model)).eval()
    assert other[0].bn1.defers
    torch.testing.assert_close(other(x), model.eval()(x))


def _shared(model: Any, x: Tensor) -> Tensor:
    return model.act(model.bn(x)) + model.act(x)


def _input_changed(model: Any, x: Tensor) -> Tensor:
    x = x.clone()
    y = model.bn(x)
    x.mul_(2)
    return model.act(y) + x


def _residual_changed(model: Any, x: Tensor) -> Tensor:
    residual = x.clone()
    y = model.bn(x) + residual
    residual.mul_(2)
    return model.act(y) + residual


def _kept(model: Any, x: Tensor) -> Tensor:
    model.seen = model.bn(x)
    return model.act(model.seen)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.act(y := m.bn(x)) * y, "2 readers"),
        (lambda m, x: m.act(y := m.bn(x)) + y, "returned"),
        (lambda m, x: m.act(m.bn(m.bn(x))), "called 2 times"),
        (lambda m, x: m.act(x), "not called"),
        (lambda m, x: m.act(m.bn(x, residual=x)), "not called"),
        (lambda m, x: m.bn(x), "returned"),
        (_kept, "kept"),
        (lambda m, x: (m.bn(x), m.act(x))[1], "nothing reads"),
        (lambda m, x: m.act(m.bn(x).flatten(1)), "no activation and no plain sum"),
        (lambda m, x: m.act(2 * m.bn(x) + x), "no activation and no plain sum"),
        (lambda m, x: m.act(m.bn(x) + x[:1]), "no activation and no plain sum"),
        (lambda m, x: m.act(y := m.bn(x) + x) + y, "2 readers"),
        (lambda m, x: m.act(m.bn(x) + x + x), "no activation and no plain sum"),
        (lambda m, x: F.gelu(m.bn(x), approximate="tanh"), "no activation"),
        (lambda m, x: m.act(m.bn(x.transpose(2, 3))), "contiguous"),
        (_input_changed, "changed in place"),
        (_residual_changed, "changed in place"),
        (lambda m, x: m.act(m.bn(x)) + m.bn(x), "called 2 times"),
    ],
)
def test_what_cannot_be_fused_is_left_with_the_reason(
    run: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    model, x = trained(Calls(run)), images()
    expected = copy.deepcopy(model)(x)
    report = fuse(model, x)
    assert not report.fused
    assert reason in report.left["bn"]
    assert reason in report.to_text()
    assert not model.bn.defers
    assert torch.equal(model(x), expected)


WAITING = [
    (lambda m, x: F.relu(m.bn(x)), "relu"),
    (lambda m, x: F.leaky_relu(m.bn(x), 0.3), "leaky_relu"),
    (lambda m, x: m.act(m.bn(x)) if x.sum() > -1e9 else x, "silu"),
    (lambda m, x: m.bn(x).sigmoid(), "sigmoid"),
    (_shared, "silu"),
    (lambda m, x: torch.relu(m.bn(x) + x), "add+relu"),
    (lambda m, x: F.relu(x + m.bn(x), inplace=True), "add+relu"),
    (lambda m, x: m.act(torch.add(x, m.bn(x))), "add+silu"),
    (lambda m, x: m.bn(x).add_(x).relu_().flatten(1), "add+relu"),
]


@pytest.mark.parametrize(("run", "took"), WAITING)
@pytest.mark.parametrize("is_large", [True, False])
def test_calls_and_sums_in_a_forward_are_waited_for(
    run: Callable[[Any, Tensor], Tensor], took: str, is_large: bool
) -> None:
    model = trained(Calls(run)).double()
    x = torch.randn(3, 4, 40, 40).double() if is_large else images().double()
    plain = copy.deepcopy(model)
    report = fuse(model, x)
    assert report.fused == {"bn": took}
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


class Branches(nn.Module):
    """Each way through it reads the batch norm differently."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, way: str = "usual") -> Tensor:
        y = self.bn(self.conv(x))
        if x.shape[0] == 1:
            return y
        if way == "twice":
            return self.act(y) + self.head(y)
        if way == "unread":
            return self.act(x)
        if way == "elsewhere":
            return self.act(y) + self.act(self.head(x))
        if way == "other":
            return F.gelu(y, approximate="tanh") - y.mean()
        if self.training:
            return self.head(y)
        return self.act(y)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("way", ["usual", "twice", "unread", "elsewhere", "other"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_way_that_the_example_did_not_take_computes_what_it_did(
    way: str, count: int, is_training: bool
) -> None:
    plain = Branches().double()
    model, x = copy.deepcopy(plain), torch.randn(count, 4, 6, 6).double()
    report = normkit.convert(model, to="normkit", example_inputs=images().double())
    assert report.fused == {"bn": "relu"}
    found = []
    for each in (model, plain):
        each.train(is_training)
        given = x.clone().requires_grad_()
        y = each(given, way)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        assert given.grad is not None
        found.append([y, given.grad, *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    state = model.state_dict()
    torch.testing.assert_close(plain.state_dict(), state, rtol=1e-10, atol=1e-10)


def test_of_a_sum_of_several_batch_norms_the_last_takes_the_others() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = (norm(x * k) for k, norm in enumerate(self.norms, 1))
            return torch.relu(first + second + third)

    model = trained(Branched()).double()
    plain, x = copy.deepcopy(model), images().double()
    report = fuse(model, x)
    assert report.fused == {"norms.2": "add+relu"}
    assert {"is fused into the other" in why for why in report.left.values()} == {True}
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_one_line_exchanges_and_fuses_and_none_is_changed_when_it_fails() -> None:
    def network() -> Any:
        model = nn.Sequential(Basic(), Basic(), nn.Flatten())
        normkit.convert(model, to="torch")
        return model.double()

    x, model = images().double(), network()
    plain = copy.deepcopy(model)
    report = normkit.convert(model, to="normkit", example_inputs=x, memory="recompute")
    assert list(report.fused.values()) == ["relu", "add+relu"] * 2
    assert not report.unfused
    assert "4 of 4 fused" in report.to_text()
    assert model[0].bn1.memory == "recompute"
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    model = nn.Sequential(network(), Counting())
    with pytest.raises(ArgumentError, match="changed the outputs"):
        normkit.convert(model, to="normkit", example_inputs=(x,))
    assert type(model.get_submodule("0.0.bn1")) is nn.BatchNorm2d
    assert type(model.get_submodule("0.0.relu")) is nn.ReLU
    with pytest.raises(ArgumentError, match="belongs to to='normkit'"):
        normkit.convert(model, to="sync", example_inputs=x)
    with pytest.raises(ArgumentError, match="belongs to to='normkit'"):
        normkit.convert(model, to="sync", memory="int8")


def test_torchs_own_layers_are_left() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    assert "not a batch norm of normkit" in fuse(model, images()).left["0"]


def test_hooks_keep_what_they_see() -> None:
    model = nn.Sequential(BatchNorm2d(4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, y: None)
    assert "hook" in fuse(model, images()).left["0"]


def test_a_model_that_gives_other_outputs_is_put_back() -> None:
    model = nn.Sequential(BatchNorm2d(4), nn.ReLU(), Counting())
    with pytest.raises(ArgumentError, match="changed the outputs"):
        fuse(model, images())
    assert not model[0].defers


def test_a_model_that_draws_random_numbers_draws_the_same_ones() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model, state = (
        nn.Sequential(BatchNorm2d(4), nn.ReLU(), Noisy()),
        torch.get_rng_state(),
    )
    assert fuse(model, torch.ones(2, 4, 3, 3)).fused == {"0": "relu"}
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_chains_keep_one_activation_per_layer() -> None:
    layers = [
        m
        for _ in range(4)
        for m in (nn.Conv2d(4, 4, 3, padding=1), BatchNorm2d(4), nn.ReLU())
    ]
    model, x = nn.Sequential(*layers), torch.randn(4, 4, 16, 16)
    with normkit.saved_memory() as plain:
        model(x)
    fuse(model, x)
    with normkit.less_memory(), normkit.saved_memory() as less:
        model(x)
    # The input; then per layer the convolution's output and relu's, or the former.
    one = x.numel() * 4
    assert plain.bytes / one == pytest.approx(1 + 2 * 4, abs=0.12)
    assert less.bytes / one == pytest.approx(1 + 4, abs=0.12)


@pytest.mark.parametrize(("name", "fused"), [("resnet18", 17), ("resnet50", 49)])
def test_whole_networks_fuse_but_for_the_second_operand_of_a_sum(
    name: str, fused: int
) -> None:
    plain = resnet(name, classes=10).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = copy.deepcopy(plain)
    report = normkit.convert(model, to="normkit", example_inputs=x)
    assert len(report.fused) == fused
    assert {"fused into the other" in why for why in report.unfused.values()} == {True}
    cotangent = torch.randn(4, 10, dtype=torch.float64)
    outputs = []
    for net in (plain, model):
        y = net(x)
        y.backward(cotangent)
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    wanted = dict(plain.named_parameters())
    for path, parameter in model.named_parameters():
        size = float(wanted[path].grad.abs().max())
        error = float((parameter.grad - wanted[path].grad).abs().max())
        assert error <= 1e-8 * size, path
    state = dict(plain.named_buffers())
    for path, buffer in model.named_buffers():
        if path in state:
            torch.testing.assert_close(buffer, state[path], rtol=1e-10, atol=1e-12)


def test_the_trial_keeps_no_activations_alive() -> None:
    seen: list[weakref.ref[Tensor]] = []

    class Layer(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            assert not any(ref() is not None for ref in seen[:-1])
            y = super().forward(input)
            seen.append(weakref.ref(y))
            return y

    layers = [m for _ in range(4) for m in (Layer(4, 4, 1), BatchNorm2d(4), nn.ReLU())]
    assert len(fuse(nn.Sequential(*layers), images()).fused) == 4
    assert len(seen) == 8
