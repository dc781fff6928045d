"""What a call on a GPU costs its host, seen without a GPU: launches and functions."""

from importlib.util import find_spec

import pytest
import torch

import normkit

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernels.launches import entered, launches, layers, on_cpu_tensors

CHANNELS = (
    ["statistics_kernel", "apply_kernel"],
    ["sums_kernel", "apply_grads_kernel"],
)
ROWS = (["rows_forward_kernel"], ["rows_backward_kernel", "aten::sum"])
EXPECTED = {
    "batch norm": CHANNELS,
    "batch norm, relu": CHANNELS,
    "batch norm, add, relu": CHANNELS,
    "layer norm": ROWS,
    "RMS norm": ROWS,
}


@pytest.fixture(autouse=True)
def gpu_on_the_cpu():
    with on_cpu_tensors():
        yield


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layer_launches_no_more_than_its_kernels(name: str) -> None:
    forward, inputs = layers()[name]
    y = forward()
    dy = torch.randn_like(y)
    found = (
        launches(forward),
        launches(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)),
    )
    assert found == EXPECTED[name]


def test_a_module_launches_what_the_function_does() -> None:
    layer = normkit.nn.BatchNorm2d(16)
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    layer(x)  # the first call of a process also clears the memory that sums wait in
    assert launches(lambda: layer(x)) == CHANNELS[0]


# Each function costs its part of a microsecond: 20, 27 and 22 stand, 310 stood before.
@pytest.mark.parametrize(
    ("name", "most"),
    [("batch norm", 24), ("batch norm, add, relu", 32), ("layer norm", 26)],
)
def test_a_call_that_was_met_before_enters_few_functions(name: str, most: int) -> None:
    forward, _ = layers()[name]
    forward()
    assert entered(forward) <= most
