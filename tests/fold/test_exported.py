"""An exported program folds like the model it came from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from fold.randomised import assert_same, randomised
from fold.test_traps import IMAGE, Net, conv, normal

# torch 2.13 warns about its own use of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)


def network():
    return Net(
        lambda net, x: net.out(
            net.last(F.gelu(net.bn2(net.up(F.gelu(net.bn(net.conv(x)))))).mean((2, 3)))
        ),
        conv=conv(kernel=3, padding=1, bias=False),
        bn=nn.BatchNorm2d(4),
        up=nn.ConvTranspose2d(4, 6, 3, groups=2),
        bn2=nn.BatchNorm2d(6),
        last=nn.BatchNorm1d(6),
        out=nn.Linear(6, 3),
    )


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_folds(decomposed):
    net, x = randomised(network()), normal(*IMAGE)
    program = torch.export.export(net, (x,))
    if decomposed:
        keep = torch.export.default_decompositions()
        for op in list(keep):
            if "batch_norm" not in str(op):
                del keep[op]
        program = program.run_decompositions(keep)
    before = str(program.graph)
    folded, ledger = normkit.fold(program, x)
    assert_same(net, folded, x, normal(*IMAGE))
    assert len(ledger.folded) == len(ledger.entries) == 3, f"\n{ledger}"
    assert str(program.graph) == before


def test_an_exported_program_keeps_what_its_model_would():
    net = Net(
        lambda net, x: net.bn(y := net.conv(x)).relu() + y.sigmoid(),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    net, x = randomised(net), normal(*IMAGE)
    folded, ledger = normkit.fold(torch.export.export(net, (x,)), x)
    assert_same(net, folded, x)
    assert "relu" in ledger.left[0].reason
