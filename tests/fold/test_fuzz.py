"""Random networks: whatever is folded stays the same function, to 1e-9 in float64.

Hypothesis writes a small program: each step reads one or two of the tensors made so far
and makes another. Batch norms fall anywhere, some with negative weights, some shared.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import normkit
from fold.randomised import assert_same, randomise

CHANNELS, SIZE = 4, 4


def layer(kind: str) -> nn.Module:
    return {
        "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
        "padded conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
        "reflecting conv": lambda: nn.Conv2d(
            CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect"
        ),
        "grouped conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, groups=2),
        "depthwise conv": lambda: nn.Conv2d(
            CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS
        ),
        "transposed conv": lambda: nn.ConvTranspose2d(
            CHANNELS, CHANNELS, 3, padding=1, groups=2
        ),
        "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
        "plain batch norm": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
        "shuffle": lambda: nn.ChannelShuffle(2),
        "max pool": lambda: nn.MaxPool2d(3, stride=1, padding=1),
        "average pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
        "true average pool": lambda: nn.AvgPool2d(
            3, stride=1, padding=1, count_include_pad=False
        ),
        "linear": lambda: nn.Linear(SIZE, SIZE),
        "relu": nn.ReLU,
        "relu in place": lambda: nn.ReLU(inplace=True),
        "gelu": nn.GELU,
        "group norm": lambda: nn.GroupNorm(2, CHANNELS),
        "dropout": lambda: nn.Dropout(0.5),
    }[kind]()


LAYERS = [
    "conv",
    "padded conv",
    "reflecting conv",
    "grouped conv",
    "depthwise conv",
    "transposed conv",
    "shuffle",
    "max pool",
    "average pool",
    "true average pool",
    "linear",
    "relu",
    "relu in place",
    "gelu",
    "group norm",
    "dropout",
]
JOINS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - 2 * b,
    "add in place": lambda a, b: a.clone().add_(b),
    "gate": lambda a, b: a * b.mean((2, 3), keepdim=True).sigmoid(),
    "halves": lambda a, b: torch.cat([a.chunk(2, 1)[0], b.chunk(2, 1)[1]], 1),
    "attend": lambda a, b: (a @ a.transpose(-2, -1)).softmax(-1) @ b,
    "turn": lambda a, b: a.transpose(2, 3) + b,
    "scale": lambda a, b: 0.5 * a + 1.0,
    "pad": lambda a, b: F.pad(b, (1, 0, 0, 1))[..., 1:, :-1],
    "flatten": lambda a, b: a.flatten(2).reshape(b.shape),
}


class Program(nn.Module):
    """Steps (kind, which layer, first operand, second operand) on a list of tensors."""

    def __init__(self, steps, seed, signs):
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        names = {(kind, which) for kind, which, _, _ in steps if kind not in JOINS}
        self.keys = {name: f"m{i}" for i, name in enumerate(sorted(names))}
        self.layers = nn.ModuleDict({k: layer(n[0]) for n, k in self.keys.items()})
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                randomise(module, signs=signs)

    def forward(self, x):
        made = [x.clone()]
        for kind, which, first, second in self.steps:
            # Mostly the newest, so that programs are deep.
            a, b = made[-1 - first % len(made)], made[-1 - second % len(made)]
            if kind in JOINS:
                made.append(JOINS[kind](a, b))
            else:
                made.append(self.layers[self.keys[kind, which]](a))
        return made[-1], made[-2]


steps = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["batch norm", "batch norm", "plain batch norm", "conv"]),
            st.sampled_from(LAYERS),
            st.sampled_from(sorted(JOINS)),
        ),
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 0, 1, 2]),
        st.sampled_from([1, 1, 0, 2, 3]),
    ),
    min_size=3,
    max_size=8,
)


def fold_and_compare(program, seed, signs):
    net = Program(program, seed, signs).double().eval()
    x = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    folded, ledger = normkit.fold(net, x)
    assert_same(net, folded, x, torch.randn_like(x))
    # The rules themselves must be right: the proof is a net below, not a crutch.
    for entry in ledger.left:
        assert "undone" not in entry.reason, f"\n{ledger}"
        assert entry.reason


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.integers(0, 2**16), st.booleans())
def test_a_random_network_stays_the_same_function(program, seed, signs):
    fold_and_compare(program, seed, signs)


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.integers(0, 2**16), st.booleans())
def test_many_random_networks_stay_the_same_function(program, seed, signs):
    fold_and_compare(program, seed, signs)
