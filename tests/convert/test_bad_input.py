"""What a user gets wrong is named, with what arrived; and a fused model goes back."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.convert import convert, run
from normkit.errors import ArgumentError


class Block(nn.Module):
    """One relu twice, a sum written out, and a hidden leaky relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv(x)))
        y = self.bn2(self.conv(y))
        y += x
        return self.leaky(self.bn3(self.conv(self.relu(y)))).flatten(1)


def network() -> Any:
    model = nn.Sequential(Block()).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def images() -> Tensor:
    return torch.randn(3, 4, 6, 6, dtype=torch.float64)


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad(y, [x, *model.parameters()], dy)
    return [y, *grads, *(b.clone() for b in model.buffers() if b.is_floating_point())]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.randn(2, 5, 8, 8).double(), r"torch.float64 \(2, 5, 8, 8\) on cpu"),
        (torch.randn(2, 4, 8, 8), "gave RuntimeError"),
        ({"images": images()}, "images=torch.float64"),
        ([images()], r"model\(list\) gave"),
        ((images(), 3), r"on cpu, int\) gave TypeError"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_shown_with_its_error(
    given: Any, words: str
) -> None:
    model = network()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ArgumentError, match=words) as caught:
        convert(model, to="normkit", example_inputs=given)
    assert "must be what the model is called with" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert [type(m) for m in model.modules()] == before
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_a_model_without_values_is_exchanged_and_not_fused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ArgumentError, match=r"meta device.*'0.weight'"):
        convert(model, to="normkit", example_inputs=torch.randn(2, 4, 3, 3))
    assert len(convert(model, to="normkit").layers) == 1
    assert model[0].weight.is_meta


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("resnet18", {"to": "sync"}, "got <class 'str'> for the model"),
        (nn.BatchNorm2d, {"to": "sync"}, "got the class BatchNorm2d"),
        (nn.BatchNorm2d(4).state_dict(), {"to": "sync"}, "no state_dict"),
        (nn.BatchNorm2d(4), {"to": "ghost", "ghost_size": 0}, "ghost_size=0 must"),
        (nn.BatchNorm2d(4), {"to": "ghost", "ghost_size": "4"}, "ghost_size='4' must"),
        (nn.BatchNorm2d(4), {"to": "group", "num_groups": 0}, "num_groups=0 must"),
        (nn.BatchNorm2d(4), {"to": "sync", "num_groups": 4}, "num_groups=4 belongs"),
        (nn.BatchNorm2d(4), {"to": "group", "batches": torch.ones(2, 4)}, "in a list"),
    ],
)
def test_what_is_no_model_and_no_option_is_refused(
    model: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArgumentError, match=words):
        convert(model, **options)


def test_backward_hooks_see_what_they_saw() -> None:
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Flatten()]
    model: Any = nn.Sequential(*layers).double()
    plain = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {"ours": [], "plain": []}
    for name, net in (("ours", model), ("plain", plain)):
        for k in (1, 5):
            net[k].register_full_backward_hook(
                lambda module, dx, dy, name=name: seen[name].append(dy[0])
            )
    report = convert(model, to="normkit", example_inputs=images())
    assert "hooks" in report.unfused["1"]
    # The hook on the activation reads the deferred output first.
    assert report.fused == {"4": "leaky_relu"}
    x = images()
    outcome(model, x)
    outcome(plain, x)
    assert len(seen["ours"]) == len(seen["plain"]) == 2
    for ours, theirs in zip(seen["ours"], seen["plain"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("copied", [None, copy.deepcopy, "pickled"])
def test_a_fused_model_goes_back_to_torch_with_its_activations(copied: Any) -> None:
    model, x = network(), images()
    plain = copy.deepcopy(model)
    report = convert(model, to="normkit", example_inputs=x, memory="recompute")
    assert report.fused == {
        "0.bn1": "relu",
        "0.bn2": "add+relu",
        "0.bn3": "leaky_relu",
    }
    assert list(model.state_dict()) == list(plain.state_dict())
    if copied == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif copied is not None:
        model = copied(model)
    convert(model, to="torch")
    pairs = list(zip(model.modules(), plain.modules(), strict=True))
    assert [type(a) for a, _ in pairs] == [type(b) for _, b in pairs]
    for ours, theirs in pairs:
        assert vars(ours).keys() == vars(theirs).keys()
        assert not ours._forward_hooks
    for ours, theirs in zip(outcome(model, x), outcome(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert convert(model, to="normkit", example_inputs=x).fused == report.fused


@pytest.mark.parametrize("to", ["sync", "frozen", "ghost"])
def test_a_fused_model_computes_the_same_as_another_batch_norm(to: str) -> None:
    model, x = network().eval(), images()
    options: dict[str, Any] = {"ghost_size": 3} if to == "ghost" else {}
    convert(model, to="normkit", example_inputs=x)
    wanted = model(x)
    convert(model, to=to, **options)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    convert(model, to="torch", strict=False)
    torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-10, atol=1e-10)


def test_group_norm_keeps_the_activation_that_was_fused() -> None:
    model, x = network(), images()
    plain = copy.deepcopy(model)
    convert(plain, to="group", num_groups=2)
    convert(model, to="normkit", example_inputs=x)
    convert(model, to="group", num_groups=2)
    assert type(model[0].leaky) is nn.LeakyReLU
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("to", ["torch", "group"])
def test_an_activation_of_the_layer_itself_is_refused(to: str) -> None:
    own = nn.Sequential(normkit.nn.BatchNorm2d(4, activation="relu"))
    with pytest.raises(ArgumentError, match="put the activation after the layer"):
        convert(own, to=to)


@pytest.mark.parametrize("to", ["torch", "sync", "frozen"])
def test_one_fused_layer_is_converted_alone(to: str) -> None:
    model, x = network().eval(), images()
    wanted = model(x)
    convert(model, to="normkit", example_inputs=x)
    convert(model[0].bn3, to=to)
    assert type(model[0].bn3) is not normkit.nn.BatchNorm2d
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)


def test_an_error_on_the_way_back_leaves_the_model_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = network(), images()
    convert(model, to="normkit", example_inputs=x)
    before = [(m, dict(vars(m))) for m in model.modules()]
    wanted = copy.deepcopy(model)(x)

    def fails(*args: Any) -> None:
        raise KeyError

    monkeypatch.setattr(run, "swap_class", fails)
    with pytest.raises(KeyError):
        convert(model, to="torch")
    after = list(model.modules())
    assert all(m is n for (m, _), n in zip(before, after, strict=True))
    assert [vars(m).keys() for m in after] == [b.keys() for _, b in before]
    torch.testing.assert_close(model(x), wanted)


def test_a_scripted_norm_is_named() -> None:
    with warnings.catch_warnings():  # newer versions of torch warn
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(ArgumentError, match=r"before torch\.jit\.script"):
        convert(model, to="normkit")
