"""A batch norm that does more than normalize stays, and says why."""

import torch
from torch import Tensor, nn

import normkit
from normkit.nn import BatchNorm2d


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), BatchNorm2d(4, activation="relu")
        self.b, self.m = nn.Conv2d(4, 4, 1), BatchNorm2d(4)
        self.c, self.o = nn.Conv2d(4, 4, 1), BatchNorm2d(4)
        for norm in (self.n, self.m, self.o):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x))
        return self.o(self.c(y)) + self.m(self.b(y), residual=y)


def test_an_activation_or_a_residual_in_the_layer_keeps_it_and_no_other() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    folded, ledger = normkit.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    text = ledger.to_text()
    assert "1 of 3 batch norms folded" in text
    assert "applies an activation in the same pass" in text
    assert "adds a residual in the same pass" in text
