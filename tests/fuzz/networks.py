"""Random networks: folded and converted, they stay the same function.

A network is a small program: each step reads one or two of the tensors made so far and
makes another. Batch norms fall anywhere, some with negative weights, some shared, some
called with other weights than their own; some steps do something else in training. It
is judged on other inputs than those that fold and convert were shown.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import normkit
from fold.randomised import assert_same, randomise
from fuzz.cases import Short
from fuzz.tensors import seeds

CHANNELS, SIZE = 4, 4
LAYERS = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "plain batch norm": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
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
    "shuffle": lambda: nn.ChannelShuffle(2),
    "max pool": lambda: nn.MaxPool2d(3, stride=1, padding=1),
    "average pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "true average pool": lambda: nn.AvgPool2d(
        3, stride=1, padding=1, count_include_pad=False
    ),
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
    "layer norm": lambda: nn.LayerNorm(SIZE),
    "dropout": lambda: nn.Dropout(0.5),
}
JOINS = {
    "add": lambda a, b, training: a + b,
    "relu function": lambda a, b, training: F.relu(a),
    "subtract": lambda a, b, training: a - 2 * b,
    "add in place": lambda a, b, training: a.clone().add_(b),
    "residual in place": lambda a, b, training: a.add_(b),
    "only in training": lambda a, b, training: a * b.tanh() if training else a + 0,
    "only in eval": lambda a, b, training: a + 0 if training else a + b,
    "gate": lambda a, b, training: a * b.mean((2, 3), keepdim=True).sigmoid(),
    "halves": lambda a, b, training: torch.cat([a.chunk(2, 1)[0], b.chunk(2, 1)[1]], 1),
    "attend": lambda a, b, training: (a @ a.transpose(-2, -1)).softmax(-1) @ b,
    "turn": lambda a, b, training: a.transpose(2, 3) + b,
    "scale": lambda a, b, training: 0.5 * a + 1.0,
    "pad": lambda a, b, training: F.pad(b, (1, 0, 0, 1))[..., 1:, :-1],
    "flatten": lambda a, b, training: a.flatten(2).reshape(b.shape),
}
# Of the two operands, the ones whose values a join reads in eval mode; both by default.
READ_IN_EVAL = {
    **dict.fromkeys(("relu function", "only in training", "scale", "flatten"), "a"),
    "pad": "b",
}
IN_PLACE = ("relu in place", "residual in place")
ACTIVATIONS = ("relu", "relu in place", "relu function", "silu", "gelu")
SUMS = ("add", "residual in place", "only in eval")
# Sums of the second operand alone: the first is changed before.
SUMS_OF_SECOND = ("turn", "add in place")
# Calls of a layer with other weights, as `functional_call` makes them.
BORROWED = "batch norm with other weights"
LAYER_OF = {BORROWED: "batch norm"}
Step = tuple[str, int, int, int]


@dataclass(frozen=True, repr=False)
class NetworkCase(Short):
    """A program, what its weights are drawn by, and how it is converted."""

    steps: tuple[Step, ...]
    seed: int = 0
    signs: bool = True
    # Batch norms that stay in training mode while the network folds.
    awake: int = -1
    fuses: bool = True
    memory: str = ""


class Network(nn.Module):
    """Steps (kind, which layer, first operand, second operand) on a list of tensors."""

    def __init__(self, case: NetworkCase) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        self.steps = case.steps
        used = {(LAYER_OF.get(k, k), which) for k, which, _, _ in case.steps}
        names = sorted(name for name in used if name[0] in LAYERS)
        self.keys = {name: f"m{i}" for i, name in enumerate(names)}
        self.layers = nn.ModuleDict({k: LAYERS[n[0]]() for n, k in self.keys.items()})
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                randomise(module, signs=case.signs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = [x.clone()]
        for step in self.steps:
            kind, which = step[:2]
            a, b = (made[k] for k in operands(step, len(made)))
            if kind in JOINS:
                made.append(JOINS[kind](a, b, self.training))
                continue
            layer = self.layers[self.keys[LAYER_OF.get(kind, kind), which]]
            made.append(_with_other_weights(layer, a) if kind == BORROWED else layer(a))
        return made[-1], made[-2]

    def path_of(self, step: Step) -> str:
        """Return the name of the layer that a step calls; empty without one."""
        key = self.keys.get((LAYER_OF.get(step[0], step[0]), step[1]))
        return f"layers.{key}" if key else ""


def _with_other_weights(layer: nn.Module, x: Tensor) -> Tensor:
    weights = {name: 0.5 - v for name, v in layer.named_parameters()}
    return torch.func.functional_call(layer, weights, (x,))


def operands(step: Step, made: int) -> tuple[int, int]:
    """Return which of the tensors made so far a step reads: mostly the newest."""
    _, _, first, second = step
    return made - 1 - first % made, made - 1 - second % made


def readers(steps: tuple[Step, ...], number: int) -> list[int]:
    """Return the steps that read in eval what step `number` made.

    What is read after a change in place is the result of that step.
    """
    found = []
    for later in range(number + 1, len(steps)):
        kind = steps[later][0]
        reads = READ_IN_EVAL.get(kind, "ab") if kind in JOINS else "a"
        for name, tensor in zip("ab", operands(steps[later], later + 1), strict=True):
            # The first tensor is the input.
            if tensor == number + 1 and name in reads:
                found.append(later)
        if kind in IN_PLACE and later in found:
            break
    return found


steps = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["batch norm", "batch norm", "plain batch norm", "conv"]),
            st.sampled_from(["relu", "relu in place", "relu function", "add"]),
            # What waits for its reader, and does not find it at once.
            st.sampled_from([BORROWED, "relu", "only in eval", "residual in place"]),
            st.sampled_from(list(LAYERS)),
            st.sampled_from(list(JOINS)),
        ),
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 0, 1, 2]),
        st.sampled_from([1, 1, 0, 2, 3]),
    ),
    min_size=3,
    max_size=8,
).map(tuple)
network_cases = st.builds(
    NetworkCase,
    steps=steps,
    seed=seeds,
    signs=st.booleans(),
    awake=st.sampled_from([-1, -1, -1, 0, 1]),
    fuses=st.sampled_from([True, True, True, False]),
    memory=st.sampled_from(["", "", "recompute"]),
)


def example(case: NetworkCase, *, samples: int = 2, seed: int = 0) -> Tensor:
    """An input of the network."""
    g = torch.Generator().manual_seed(case.seed + seed)
    shape = (samples, CHANNELS, SIZE, SIZE)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def check_fold(case: NetworkCase) -> None:
    """Fold; the network is the same function, on inputs that fold did not see.

    Raises:
        AssertionError: It is not, or a rule was wrong and the proof undid its fold.
    """
    net = Network(case).double().eval()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    if 0 <= case.awake < len(norms):
        norms[case.awake].train()
    state = copy.deepcopy(net.state_dict())
    x = example(case)
    folded, ledger = normkit.fold(net, x)
    assert all(map(torch.equal, state.values(), net.state_dict().values()))
    others = [example(case, samples=n, seed=n) for n in (1, 2, 5)]
    if case.awake >= 0:
        others = others[1:]
    assert_same(net, folded, x, *others)
    # The rules themselves must be right: the proof is a net below, not a crutch.
    for entry in ledger.left:
        assert "undone" not in entry.reason, f"\n{ledger}"
        assert entry.reason


def check_convert(case: NetworkCase) -> None:
    """Convert and back; in both modes the network computes what it did.

    Raises:
        AssertionError: An output, gradient or running statistic differs.
    """
    # Small inputs wait for their readers as large ones do.
    with mock.patch("normkit.nn.deferral.MIN_VALUES", 0):
        _check_convert(case)


def _check_convert(case: NetworkCase) -> None:
    net = Network(case).double()
    ours = copy.deepcopy(net)
    report = normkit.convert(
        ours,
        to="normkit",
        example_inputs=example(case) if case.fuses else None,
        memory=case.memory or None,
    )
    _assert_one_reader(net, report.fused, str(report))
    for training in (True, False, True):
        for samples in (2, 5):
            x = example(case, samples=samples, seed=samples + training)
            _assert_alike(net.train(training), ours.train(training), x, str(report))
    folded, _ = normkit.fold(ours.eval(), example(case))
    assert_same(net.eval(), folded, example(case, samples=3, seed=9))
    normkit.convert(ours, to="torch")
    kinds = [[type(m) for m in n.modules()] for n in (net, ours)]
    assert kinds[0] == kinds[1], "the way back leads elsewhere"
    x = example(case, samples=4, seed=4)
    _assert_alike(net.train(), ours.train(), x, "back in torch")


def _assert_one_reader(net: Network, fused: dict[str, str], about: str) -> None:
    """A layer waits where one activation, or one sum before it, reads its output."""
    steps = net.steps
    # A step that nothing reads is no reader. The last two are outputs; what a step in
    # place made is also read by the name of what it changed.
    used = {len(steps) - 1, len(steps) - 2}
    used |= {k for k, step in enumerate(steps) if step[0] in IN_PLACE}
    for number in reversed(range(len(steps))):
        if used & set(readers(steps, number)):
            used.add(number)
    for path in fused:
        calls = [k for k, step in enumerate(steps) if net.path_of(step) == path]
        assert len(calls) == 1, f"{path} is called {len(calls)} times\n{about}"
        of = [k for k in readers(steps, *calls) if k in used]
        if not of:  # nothing reads what it made, or what was made of it
            continue
        kinds = [steps[k][0] for k in of]
        assert len(of) == 1, f"{path} is read by {kinds}\n{about}"
        first, second = operands(steps[of[0]], of[0] + 1)
        is_second = second == calls[0] + 1 and first != second
        sums = (*SUMS, *SUMS_OF_SECOND) if is_second else SUMS
        assert kinds[0] in (*ACTIVATIONS, *sums), f"{path}: {kinds}\n{about}"


def _assert_alike(net: nn.Module, ours: nn.Module, x: Tensor, about: str) -> None:
    wanted = _run(net, x)
    found = _run(ours, x)
    mode = "training" if net.training else "eval"
    for name, value in wanted.items():
        if value is None:  # torch itself has no gradient there
            continue
        other = found.get(name)
        assert other is not None, f"{mode}: {name} is missing\n{about}"
        gap = (other - value).abs().max() / value.abs().max().clamp(min=1.0)
        # Running statistics are float64 here, too; up to eight norms in a row, each of
        # which divides by a spread of 1/√eps = 300 at least, magnify 1e-16 to 1e-8 in
        # a gradient. A wrong conversion is off by 1e-3 and more.
        assert gap <= 1e-6, f"{mode}: {name} differs by {float(gap):.1e}\n{about}"


def _run(net: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Outputs, gradients and state; no gradient where torch's own backward refuses."""
    x = x.clone().requires_grad_()
    net.zero_grad()
    torch.manual_seed(0)  # dropout
    outputs = net(x)
    named: dict[str, Any] = {
        f"output {k}": y.detach().clone() for k, y in enumerate(outputs)
    }
    g = torch.Generator().manual_seed(1)
    total: Any = sum(
        (y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum() for y in outputs
    )
    leaves = {"x": x, **dict(net.named_parameters())}
    grads: Any = [None] * len(leaves)
    with contextlib.suppress(RuntimeError):  # values changed in place, as in torch
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named |= {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}
    buffers = net.state_dict()
    return named | {k: v.double().clone() for k, v in buffers.items()}
