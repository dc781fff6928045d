"""Nested tensors: what torch's layer and RMS norm take, ours take."""

import re

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.errors import ArgumentError, ShapeError

LENGTHS = (2, 5, 1)
ROWS = {
    "layer": lambda: normkit.nn.LayerNorm(4),
    "rms": lambda: normkit.nn.RMSNorm(4),
}


def sequences() -> list[Tensor]:
    return [torch.randn(n, 4) for n in LENGTHS]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_sequence_is_normalized_as_alone(name: str, layout: torch.layout) -> None:
    layer, alone = ROWS[name](), [t.requires_grad_() for t in sequences()]
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 2)
    nested = torch.nested.as_nested_tensor(alone, layout=layout)
    wanted = [layer(t) for t in alone]
    for _ in range(2):  # met before, and remembered
        y = layer(nested)
        assert y.is_nested
        assert y.layout is layout
        for part, one in zip(y.unbind(), wanted, strict=True):
            torch.testing.assert_close(part, one, rtol=0, atol=0)
    cotangent = [torch.randn_like(t) for t in alone]
    inputs = [*alone, *layer.parameters()]
    of_nested = torch.autograd.grad(list(y.unbind()), inputs, cotangent)
    for found, own in zip(
        of_nested, torch.autograd.grad(wanted, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(found, own)


@pytest.mark.parametrize("name", ROWS)
def test_a_residual_is_added_and_the_sum_is_nested_alike(name: str) -> None:
    layer = ROWS[name]()
    x = torch.nested.as_nested_tensor(sequences(), layout=torch.jagged)
    y, total = layer(x, residual=x)
    for part, given in zip(total.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(part, 2 * given)
    for part, given in zip(y.unbind(), total.unbind(), strict=True):
        torch.testing.assert_close(part, layer(given))
    (x + y).values()  # of one shape


# dynamo looks at it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_block_of_a_transformer_compiles() -> None:
    block = nn.Sequential(
        nn.Linear(4, 4), normkit.nn.LayerNorm(4), normkit.nn.RMSNorm(4)
    )
    x = torch.nested.as_nested_tensor(sequences(), layout=torch.jagged)
    compiled = torch.compile(block, backend="aot_eager")
    torch.testing.assert_close(compiled(x).values(), block(x).values())


def test_what_has_no_rule_is_refused_with_the_way_out() -> None:
    x = torch.nested.as_nested_tensor(sequences(), layout=torch.jagged)
    with pytest.raises(ArgumentError, match="leave the mask out"):
        normkit.functional.layer_norm(x, (4,), mask=torch.ones(3, 1, 1).bool())
    with pytest.raises(ShapeError, match=re.escape("has a length for each sequence")):
        normkit.functional.rms_norm(x.transpose(1, 2), (5,))
    with pytest.raises(ArgumentError, match="to_padded_tensor"):
        normkit.nn.GroupNorm(2, 4)(x)
