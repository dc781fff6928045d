"""Each kind of linear map with a batch norm after it, of torch.nn and of normkit.nn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from fold.randomised import check, randomise, randomised

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def norms(spatial, source):
    return getattr(source, f"BatchNorm{spatial}d")


@pytest.mark.parametrize("source", [nn, normkit.nn], ids=["torch", "normkit"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("kind", [CONV, TRANSPOSED], ids=["conv", "transposed"])
def test_a_convolution_takes_the_batch_norm_after_it(kind, spatial, groups, source):
    conv = kind[spatial](4, 8, 3, stride=2, padding=1, groups=groups, bias=groups > 1)
    net = randomised(nn.Sequential(conv, norms(spatial, source)(8)))
    x = torch.randn(2, 4, *(7, 6, 5)[:spatial], dtype=torch.float64)
    folded, ledger = check(net, x)
    assert isinstance(folded[1], nn.Identity)
    assert folded[0].bias is not None
    assert ledger.entries[0].where == ("0.weight", "0.bias")


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_a_linear_layer_takes_the_batch_norm_over_its_features(shape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 6, bias=False)
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x):
            y = self.fc(x)
            if y.dim() == 2:
                return self.bn(y)
            return self.bn(y.transpose(1, 2)).transpose(1, 2)

    check(randomised(Net()), torch.randn(shape, dtype=torch.float64))


def test_a_gemm_takes_the_batch_norm_in_spite_of_alpha_and_beta():
    class Gemm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6))
            self.bias = nn.Parameter(torch.randn(6))
            self.before, self.bn = nn.BatchNorm1d(3), nn.BatchNorm1d(6)

        def forward(self, x):
            x = self.before(x)
            y = torch.addmm(self.bias, x, self.weight, alpha=2.0, beta=-0.5)
            return self.bn(y)

    check(randomised(Gemm()), torch.randn(5, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(6, affine=False),
        lambda: (
            nn.BatchNorm2d(6, bias=False)
            if "bias" in nn.BatchNorm2d.__init__.__code__.co_varnames
            else nn.BatchNorm2d(6)
        ),
        lambda: nn.BatchNorm2d(6, momentum=None),
        lambda: nn.SyncBatchNorm(6),
        lambda: nn.BatchNorm2d(6, eps=0.3),
    ],
    ids=["no affine", "no bias", "cumulative", "synchronised", "large eps"],
)
def test_every_form_of_batch_norm_folds(make):
    net = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), make()))
    check(net, torch.randn(2, 3, 6, 6, dtype=torch.float64))


def test_a_functional_batch_norm_in_a_module_of_its_own_folds():
    class MyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.var, self.gain, eps=1e-3)

    net = nn.Sequential(nn.Conv1d(2, 4, 3), MyNorm()).double().eval()
    folded, _ = check(net, torch.randn(2, 2, 9, dtype=torch.float64), gone={"1"})
    assert isinstance(folded[1], nn.Identity)


def test_a_functional_batch_norm_among_other_code_is_left_without_effect():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x):
            return F.relu(F.batch_norm(self.conv(x), self.mean, self.var))

    net = nn.Sequential(Block()).double().eval()
    x = torch.randn(2, 2, 9, dtype=torch.float64)
    folded, ledger = check(net, x)
    assert torch.equal(folded[0].mean, torch.zeros(4, dtype=torch.float64))
    assert "its call stays, and changes nothing" in ledger.entries[0].how


def test_a_functional_batch_norm_upon_tensors_that_are_no_buffers_says_what_to_do():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.var = nn.Conv1d(2, 4, 3), torch.rand(4).double() + 0.5
            self.register_buffer("mean", torch.randn(4))

        def forward(self, x):
            return F.relu(F.batch_norm(self.conv(x), self.mean, self.var))

    net = nn.Sequential(Block()).double().eval()
    x = torch.randn(2, 2, 9, dtype=torch.float64)
    check(net, x, left={"0": "make it a module of its own"})


def test_the_activation_of_a_combined_class_stays():
    class BatchNormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop = nn.Identity()
            self.act = nn.SiLU()

        def forward(self, x):
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias
            )
            return self.act(self.drop(y))

    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct(4)))
    folded, _ = check(net, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert isinstance(folded[1].act, nn.SiLU)


def test_a_deep_chain_of_all_kinds_folds():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
        nn.BatchNorm1d(5),
    )
    _, ledger = check(randomised(net), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert [entry.how for entry in ledger.entries] == [
        "into '0' before it",
        "into '3' before it",
        "into '7' before it",
    ]


def test_the_folded_model_rounds_once_to_the_dtype_of_its_weights():
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    short, _ = normkit.fold(net.float(), torch.randn(1, 3, 5, 5))
    wide = normkit.fold(net.double(), torch.randn(1, 3, 5, 5))[0]
    assert short[0].weight.dtype == short[0].bias.dtype == torch.float32
    assert torch.equal(short[0].weight, wide[0].weight.float())


def test_requires_grad_is_inherited():
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    net[0].weight.requires_grad_(False)
    folded, _ = check(net, torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad


def test_in_place_folds_the_model_itself():
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    expected = net(x)
    folded, _ = normkit.fold(net, x, inplace=True)
    assert folded is net
    assert isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net(x), expected)


def test_a_state_dict_loads_back_into_the_folded_class():
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    folded, _ = check(net, x)
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity()).double()
    again.load_state_dict(folded.state_dict())
    torch.testing.assert_close(again(x), net(x))


def test_a_model_in_bfloat16_folds_in_float64():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    randomise(norm)
    net = nn.Sequential(conv, norm).bfloat16().eval()
    x = torch.randn(2, 3, 6, 6).bfloat16()
    folded, ledger = normkit.fold(net, x)
    assert len(ledger.folded) == 1
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.bfloat16
    expected = net.double()(x.double())
    assert (folded(x).double() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_frozen_batch_norm_written_out_by_hand_folds():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.register_buffer("weight", torch.randn(channels))
            self.register_buffer("bias", torch.randn(channels))
            self.register_buffer("running_mean", torch.randn(channels))
            self.register_buffer("running_var", torch.rand(channels) + 0.5)

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), nn.GELU())
    net = net.double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded, ledger = check(net, x, gone={"1"})
    assert isinstance(folded[1], nn.Identity)
    assert ledger.entries[0].kind == "FrozenBatchNorm2d"
