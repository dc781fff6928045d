"""Input and output: D28, D29, D34."""

from torch import nn

from doctor.faults.planting import Program, data, fault, names_of, usual, weights_of
from doctor.models import build, train

__all__ = []


@fault("D28")
def raw_inputs(net: str, is_bad: bool) -> Program:
    """Inputs as they came."""
    if not is_bad:
        return Program(usual(net), data())
    made = [(80 * x + 33, y) for x, y in data()]
    model = build(net)
    train(model, 60, lr=0.01, data=made)
    return Program(model, made)


@fault("D29", brings={"D24": "what is erased passes no gradient on"})
def one_value_per_group(net: str, is_bad: bool) -> Program:
    """As many groups as channels, on one value each."""
    model = build(net)
    head = weights_of(model)[-1]
    (name,) = names_of(model, [head])
    width = head.in_features
    norm = nn.GroupNorm(width if is_bad else 4, width)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Sequential(norm, head))
    return Program(model, data(), at=names_of(model, [norm]))


@fault("D34")
def two_softmaxes(net: str, is_bad: bool) -> Program:
    """A softmax before a loss that has its own."""
    model = usual(net)
    return Program(nn.Sequential(model, nn.Softmax(1)) if is_bad else model, data())
