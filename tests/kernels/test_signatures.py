"""Signatures of calls in CPU memory, as the native library makes them."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import normkit
from normkit import nn
from normkit.functional.signature import signature
from normkit.kernels.cpu.loading import library
from normkit.kernels.spec import Running

pytestmark = pytest.mark.skipif(library() is None, reason="no native library")

OPERATION = ("batch_norm", 1, True)


def images(*sizes: int, **options: Any) -> Tensor:
    return torch.zeros(*(sizes or (2, 4, 3, 3)), **options)


def running(n: int = 4, **options: Any) -> Running:
    counters = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return Running(torch.zeros(n, **options), torch.ones(n, **options), 0.1, *counters)


def key(x: Tensor | None = None, **changed: Any) -> Hashable | None:
    given: dict[str, Any] = {
        "operation": OPERATION,
        "x": images() if x is None else x,
        "weight": Parameter(torch.ones(4)),
        "bias": Parameter(torch.zeros(4)),
        "residual": None,
        "mask": None,
        "running": running(),
    }
    operation, *operands, averages = (given | changed).values()
    return signature(operation, tuple(operands), averages)


DIFFERENT: dict[str, Callable[[], Hashable | None]] = {
    "the operation": lambda: key(operation=("batch_norm", 1, False)),
    "the shape of x": lambda: key(images(3, 4, 3, 3)),
    "the strides of x": lambda: key(images().to(memory_format=torch.channels_last)),
    "the dtype of x": lambda: key(images(dtype=torch.bfloat16)),
    "no weight": lambda: key(weight=None),
    "no bias": lambda: key(bias=None),
    "the dtype of the weight": lambda: key(weight=torch.ones(4).double()),
    "the shape of the bias": lambda: key(bias=torch.ones(4, 1)),
    "a residual": lambda: key(residual=images()),
    "a mask": lambda: key(mask=images(dtype=torch.bool)),
    "the shape of the mask": lambda: key(mask=images(2, 1, 3, 3, dtype=torch.bool)),
    "no running statistics": lambda: key(running=None),
    "the dtype of running statistics": lambda: key(
        running=running(dtype=torch.float64)
    ),
    "their number": lambda: key(running=running(5)),
    "no counter": lambda: key(running=running()._replace(batches=None)),
    "no counter of skipped ones": lambda: key(running=running()._replace(skipped=None)),
    "running statistics that are None": lambda: key(running=Running(None, None)),
}


def test_equal_calls_have_equal_signatures() -> None:
    assert key() == key()
    assert hash(key()) == hash(key())
    assert key() is not None
    # The rate is passed at every call; the layer's momentum is part of the operation.
    assert key(running=running()._replace(rate=None)) == key()


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_signature_has_all_but_the_values(what: str) -> None:
    found = DIFFERENT[what]()
    assert found is not None
    assert found != key()


def test_no_two_of_these_calls_have_one_signature() -> None:
    found = [make() for make in DIFFERENT.values()]
    assert len(set(found)) == len(found)


def test_threads_and_the_backend_asked_for_belong_to_it() -> None:
    plain, before = key(), torch.get_num_threads()
    with normkit.backend("cpu"):
        assert key() != plain
    torch.set_num_threads(before + 1)
    try:
        assert key() != plain
    finally:
        torch.set_num_threads(before)
    assert key() == plain


class Labelled(Tensor):
    """A subclass, which may do anything."""


def leaked() -> Tensor:
    """Return the wrapper of a transform that has ended."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(images())
    return kept[0]


def negated(*sizes: int) -> Tensor:
    """Return ones whose values are the negative of what lies at their address."""
    return torch._neg_view(-torch.ones(sizes))


NONE: dict[str, Callable[[], Hashable | None]] = {
    "integers": lambda: key(images(dtype=torch.int64)),
    "complex values": lambda: key(images(dtype=torch.complex64)),
    "a meta tensor": lambda: key(images(device="meta")),
    "a sparse one": lambda: key(images().to_sparse()),
    "a nested one": lambda: key(torch.nested.nested_tensor([images()])),
    "a subclass": lambda: key(images().as_subclass(Labelled)),
    "a wrapper": lambda: key(leaked()),
    "negated values": lambda: key(negated(2, 4, 3, 3)),
    "a negated residual": lambda: key(residual=negated(2, 4, 3, 3)),
    "a negated variance": lambda: key(
        running=running()._replace(var=torch._neg_view(torch.ones(4)))
    ),
    "a weight with gaps": lambda: key(weight=torch.ones(8)[::2]),
    "a weight of integers": lambda: key(weight=torch.ones(4, dtype=torch.int32)),
    "a residual of another shape": lambda: key(residual=images(1, 4, 3, 3)),
    "weights as a mask": lambda: key(mask=images()),
    "a counter in int32": lambda: key(
        running=running()._replace(batches=torch.zeros((), dtype=torch.int32))
    ),
    "a counter for each channel": lambda: key(
        running=running()._replace(skipped=torch.zeros(4, dtype=torch.int64))
    ),
    "running statistics with a gradient": lambda: key(
        running=running()._replace(mean=torch.zeros(4, requires_grad=True))
    ),
    "one of two running statistics": lambda: key(running=running()._replace(var=None)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", NONE)
def test_what_cannot_be_cached_has_none(what: str) -> None:
    assert NONE[what]() is None


def test_an_error_of_the_key_is_raised() -> None:
    native = library()
    assert native is not None
    with pytest.raises(TypeError, match="unhashable"):
        native.find({}, ["a", "list"], images(), None, None)


OLDER = """
import sys
import torch
torch.set_num_threads(int(sys.argv[1]))  # a signature holds the number of threads
torch.Tensor.__dlpack_c_exchange_api__ = None
from kernels.test_signatures import DIFFERENT, NONE, key
assert all(make() is None for make in NONE.values())
print([key(), *(make() for make in DIFFERENT.values())])
import normkit
layers = normkit.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
torch.manual_seed(0)
x = torch.randn(2, 4, 3, 3)
for _ in range(3):
    grads = []
    for layer in layers:
        given = x.clone().requires_grad_()
        layer(given).square().sum().backward()
        grads += [given.grad, layer.weight.grad, layer.running_var]
    for ours, torchs in zip(grads[:3], grads[3:]):
        torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)
"""


def test_older_versions_of_torch_give_the_same_signatures() -> None:
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("torch < 2.10: it is what all these tests run with")
    run = subprocess.run(
        [sys.executable, "-c", OLDER, str(torch.get_num_threads())],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = ast.literal_eval(run.stdout)
    assert found == [key(), *(make() for make in DIFFERENT.values())]


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "BatchNorm2d, relu": (lambda: nn.BatchNorm2d(4, activation="relu"), (2, 4, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(8), (2, 8)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(8, bias=False), (2, 8)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (2, 8)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_second_call_of_a_layer_asks_nothing_again(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, sizes = LAYERS[name]
    layer, x = make().train(training), torch.randn(sizes)
    first = layer(x)

    def long_way(*_: Any, **__: Any) -> None:
        raise AssertionError("the call went the long way")

    for module in ("batch_norm_layer", "per_sample"):
        for function in ("batch_norm", "layer_norm", "rms_norm", "group_norm"):
            target = f"normkit.nn.{module}.{function}"
            monkeypatch.setattr(target, long_way, raising=False)
    assert torch.equal(layer(x), first)
    with pytest.raises(AssertionError, match="long way"):
        layer(x[:1])


def test_one_running_statistic_is_refused_whatever_is_remembered() -> None:
    x = torch.randn(2, 4, 3, 3)
    plain = nn.BatchNorm2d(4)
    plain.running_mean = plain.running_var = None
    plain(x)
    plain(x)
    layer = nn.BatchNorm2d(4)
    layer.running_mean = None
    with pytest.raises(normkit.errors.ArgumentError, match="running"):
        layer(x)
