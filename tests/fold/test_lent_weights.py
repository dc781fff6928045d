"""A norm that runs with other weights than it holds, as functional_call runs it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkit


class Lending(nn.Module):
    """A convolution, a norm whose weights are computed from its own, a convolution."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: 0.5 - v for name, v in self.norm.named_parameters()}
        y = torch.func.functional_call(self.norm, weights, (self.first(x),))
        return self.last(y)


def drawn(norm: nn.Module) -> Lending:
    model = Lending(norm).eval()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.6, 2)
    return model


def test_a_batch_norm_stays_with_the_reason() -> None:
    """Its parameters would be given to an Identity, or to a sum that is left."""
    model, x = drawn(nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 5)
    folded, ledger = normkit.fold(model, x)
    (entry,) = ledger.left
    assert "runs with other weights than it holds" in entry.reason
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4, affine=True)]
)
def test_weights_are_edited_through_what_is_computed_from_them(
    norm: Callable[[], nn.Module],
) -> None:
    """0.5 − v is to be 1 and 0; a weight that is dropped could not be lent."""
    model, x = drawn(norm()), torch.randn(2, 3, 5, 5)
    folded, ledger = normkit.fold(model, x, norms="all")
    assert not ledger.left
    assert folded.norm.weight is not None
    torch.testing.assert_close(folded(x), model(x))
