"""Readers of a norm that are no layer: einsum, stacks, fused operators."""

import pytest
import torch
from torch import nn

from fold.test_norm_weights import ROWS, Rms, check, lively
from fold.test_traps import Net, normal
from normkit.fold import fold


class DenseExperts(nn.Module):
    """Every expert for every row, weighted by a router, in three products."""

    def __init__(self, norm, width=6, experts=3):
        super().__init__()
        self.norm, self.router = norm, nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 4))
        self.down = nn.Parameter(torch.randn(experts, 4, width))

    def products(self, y):
        return torch.einsum("btd,edh->bteh", y, self.up).tanh()

    def forward(self, x):
        y = self.norm(x)
        gate = self.router(y).softmax(-1)
        return x + torch.einsum("bteh,ehd,bte->btd", self.products(y), self.down, gate)


class Batched(DenseExperts):
    """The same by a product with the stack."""

    def products(self, y):
        return torch.matmul(y[:, None], self.up).tanh().transpose(1, 2)


@pytest.mark.parametrize("kind", [DenseExperts, Batched])
def test_a_product_with_all_experts_at_once_takes_the_weight(kind):
    net = kind(Rms(6))
    folded, ledger = check(net, normal(*ROWS))
    used = net.up.detach() * net.norm.weight[:, None]
    torch.testing.assert_close(folded.up.detach(), used)
    assert {"router.weight", "up"} <= set(ledger.entries[0].where)
    bias = {"norm": "its bias stays, the rest is removed"}
    check(kind(nn.LayerNorm(6)), normal(*ROWS), left=bias, reduced=["norm"])


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("btd,dh->bth", (6, 5)),
        ("b t d, h d -> b t h", (5, 6)),
        ("btd,dh->hbt", (6, 5)),
        ("btd,dnh->bnth", (6, 2, 4)),
        ("btd,ndh->btnh", (2, 6, 4)),
        ("btd,td->bt", (5, 6)),
    ],
)
def test_einsum_with_one_parameter_is_a_reader(equation, shape):
    net = Net(lambda net, x: torch.einsum(equation, net.norm(x), net.w), norm=Rms(6))
    net.w = nn.Parameter(torch.randn(shape))
    check(net, normal(*ROWS))
    net = Net(
        lambda net, x: torch.einsum(_turned(equation), net.w, net.norm(x)),
        norm=Rms(6),
    )
    net.w = nn.Parameter(torch.randn(shape))
    check(net, normal(*ROWS))


def _turned(equation):
    terms, result = equation.split("->")
    return ",".join(reversed(terms.split(","))) + "->" + result


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("btd,td->btd", (5, 6)),  # no sum
        ("btd,td->b", (5, 6)),  # a sum over two dimensions
        ("btd,dd->bt", (6, 6)),  # a diagonal
        ("...d,dh->...h", (6, 4)),  # dimensions without a letter
    ],
)
def test_another_einsum_is_no_reader(equation, shape):
    net = Net(lambda net, x: torch.einsum(equation, net.norm(x), net.w), norm=Rms(6))
    net.w = nn.Parameter(torch.randn(shape))
    check(net, normal(*ROWS), left={"norm": "permits no change of it"})


def test_a_batch_norm_goes_into_the_einsum_before_it():
    net = Net(
        lambda net, x: net.bn(torch.einsum("bd,dh->bh", x, net.w) + net.b),
        bn=nn.BatchNorm1d(5),
    )
    net.w, net.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
    net.bn.running_var.uniform_(0.5, 2)
    net.bn.running_mean.normal_()
    check(net, normal(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_an_encoder_layer_keeps_ones_for_its_fused_operator(dtype):
    """Without gradients it hands weight and bias of its norms to one call of torch."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=True, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    net = lively(nn.Sequential(net, nn.Linear(8, 3))).to(dtype)
    x = normal(2, 5, 8).to(dtype)
    folded, ledger = fold(net, x, norms="all")
    assert len(ledger.folded) == 5, ledger
    assert torch.equal(folded[0].layers[0].norm1.weight, torch.ones(8, dtype=dtype))
    assert folded[0].norm.weight is None
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(folded(x), net(x), rtol=bound, atol=bound)


def test_what_fails_only_when_run_as_called_undoes_the_fold():
    """Code that reads the weight, but not where the proof computes in float64."""

    def forward(net, x):
        if not torch.overrides._is_torch_function_mode_enabled():
            net.norm.weight.device  # noqa: B018
        return net.a(net.norm(x))

    net = Net(forward, norm=nn.LayerNorm(6), a=nn.Linear(6, 6))
    x = normal(*ROWS)
    check(net, x, left={"norm": "the folded model fails"})
