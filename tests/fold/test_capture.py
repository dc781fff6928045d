"""What the trace reads: any module that runs, and how it is called."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from fold.randomised import check, randomised
from fold.test_traps import IMAGE, Net, conv, normal
from normkit.fold.torch.capture import capture
from normkit.fold.torch.op_names import op_name
from normkit.modeling.pytree import map_tensors, tensors_in


@dataclass
class Batch:
    image: Tensor
    name: str


class Pair(NamedTuple):
    image: Tensor
    other: Tensor


def body():
    return {"conv": conv(), "bn": nn.BatchNorm2d(4)}


def test_a_tuple_is_the_positional_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), nn.BatchNorm2d(4)

        def forward(self, x, y, *, factor=2.0):
            return self.bn(self.conv(x)) * factor + y

    net = randomised(Two())
    check(net, (normal(*IMAGE), normal(*IMAGE)))
    check(net, {"x": normal(*IMAGE), "y": normal(*IMAGE), "factor": 3.0})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (lambda x: [x], lambda given: given[0]),
        (lambda x: Batch(x, "a name"), lambda given: given.image),
        (lambda x: ({"image": {"left": x}},), lambda given: given["image"]["left"]),
        (lambda x: (Pair(x, x),), lambda given: given.image),
    ],
    ids=["list", "dataclass", "nested dict", "named tuple"],
)
def test_any_container_can_hold_the_input(given, read):
    net = Net(lambda net, batch: net.bn(net.conv(read(batch))), **body())
    check(randomised(net), given(normal(*IMAGE)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"out": [y, "text", 3]},
        lambda y: Batch(y, "a name"),
        lambda y: (y, None, (y.mean(),)),
    ],
    ids=["dict", "dataclass", "tuple"],
)
def test_any_container_can_hold_the_output(wrap):
    net = Net(lambda net, x: wrap(net.bn(net.conv(x))), **body())
    check(randomised(net), normal(*IMAGE))


def test_loops_lists_and_dictionaries_of_modules_are_read():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(conv() for _ in range(3))
            self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(4) for i in range(3)})

        def forward(self, x):
            for i, layer in enumerate(self.convs):
                x = F.gelu(self.norms[str(i)](layer(x)))
            return x

    check(randomised(Loops()), normal(*IMAGE))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_seen_through_to_its_operations():
    net = Net(
        lambda net, x: net.bn(net.conv(x)) + net.scripted(net.conv2(x)),
        conv2=conv(),
        scripted=torch.jit.script(nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 1))),
        **body(),
    )
    check(randomised(net), normal(*IMAGE))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_reader_of_the_convs_output_is_not_overlooked():
    net = Net(
        lambda net, x: F.gelu(net.bn(y := net.conv(x))) + net.scripted(y),
        scripted=torch.jit.script(nn.Sequential(nn.GELU())),
        **body(),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "gelu"})


def test_a_custom_autograd_function_is_not_overlooked():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.erf(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    net = Net(
        lambda net, x: F.gelu(net.bn(y := net.conv(x))) + Double.apply(y), **body()
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "erf"})


def test_a_tensor_that_goes_to_numpy_is_pinned():
    net = Net(
        lambda net, x: net.bn(y := net.conv(x)) + float(y.numpy().mean()), **body()
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "numpy"})


def test_a_tensor_left_on_a_module_is_pinned():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), nn.BatchNorm2d(4)
            self.features = None

        def forward(self, x):
            self.features = self.conv(x)
            return self.bn(self.features)

    check(randomised(Keeps()), normal(*IMAGE), left={"bn": "kept by '' as features"})


def test_operators_and_functions_are_one_operation():
    assert op_name(torch.Tensor.__iadd__) == "iadd"
    assert op_name(torch.Tensor.add_) == op_name(torch.add) == "add"
    assert op_name(torch.ops.aten.relu_.default) == op_name(F.relu_) == "relu"
    assert op_name(torch.Tensor.shape.__get__) == "shape"
    assert op_name(normkit.functional.batch_norm) == "batch_norm"


def test_the_trace_knows_producers_readers_and_callers():
    net = randomised(Net(lambda net, x: F.gelu(net.bn(net.conv(x))) + x, **body()))
    x = normal(*IMAGE)
    trace = capture(net, (x,), {})
    assert [node.label for node in trace.graph.nodes] == [
        "'conv'",
        "'bn'",
        "gelu in the model's forward",
        "add in the model's forward",
    ]
    convolved = trace.graph.nodes[0].outputs[0]
    assert convolved.readers == [trace.graph.nodes[1]]
    assert len(trace.graph.inputs[0].readers) == 2
    assert trace.graph.outputs == trace.graph.nodes[-1].outputs
    assert trace.call_of[trace.graph.nodes[1]].module is net.bn
    assert [call.path for call in trace.root.children] == ["conv", "bn"]
    torch.testing.assert_close(trace.result, net(x))


def test_a_tree_of_tensors_is_walked_and_rebuilt():
    tree = {"a": [torch.ones(2), ("b", Batch(torch.zeros(1), "c"))], "d": None}
    assert [t.numel() for t in tensors_in(tree)] == [2, 1]
    doubled = map_tensors(tree, lambda t: t + 1)
    assert doubled["a"][1][1].image.item() == 1
    assert doubled["a"][1][1].name == "c"
    assert tree["a"][1][1].image.item() == 0


def test_a_tree_that_contains_itself_ends():
    tree = [torch.ones(1)]
    tree.append(tree)
    assert len(list(tensors_in(tree))) == 1
