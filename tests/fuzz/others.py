"""The layers and functions that `layers` does not know, each against its definition.

Bounds come from the definition itself: how far it moves when its input is changed by a
rounding, some dozens of times.
"""

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzz.cases import OtherCase
from fuzz.definitions import KINDS, Function, Tensors
from fuzz.tensors import DTYPES, drawn, laid_out, layouts, seeds

# Roundings on the way from x to a result: three steps of an LSTM, of eight operations
# and three norms each, are about 50; everything else has fewer. The largest of 1,400
# cases was 3.8.
ROUNDINGS = 64


# Of a covariance, a recurrence and a slope that jumps, hard fills ask too much.
GENTLE = (
    *("WhiteningBatchNorm", "BatchNormLSTM", "FilterResponseNorm and TLU"),
    "backward_as_whole",
)
POSITIONS = {
    "RecurrentBatchNorm": 1,
    "BatchNormLSTM": 1,
    "FilterResponseNorm and TLU": 1,
}


@st.composite
def other_cases(draw: st.DrawFn) -> OtherCase:
    """Draw a case of any kind."""
    kind = draw(st.sampled_from(list(KINDS)))
    least = POSITIONS.get(kind, 0)
    sizes = st.sampled_from([1, 2, 3, 7])
    positions = tuple(draw(st.lists(sizes, min_size=least, max_size=3)))
    samples = draw(st.sampled_from([2, 3, 4, 9]))
    if kind == "WhiteningBatchNorm":
        samples = 31
    if kind == "BatchNormLSTM":
        samples, positions = 9, (3,)
    gentle = kind in GENTLE
    fills = ["normal"] if gentle else ["normal", "offset", "constant", "outlier"]
    dtypes = ["float32", "float64"] if gentle else list(DTYPES)
    # An expanded input has channels that are alike: no covariance to whiten by.
    plain = st.sampled_from(["contiguous", "reversed", "strided", "negated"])
    return OtherCase(
        kind=kind,
        samples=samples,
        channels=4 if kind == "WhiteningBatchNorm" else draw(sizes),
        positions=positions,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(plain if gentle else layouts),
        grad_layout=draw(layouts),
        fill=draw(st.sampled_from(fills)),
        seed=draw(seeds),
        training=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        option=draw(st.integers(0, 31)),
        masked=draw(st.booleans()),
    )


def check(case: OtherCase) -> None:
    """Compare the output and every gradient with the definition.

    Raises:
        AssertionError: One is off.
    """
    if case.kind == "BatchNormLSTM":
        case = replace(case, eps=max(case.eps, 1e-3))  # nine values may be all alike
    dtype = DTYPES[case.dtype]
    vectors, ours, truth = KINDS[case.kind](case)
    x = laid_out(drawn(case.shape, case.fill, case.seed, case.dtype), case.layout)
    given = {"x": x} | {k: v.to(dtype) for k, v in vectors.items()}
    leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
    y = ours(leaves)
    dy = drawn(tuple(y.shape), "normal", case.seed + 3, case.dtype)
    dy = laid_out(dy, case.grad_layout)
    # In eval, batch norm's weight may be read by no output.
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    found = [y, *grads]
    exact, moved = _sensitivity(given, truth, dy)
    # Terms of a gradient that cancel are as large as 1/√eps allows: dy·weight/std.
    gain = max([1.0, *(float(v.abs().max()) for v in vectors.values())])
    pull = float(dy.abs().max()) * gain * case.eps**-0.5
    wide = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    names = ["y", *(f"d{k}" for k in leaves)]
    for name, a, b, change in zip(names, found, exact, moved, strict=True):
        if a is None or b is None or not b.numel():
            continue
        out = torch.finfo(a.dtype)
        size = max(1.0, float(b.abs().max()), 0.0 if name == "y" else pull)
        allowed = ROUNDINGS * (change + wide.eps * size)
        if a.dtype.itemsize == 2:
            # Half an eps of the output; of a gradient, of dy·act′, of weight·dy, and of
            # the sum with a second reader as well. Of a recurrence autograd adds the
            # gradients of the steps up in halves, one after the other.
            steps = math.prod(case.positions) if "Recurrent" in case.kind else 1
            largest = b.abs().max() + (dy.abs().max() if steps > 1 else 0)
            allowed = allowed + (1.5 + steps / 2) * out.eps * largest
        assert math.isfinite(float(allowed)), f"of {name} nothing is known"
        error = (a.detach().double() - b)[b.to(a.dtype).isfinite()].abs()
        error = float(error.max()) if error.numel() else 0.0
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"


def _sensitivity(
    given: Tensors, truth: Function, dy: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Return output and gradients in float64, and how a rounding of x moves each."""

    def run(x: Tensor) -> list[Tensor]:
        leaves = {k: v.double().requires_grad_() for k, v in given.items()}
        leaves["x"] = x.requires_grad_()
        y = truth(leaves)
        wanted = list(leaves.values())
        grads = torch.autograd.grad(
            y, wanted, dy.double(), allow_unused=True, materialize_grads=True
        )
        return [y.detach(), *grads]

    x = given["x"].detach().double()
    exact = run(x.clone())
    eps = torch.finfo(
        torch.float64 if given["x"].dtype is torch.float64 else torch.float32
    ).eps
    g = torch.Generator().manual_seed(0)
    # Of the spread, not of the values: in float32 an offset loses nothing. Of float64
    # the truth is float64 itself.
    is_wide = given["x"].dtype is torch.float64
    spread = x.abs() if is_wide else (x - x.mean()).abs()
    moved = [0.0] * len(exact)
    for _ in range(2):
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        other = run(x + eps * spread * noise)
        for k, (a, b) in enumerate(zip(exact, other, strict=True)):
            if a.numel():
                moved[k] = max(float((a - b).abs().max()), moved[k])
    return exact, moved
