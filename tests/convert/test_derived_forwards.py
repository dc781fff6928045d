"""A forward that a user derived: converted, it computes what it did, or is refused.

`super().forward` may be another class's, an explicit call, or torch's function.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.errors import ArgumentError


class Doubling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OfDoubling(Doubling):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Moving:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)  # type: ignore[misc]


class Mixed(Moving, nn.BatchNorm2d):
    pass


class MixedAgain(Moving, nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


class Skipping(Doubling):
    def forward(self, x: Tensor) -> Tensor:
        return super(Doubling, self).forward(x)


class Explicit(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x).relu()


class Functional(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return nn.functional.batch_norm(
            x,
            *(self.running_mean, self.running_var, self.weight * 2, self.bias),
            *(self.training, 0.1, self.eps),
        )


class OfSize(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + len(x)


class OfValues(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean() * (x.abs().max() > 50)


class Called(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


class OwnEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.eps = 0.5
        return super().forward(x)


class Turned(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class OfTurned(Turned):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x) * 3


class Flipped(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


KEPT = (Doubling, OfDoubling, Mixed, MixedAgain, Skipping, OfSize, OfValues, Called)
CLASSES = (*KEPT, OwnEps, Explicit, Functional, Turned, OfTurned, Flipped)


@pytest.mark.parametrize("to", ["normkit", "sync", "frozen"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_derived_forward_computes_what_it_did_or_is_refused(
    cls: Any, to: str
) -> None:
    layer = cls(2, 4) if cls is Flipped else cls(4)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    plain = nn.Sequential(layer)
    ours = copy.deepcopy(plain)
    before = copy.deepcopy(ours.state_dict())
    refusal = ""
    try:
        normkit.convert(ours, to=to)
    except ArgumentError as error:
        refusal = str(error)
    if refusal:
        assert cls not in KEPT, refusal
        assert type(ours[0]) is cls
        assert all(map(torch.equal, before.values(), ours.state_dict().values()))
        return
    for training in (False,) if to == "frozen" else (True, False, True):
        for samples, scale in ((2, 1), (5, 100)):
            x = scale * torch.randn(samples, 4, 4, 4)
            wanted = plain.train(training)(x)
            torch.testing.assert_close(
                ours.train(training)(x), wanted, rtol=1e-5, atol=1e-4
            )


def test_a_forward_of_the_object_itself_is_refused() -> None:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: nn.BatchNorm2d.forward(layer, x) * 2  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match="replaced on the object"):
        normkit.convert(nn.Sequential(layer), to="normkit")
