"""Weight and bias of layer and RMS norms, moved into what reads them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from fold.randomised import assert_same
from fold.test_traps import Net, normal
from normkit.errors import ArgumentError
from normkit.fold import fold
from normkit.fold.torch.float64 import InFloat64


class Rms(nn.Module):
    """As in Llama and T5: statistics in float32, then the weight."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def normalized(self, x):
        x = x.to(torch.float32)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.weight * self.normalized(x).to(x.dtype)


class OnePlus(Rms):
    """As in Gemma."""

    def forward(self, x):
        return (self.normalized(x) * (1.0 + self.weight.float())).type_as(x)


class Centered(Rms):
    """A layer norm in Python, with a quotient and a bias."""

    def __init__(self, width):
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        size = torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x / size) + self.bias


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


@torch.no_grad()
def lively(model):
    """`model` in float64 and eval mode, every vector drawn, a third negative."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_()
            parameter += 0.3 * parameter.sign()
    return model.double().eval()


def check(model, x, *, gone=None, left=None, reduced=()):
    """Fold all norms; it stays the same function, and the ledger says what is asked."""
    model = lively(model)
    before = copy.deepcopy(model.state_dict())
    folded, ledger = fold(model, x, norms="all")
    other = torch.randn_like(x) if x.is_floating_point() else x.flip(0)
    with InFloat64():
        assert_same(model, folded, x, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert type(folded) is type(model)
    left = left or {}
    names = {entry.name for entry in ledger.entries}
    wanted = names - set(left) if gone is None else gone
    assert {entry.name for entry in ledger.folded} == wanted, f"\n{ledger}"
    for entry in ledger.left:
        assert left[entry.name] in entry.reason, f"\n{ledger}"
        assert entry.reduced == (entry.name in reduced), f"\n{ledger}"
    assert ledger.max_difference <= 1e-9
    return folded, ledger


def block(norm, width=6):
    """A pre-norm branch with a norm, fused queries, keys and values, and attention."""

    def forward(net, x):
        heads = net.qkv(net.norm(x)).unflatten(-1, (3, 2, -1)).movedim(2, 0)
        y = F.scaled_dot_product_attention(*heads.transpose(2, 3))
        return x + net.out(y.transpose(1, 2).flatten(2))

    return Net(
        forward,
        norm=norm,
        qkv=nn.Linear(width, 3 * width, bias=False),
        out=nn.Linear(width, width),
    )


ROWS = (2, 5, 6)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.RMSNorm(6),
        normkit.nn.LayerNorm(6),
        normkit.nn.RMSNorm(6),
    ],
    ids=lambda norm: f"{type(norm).__module__.split('.')[0]}.{norm}",
)
def test_weight_and_bias_go_into_the_layer_behind(norm):
    folded, ledger = check(block(copy.deepcopy(norm)), normal(*ROWS))
    assert type(folded.norm) is type(norm)
    assert folded.norm.weight is None
    assert getattr(folded.norm, "bias", None) is None
    assert "into 'qkv' after it" in ledger.entries[0].how
    assert not any(name.startswith("norm.") for name in folded.state_dict())
    assert "1 of 1 norms folded" in ledger.to_text()


@pytest.mark.parametrize("kind", [Rms, OnePlus, Centered])
def test_a_norm_written_in_python_is_known_by_what_it_computes(kind):
    folded, _ = check(block(kind(6)), normal(*ROWS))
    assert type(folded.norm) is kind
    weight = folded.norm.weight + (kind is OnePlus)
    assert torch.equal(weight, torch.ones(6, dtype=torch.float64))
    assert "norm.weight" in folded.state_dict()


def test_the_default_leaves_them_alone():
    _, ledger = fold(lively(block(nn.LayerNorm(6))), normal(*ROWS))
    assert ledger.entries == ()


def test_all_readers_take_it_or_none():
    net = Net(
        lambda net, x: net.a(net.norm(x)) + torch.tanh(net.b(net.norm(x))),
        norm=nn.LayerNorm(6),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
    )
    check(net, normal(*ROWS))
    net = Net(
        lambda net, x: net.a(y := net.norm(x)) + torch.tanh(y),
        norm=nn.LayerNorm(6),
        a=nn.Linear(6, 6),
    )
    check(net, normal(*ROWS), left={"norm": "tanh"})


def test_a_post_norm_whose_output_is_the_stream_stays():
    net = Net(
        lambda net, x: net.norm2((y := net.norm1(x)) + net.a(y)),
        norm1=nn.LayerNorm(6),
        norm2=nn.LayerNorm(6),
        a=nn.Linear(6, 6),
    )
    left = {"norm1": "of the residual stream", "norm2": "is returned by the model"}
    check(net, normal(*ROWS), left=left)


def test_a_norm_on_queries_before_a_rotation_stays():
    def forward(net, x):
        q = net.norm(net.q(x))
        left, right = q.chunk(2, -1)
        return q * x.cos() + torch.cat([-right, left], -1) * x.sin()

    net = Net(forward, norm=Rms(6), q=nn.Linear(6, 6))
    check(net, normal(*ROWS), left={"norm": "pairs of its features are rotated"})


def test_a_head_tied_to_the_embedding_gets_a_weight_of_its_own():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.norm(self.table(tokens)))

    folded, ledger = check(Tied(), torch.arange(8).reshape(2, 4))
    assert folded.head.weight is not folded.table.weight
    assert folded.head.bias is not None
    assert "of its own" in ledger.entries[0].how


def test_a_padded_convolution_takes_the_weight_and_leaves_the_bias():
    def forward(net, x):
        return net.conv(net.norm(x).transpose(1, 2))

    net = Net(forward, norm=nn.LayerNorm(6), conv=nn.Conv1d(6, 4, 3, padding=1))
    left = {"norm": "its bias stays, the rest is removed"}
    folded, _ = check(net, normal(*ROWS), left=left, reduced=["norm"])
    assert torch.equal(folded.norm.weight, torch.ones(6, dtype=torch.float64))
    net = Net(forward, norm=Rms(6), conv=nn.Conv1d(6, 4, 3, padding=1))
    check(net, normal(*ROWS))


def test_group_and_instance_norms_go_into_a_convolution():
    net = nn.Sequential(
        nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6, affine=True)
    )
    net.append(nn.Conv2d(6, 2, 3))
    folded, _ = check(net, normal(2, 4, 5, 6))
    assert not folded[0].affine
    assert folded[2].weight is None


def test_multihead_attention_takes_it_in_its_fused_weight():
    def forward(net, x):
        y = net.norm(x)
        return x + net.attention(y, y, y, need_weights=False)[0]

    net = Net(
        forward,
        norm=nn.LayerNorm(6),
        attention=nn.MultiheadAttention(6, 2, batch_first=True),
    )
    check(net, normal(*ROWS))


def test_a_layer_scale_goes_into_the_map_before_it():
    net = Net(
        lambda net, x: x + net.scale(net.b(F.gelu(net.a(net.norm(x))))),
        norm=nn.LayerNorm(6),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 6),
        scale=LayerScale(6),
    )
    folded, ledger = check(net, normal(*ROWS))
    assert isinstance(folded.scale, nn.Identity)
    assert {entry.name for entry in ledger.folded} == {"norm", "scale"}


def test_batch_norms_go_first_and_their_rest_goes_on():
    net = Net(
        lambda net, x: net.a(net.bn(net.norm(x).transpose(1, 2)).transpose(1, 2)),
        norm=nn.LayerNorm(6),
        bn=nn.BatchNorm1d(6),
        a=nn.Linear(6, 6),
    )
    net.bn.running_var.uniform_(0.5, 2)
    net.bn.running_mean.normal_()
    check(net, normal(*ROWS))


def test_one_norm_called_twice_goes_into_all_readers():
    net = Net(
        lambda net, x: net.b(net.norm(torch.tanh(net.a(net.norm(x))))),
        norm=nn.LayerNorm(6),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
    )
    check(net, normal(*ROWS))


def test_a_weight_that_is_read_elsewhere_stays():
    net = Net(
        lambda net, x: net.a(net.norm(x)) * net.norm.weight,
        norm=nn.LayerNorm(6),
        a=nn.Linear(6, 6),
    )
    check(net, normal(*ROWS), left={"norm": "norm.weight is also used by"})


def test_a_weight_that_is_computed_stays():
    net = block(nn.utils.parametrizations.weight_norm(nn.LayerNorm(6), dim=None))
    check(net, normal(*ROWS), left={"norm": ""})


def test_a_weight_of_zero_goes_too():
    net = lively(block(nn.LayerNorm(6)))
    net.norm.weight.data[:2] = 0
    folded, ledger = fold(net, normal(*ROWS), norms="all")
    assert len(ledger.folded) == 1
    assert_same(net, folded, normal(*ROWS))


def test_folding_again_finds_nothing_to_do():
    for norm in (nn.LayerNorm(6), Rms(6)):
        folded, _ = check(block(norm), normal(*ROWS))
        again, ledger = fold(folded, normal(*ROWS), norms="all")
        assert all(entry.how == "its weight was 1 already" for entry in ledger.entries)
        assert_same(folded, again, normal(*ROWS))


def test_half_weights_and_float32_statistics_fold():
    net = lively(block(Rms(6))).to(torch.bfloat16)
    folded, ledger = fold(net, torch.randn(ROWS).bfloat16(), norms="all")
    assert len(ledger.folded) == 1
    assert folded.qkv.weight.dtype == torch.bfloat16
    assert "bfloat16" in ledger.proof


class Mixture(nn.Module):
    """Stacked experts, a loop over those that are hit, a router beside them."""

    def __init__(self, width=6, experts=5):
        super().__init__()
        self.norm, self.gate = Rms(width), nn.Linear(width, experts, bias=False)
        self.experts = Experts(width, experts)

    def forward(self, x):
        y = self.norm(x).reshape(-1, x.shape[-1])
        top, index = self.gate(y).softmax(-1).topk(2, -1)
        return x + self.experts(y, index, top).reshape(x.shape)


class Experts(nn.Module):
    def __init__(self, width, experts):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width))
        self.down = nn.Parameter(torch.randn(experts, width, width))

    def forward(self, x, index, top):
        out = torch.zeros_like(x)
        mask = F.one_hot(index, len(self.up)).permute(2, 1, 0)
        for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            expert = expert[0]
            place, rows = torch.where(mask[expert])
            up, gate = F.linear(x[rows], self.up[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down[expert])
            out.index_add_(0, rows, y * top[rows, place, None])
        return out


def test_all_experts_of_a_mixture_take_it_with_the_router():
    net = Mixture()
    folded, ledger = check(net, normal(1, 2, 6))
    used = net.experts.up.detach().double() * net.norm.weight
    assert torch.allclose(folded.experts.up, used)
    # Rows that go to other experts than those of the example.
    assert_same(net, folded, normal(4, 9, 6))
    assert {"gate.weight", "experts.up"} <= set(ledger.entries[0].where)


class Grouped(Experts):
    """Rows sorted by expert, then one product for all: torch's grouped_mm."""

    def forward(self, x, index, top):
        order = index.reshape(-1).argsort(stable=True)
        counts = F.one_hot(index.reshape(-1), len(self.up)).sum(0)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // index.shape[1]]
        up = F.grouped_mm(rows, self.up.transpose(1, 2), offs=ends)
        up, gate = up.chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        y = y * top.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // index.shape[1], y)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")
def test_experts_in_one_grouped_product_take_it_too():
    net = Mixture(8, 5)
    net.experts = Grouped(8, 5)
    net = lively(net).float()
    x = torch.randn(1, 4, 8)
    folded, ledger = fold(net, x, norms="all")
    assert len(ledger.folded) == 1, ledger
    assert ledger.max_difference <= 1e-12
    used = net.experts.up.detach() * net.norm.weight
    torch.testing.assert_close(folded.experts.up.detach(), used)


def test_a_mixture_that_branches_on_floats_stays():
    class Odd(Experts):
        def forward(self, x, index, top):
            if float(top.sum()) > 1e9:
                return x
            return super().forward(x, index, top)

    net = Mixture()
    net.experts = Odd(6, 5)
    check(net, normal(1, 2, 6), left={"norm": "looks at values of tensors"})


def test_an_unknown_choice_of_norms_is_refused():
    with pytest.raises(ArgumentError, match='"batch" or "all"'):
        fold(block(nn.LayerNorm(6)), normal(*ROWS), norms="layer")
    with pytest.raises(ArgumentError, match='needs norms="all"'):
        fold(block(nn.LayerNorm(6)), normal(*ROWS), layer_to_rms=True)


# Layer norms as RMS norms -------------------------------------------------------


class Stream(nn.Module):
    """A small GPT-2: two tables, blocks upon a stream, a head."""

    def __init__(self, depth=2, width=6):
        super().__init__()
        self.tokens, self.places = nn.Embedding(9, width), nn.Embedding(4, width)
        self.blocks = nn.ModuleList(block(nn.LayerNorm(width)) for _ in range(depth))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 9)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[-1]))
        for each in self.blocks:
            x = each(x)
        return self.head(self.last(x))


TOKENS = torch.arange(8).reshape(2, 4)


def test_a_layer_norm_upon_a_centered_stream_is_an_rms_norm():
    net = lively(Stream())
    folded, ledger = fold(net, TOKENS, norms="all", layer_to_rms=True)
    assert_same(net, folded, TOKENS, TOKENS.flip(0))
    norms = [folded.last, *(each.norm for each in folded.blocks)]
    assert all(type(norm) is nn.RMSNorm for norm in norms)
    assert norms[0].eps == net.last.eps
    assert all(entry.as_rms == "it is an RMS norm now" for entry in ledger.entries)
    assert float(folded.tokens.weight.detach().mean(-1).abs().max()) < 1e-15


def test_it_stays_a_layer_norm_where_something_writes_a_mean():
    class Gelu(Stream):
        def forward(self, tokens):
            x = F.gelu(self.tokens(tokens))
            return self.head(self.last(self.blocks[0](x)))

    net = lively(Gelu())
    folded, ledger = fold(net, TOKENS, norms="all", layer_to_rms=True)
    assert_same(net, folded, TOKENS)
    assert type(folded.last) is nn.LayerNorm
    assert "has a mean that no weight can take out" in ledger.to_text()


def test_it_stays_a_layer_norm_where_something_reads_the_mean():
    class Peeking(Stream):
        def forward(self, tokens):
            x = self.blocks[0](self.tokens(tokens))
            return self.head(self.last(x)) + x.sum()

    net = lively(Peeking())
    folded, ledger = fold(net, TOKENS, norms="all", layer_to_rms=True)
    assert_same(net, folded, TOKENS)
    assert type(folded.last) is nn.LayerNorm
    assert "reads the mean of" in ledger.to_text()


def test_it_stays_a_layer_norm_where_the_code_may_branch():
    class Exits(Stream):
        def forward(self, tokens):
            x = self.blocks[0](self.tokens(tokens))
            if int(tokens.sum()) > 1e9:
                return x
            return self.head(self.last(x))

    net = lively(Exits())
    folded, ledger = fold(net, TOKENS, norms="all", layer_to_rms=True)
    assert_same(net, folded, TOKENS)
    assert type(folded.last) is nn.LayerNorm
    assert "looks at values of tensors" in ledger.entries[0].as_rms


def test_a_weight_that_stays_keeps_the_layer_norm():
    net = Net(
        lambda net, x: torch.tanh(net.norm(net.a(x))),
        norm=nn.LayerNorm(6, bias=False),
        a=nn.Linear(6, 6),
    )
    folded, ledger = fold(lively(net), normal(*ROWS), norms="all", layer_to_rms=True)
    assert "its weight or bias stays" in ledger.entries[0].as_rms
    assert folded.norm.weight is not None


def test_patches_and_a_class_token_are_a_stream_too():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.body = nn.Conv2d(3, 6, 2, 2), block(nn.LayerNorm(6))
            self.token = nn.Parameter(torch.randn(1, 1, 6))
            self.places = nn.Parameter(torch.randn(1, 5, 6))
            self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
            return self.head(self.last(self.body(x)[:, 0]))

    net = lively(Patches())
    x = normal(2, 3, 4, 4)
    folded, ledger = fold(net, x, norms="all", layer_to_rms=True)
    assert_same(net, folded, x, normal(2, 3, 4, 4))
    assert type(folded.last) is type(folded.body.norm) is nn.RMSNorm, ledger
