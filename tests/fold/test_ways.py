"""The ways a batch norm can go besides into the layer right before it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from fold.randomised import check, randomised
from fold.test_traps import IMAGE, Net, conv, normal


def test_a_model_is_folded_inside_inference_mode():
    """Its tensors and those of the inputs have no version counter there."""
    outside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with torch.inference_mode():
        inside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        x = torch.randn(2, 3, 8, 8)
        for model in (outside, inside):
            folded, ledger = normkit.fold(model, x)
            assert hows(ledger) == {"1": "into '0' before it"}
            assert normkit.verify(model, folded, x).equal
            assert not folded[0].weight.is_inference()
    folded, _ = normkit.fold(inside, x)
    folded[0].weight.data.mul_(2)


def hows(ledger):
    return {entry.name: entry.how for entry in ledger.entries}


@pytest.mark.parametrize(
    "layer",
    [
        conv(kernel=3),
        conv(kernel=3, padding=1, padding_mode="reflect"),
        conv(kernel=3, padding=1, padding_mode="circular"),
        conv(4, 8, 2, groups=2, bias=False),
        nn.ConvTranspose2d(4, 6, 1),
    ],
    ids=repr,
)
def test_a_batch_norm_of_the_input_goes_into_the_conv_after_it(layer):
    net = randomised(nn.Sequential(nn.BatchNorm2d(4), layer))
    _, ledger = check(net, normal(*IMAGE))
    assert hows(ledger) == {"0": "into '1' after it"}


@pytest.mark.parametrize(
    "layer",
    [
        conv(kernel=3, padding=1),
        conv(kernel=3, padding="same"),
        nn.ConvTranspose2d(4, 6, 2),
    ],
    ids=repr,
)
def test_a_shift_does_not_pass_zero_padding(layer):
    net = randomised(nn.Sequential(nn.BatchNorm2d(4), layer))
    check(net, normal(*IMAGE), left={"0": "pads with zeros"})


@pytest.mark.parametrize(
    "layer", [conv(kernel=3, padding=1), nn.ConvTranspose2d(4, 6, 2)]
)
def test_a_mere_scale_passes_zero_padding(layer):
    net = randomised(nn.Sequential(nn.BatchNorm2d(4), layer))
    net[0].running_mean.zero_()
    net[0].bias.data.zero_()
    check(net, normal(*IMAGE))


def test_a_batch_norm_after_flattening_goes_through_to_either_side():
    net = nn.Sequential(nn.GELU(), nn.Flatten(), nn.BatchNorm1d(120), nn.Linear(120, 3))
    check(randomised(net), normal(*IMAGE))
    net = nn.Sequential(conv(), nn.Flatten(), nn.BatchNorm1d(120))
    # Each position has its own map, which a convolution does not.
    check(randomised(net), normal(*IMAGE), left={"2": "the map changes along"})


def test_a_batch_norm_between_permutes_goes_into_the_linear_layer():
    def forward(net, x):
        y = net.fc(x.permute(0, 2, 3, 1)).reshape(2, 30, 2, 3).transpose(1, 3)
        return net.bn(y.flatten(1, 2))

    net = Net(forward, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))
    check(randomised(net), normal(*IMAGE))


def test_the_parts_of_a_concatenation_each_take_their_own():
    net = Net(
        lambda net, x: net.bn(torch.cat([net.a(x), net.b(x)], 1)),
        a=conv(4, 3),
        b=conv(4, 2),
        bn=nn.BatchNorm2d(5),
    )
    _, ledger = check(randomised(net), normal(*IMAGE))
    assert hows(ledger) == {"bn": "into 'a', 'b' before it"}


def test_one_part_of_a_split_is_mapped_and_the_other_is_not():
    def forward(net, x):
        left, right = net.conv(x).chunk(2, 1)
        return torch.cat([F.gelu(net.bn(left)), F.gelu(right)], 1)

    net = Net(forward, conv=conv(4, 6), bn=nn.BatchNorm2d(3))
    check(randomised(net), normal(*IMAGE))


def test_a_sum_of_two_layers_takes_the_scale_twice_and_the_shift_once():
    net = Net(
        lambda net, x: net.bn(net.a(x) - 2 * net.b(x) + 0.5),
        a=conv(),
        b=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE))


def test_a_sum_with_a_stream_that_is_used_elsewhere_blocks():
    net = Net(
        lambda net, x: net.bn(net.a(x) + (y := F.gelu(x))) + y,
        a=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "gelu"})


def test_a_parameter_in_the_sum_is_mapped_too():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(6)
            self.where = nn.Parameter(torch.randn(1, 5, 6))

        def forward(self, x):
            y = self.fc(x) + self.where
            return self.bn(y.transpose(1, 2))

    _, ledger = check(randomised(Positions()), normal(2, 5, 4))
    assert "where" in ledger.entries[0].where


def test_a_factor_that_is_a_parameter_or_a_number_lets_it_through():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), nn.BatchNorm2d(4)
            self.gamma = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            return self.bn(-(self.conv(x) * self.gamma / 3))

    check(randomised(Scaled()), normal(*IMAGE))


def test_a_gate_lets_a_scale_through_and_no_shift():
    net = Net(
        lambda net, x: net.bn(net.conv(x) * F.sigmoid(x.mean((2, 3), keepdim=True))),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    net = randomised(net)
    check(net, normal(*IMAGE), left={"bn": "lets a scale through, not a shift"})
    net.bn.running_mean.zero_()
    net.bn.bias.data.zero_()
    check(net, normal(*IMAGE))


def test_behind_a_gate_the_scale_goes_before_and_the_shift_after():
    net = Net(
        lambda net, x: net.head(
            net.bn(net.conv(x) * F.sigmoid(x.mean((2, 3), keepdim=True)))
        ),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
        head=conv(kernel=3),
    )
    check(randomised(net), normal(*IMAGE))


class PreActivation(nn.Module):
    """Two blocks of a pre-activation ResNet with a stem and a head."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        for block in (1, 2):
            for half in (1, 2):
                setattr(self, f"bn{block}{half}", nn.BatchNorm2d(channels))
                layer = nn.Conv2d(channels, channels, 3, padding=1, bias=half == 2)
                setattr(self, f"conv{block}{half}", layer)
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in (1, 2):
            y = x
            for half in (1, 2):
                y = F.relu(getattr(self, f"bn{block}{half}")(y))
                y = getattr(self, f"conv{block}{half}")(y)
            x = x + y
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


def test_a_residual_stream_is_rebased():
    net = randomised(PreActivation(), signs=False)
    _, ledger = check(net, normal(2, 3, 6, 6))
    assert hows(ledger)["bn12"] == "into 'conv11' before it"
    assert hows(ledger)["bn11"].startswith("into 'stem' before it and into")


def test_a_residual_stream_with_signs_that_differ_is_not():
    net = randomised(PreActivation(), signs=True)
    # The first takes the stream with its own signs, on which the others do not agree.
    reason = "of its 4 scales are negative after the folds before it"
    check(net, normal(2, 3, 6, 6), left={"bn21": reason, "bn": reason})


def test_a_stream_that_cannot_turn_its_signs_takes_the_shift_alone():
    # As in MobileNetV4: what reads the stream bears no sign, and what reads the batch
    # norm pads with zeros; the shift goes into the bias of the stream's last term.
    def forward(net, x):
        x = net.stem(x)
        x = x + net.first(F.gelu(x))
        return F.gelu(x + net.second(net.bn(x)))

    net = Net(
        forward,
        stem=conv(),
        first=conv(kernel=3, padding=1),
        bn=nn.BatchNorm2d(4),
        second=conv(kernel=3, padding=1, bias=False),
    )
    _, ledger = check(randomised(net), normal(*IMAGE))
    assert hows(ledger)["bn"] == "into 'first' before it and into 'second' after it"


class Attention(nn.Module):
    def __init__(self, *, fused):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.bn = nn.BatchNorm1d(6)
        self.fused = fused

    def forward(self, x):
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            a = (q @ k.transpose(-2, -1) / math.sqrt(c / 2)).softmax(-1)
            y = a @ v
        return self.bn(y.transpose(1, 2).reshape(n, t, c).transpose(1, 2))


@pytest.mark.parametrize("fused", [False, True])
def test_after_attention_the_map_goes_into_the_values(fused):
    _, ledger = check(randomised(Attention(fused=fused)), normal(2, 5, 6))
    assert hows(ledger) == {"bn": "into 'qkv' before it"}


def test_after_weights_that_do_not_sum_to_one_only_a_scale_goes():
    net = Net(
        lambda net, x: net.bn((x.sigmoid() @ net.v(x)).transpose(1, 2)),
        v=nn.Linear(5, 5),
        bn=nn.BatchNorm1d(5),
    )
    net = randomised(net)
    check(net, normal(2, 5, 5), left={"bn": "do not sum to 1"})
    net.bn.running_mean.zero_()
    net.bn.bias.data.zero_()
    check(net, normal(2, 5, 5))


class RepBlock(nn.Module):
    """RepVGG's training block: 3×3, 1×1 and identity branch, each with batch norm."""

    def __init__(self, channels, groups):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.narrow = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.bn_wide = nn.BatchNorm2d(channels)
        self.bn_narrow = nn.BatchNorm2d(channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.bn_wide(self.wide(x)) + self.bn_narrow(self.narrow(x))
        y += self.bn(x)
        return F.relu_(y)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_identity_branch_goes_into_the_parallel_convolution(groups):
    net = nn.Sequential(RepBlock(4, groups), RepBlock(4, groups))
    _, ledger = check(randomised(net), normal(*IMAGE))
    assert "in a parallel branch" in hows(ledger)["0.bn"]


def test_an_identity_branch_with_a_minus_goes_there_too():
    net = Net(
        lambda net, x: x + 0.7 * (net.conv(x) - net.bn(x)),
        conv=conv(kernel=3, padding=1, groups=4),
        bn=nn.BatchNorm2d(4),
    )
    _, ledger = check(randomised(net), normal(*IMAGE))
    assert hows(ledger) == {"bn": "into 'conv' in a parallel branch"}


def test_a_batch_norm_after_a_layer_norm_goes_into_its_weight():
    net = Net(
        lambda net, x: net.bn(net.ln(x).transpose(1, 2)),
        ln=nn.LayerNorm(6),
        bn=nn.BatchNorm1d(6),
    )
    _, ledger = check(randomised(net), normal(2, 5, 6))
    assert hows(ledger) == {"bn": "into 'ln' before it"}
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    check(randomised(net), normal(*IMAGE))


def test_a_batch_norm_before_a_layer_norm_stays():
    net = nn.Sequential(nn.GELU(), nn.BatchNorm1d(5), nn.LayerNorm(5))
    check(randomised(net), normal(3, 5), left={"1": "measures"})


def test_a_batch_norm_after_an_embedding_goes_into_the_table():
    net = Net(
        lambda net, x: net.bn(net.table(x)),
        table=nn.Embedding(7, 5),
        bn=nn.BatchNorm1d(5),
    )
    check(randomised(net), torch.tensor([1, 3, 3, 6]))


def test_a_scale_goes_through_a_relu_to_the_layer_after_the_next():
    net = nn.Sequential(
        nn.GELU(), nn.BatchNorm2d(4), nn.ReLU(), conv(kernel=3, padding=1)
    )
    net = randomised(net, signs=False)
    net[1].running_mean.zero_()
    net[1].bias.data.zero_()
    check(net, normal(*IMAGE))


def test_where_padding_forbids_the_shift_only_a_sum_per_channel_stays():
    net = nn.Sequential(nn.GELU(), nn.BatchNorm2d(4), conv(kernel=3, padding=1))
    folded, ledger = check(
        randomised(net), normal(*IMAGE), left={"1": "a sum per channel stays"}
    )
    (entry,) = ledger.entries
    assert entry.reduced
    assert entry.where == ("2.weight",)
    assert entry.parameters_saved == 4 * 4 - 4
    assert [name for name, _ in folded[1].named_parameters()] == ["bias"]
    assert "reduced into '2' after it, its scale alone" in ledger.to_text()


def test_behind_a_gate_with_another_reader_a_sum_stays_and_the_scale_goes_before():
    net = Net(
        lambda net, x: F.gelu(net.bn(net.conv(x) * torch.sigmoid(x))),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    _, ledger = check(randomised(net), normal(*IMAGE), left={"bn": "not a shift"})
    assert ledger.entries[0].how == "into 'conv' before it, its scale alone"


def test_a_combined_class_keeps_its_activation_behind_the_sum():
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    net = Net(
        lambda net, x: net.bn(net.conv(x) * torch.sigmoid(x)),
        conv=conv(),
        bn=NormAct(4),
    )
    folded, _ = check(randomised(net), normal(*IMAGE), gone=set())
    assert [type(part).__name__ for part in folded.bn] == ["Shift", "ReLU"]
