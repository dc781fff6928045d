"""Single layers at the shapes of ResNet-50 and of transformers, against the floor.

The floor is the fewest bytes that must move, over the bandwidth of a plain copy
measured in the same run. Bytes per element of a half, forward / backward:

    BN, BN+ReLU     6 / 10       x twice, y  /  dy and x twice, dx
    BN+add+ReLU     8.1 / 12.3   and the residual, its gradient, one bit for the gate
    rows            4 / 6        x, y  /  dy, x, dx
    add+rows        8 / 8        x, residual, sum, y  /  dy, dsum, sum, dx
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.stages import Case, Row
from benchmarks.gpu.timing import Bench
from torch import Tensor

import normkit
from normkit.kernels.gpu import config

__all__ = ["batch_norm", "cases", "row_norm"]

# Channels, height, and how many norms of each form the network has there:
# alone (before the sum in a shortcut), with ReLU, with sum and ReLU.
RESNET_50 = [
    (256, 56, (1, 0, 3)),
    (64, 112, (0, 1, 0)),
    (64, 56, (0, 6, 0)),
    (128, 56, (0, 1, 0)),
    (128, 28, (0, 7, 0)),
    (512, 28, (1, 0, 4)),
    (256, 28, (0, 1, 0)),
    (256, 14, (0, 11, 0)),
    (1024, 14, (1, 0, 6)),
    (512, 14, (0, 1, 0)),
    (512, 7, (0, 5, 0)),
    (2048, 7, (1, 0, 3)),
]
ROWS = [(4096, 4096), (16384, 4096), (16384, 8192), (16384, 16384)]
BYTES = {
    "BN": (6, 10),
    "BN+ReLU": (6, 10),
    "BN+add+ReLU": (8.125, 12.25),
    "LayerNorm": (4, 6),
    "RMSNorm": (4, 6),
    "add+LayerNorm": (8, 8),
    "add+RMSNorm": (8, 8),
}
FORMS = ("BN", "BN+ReLU", "BN+add+ReLU")
# Enough inputs that none is left in a cache of 60 MB when its turn comes again.
BYTES_IN_ROTATION = 256_000_000

Functions = dict[str, Callable[..., Any]]
_AS_THEY_ARE: Mapping[str, int] = {}


def cases(bench: Bench) -> list[Case]:
    """Return torch eager and the copy first; then torch.compile, which takes longer."""
    batches = (2,) if bench.is_dry else (64, 256)
    images = [(16, 4, (1, 1, 1))] if bench.is_dry else RESNET_50
    widths = [(8, 64)] if bench.is_dry else ROWS
    found = []
    for against in ("eager", "compile"):
        for batch in batches:
            for channels, size, counts in images:
                for form, count in zip(FORMS, counts, strict=True):
                    shape = (batch, channels, size, size)
                    run = functools.partial(
                        batch_norm, bench, shape, form, against, count=count
                    )
                    found += [Case(f"{form} {shape} {against}", run)] * bool(count)
        for shape in widths:
            for form in list(BYTES)[3:]:
                run = functools.partial(row_norm, bench, shape, form, against)
                found.append(Case(f"{form} {shape} {against}", run))
    # The rows before batch 256: less is known about them.
    return sorted(
        found, key=lambda case: ("compile" in case.name, "(256," in case.name)
    )


def batch_norm(
    bench: Bench,
    shape: tuple[int, ...],
    form: str,
    against: str,
    *,
    count: int = 1,
    numbers: Mapping[str, int] = _AS_THEY_ARE,
) -> Iterator[Row]:
    """Measure a batch norm in bfloat16 and channels_last, both directions.

    Args:
        bench: Device and rounds.
        shape: Of x.
        form: A key of `BYTES`.
        against: "eager" or "compile" of torch; "today", ours without `numbers`.
        count: How often a ResNet-50 has it.
        numbers: Values for names of `config` while ours runs.
    """
    activation = "relu" if "ReLU" in form else "none"
    weight, bias, mean, var = (
        torch.rand(shape[1], device=bench.device) for _ in range(4)
    )

    def ours(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return normkit.functional.batch_norm(
            *(x, mean, var, weight, bias, True),
            activation=activation,
            residual=residual,
        )

    def torchs(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
        y = y if residual is None else y + residual
        return F.relu(y) if activation == "relu" else y

    learned = [weight.requires_grad_(), bias.requires_grad_()]
    functions = {"ours": ours, against: ours if against == "today" else torchs}
    for row in _compare(bench, form, shape, functions, learned, numbers):
        yield {**row, "count": count}


def row_norm(
    bench: Bench,
    shape: tuple[int, ...],
    form: str,
    against: str,
    *,
    numbers: Mapping[str, int] = _AS_THEY_ARE,
) -> Iterator[Row]:
    """Measure a layer or RMS norm of bfloat16 rows, as `batch_norm` does."""
    width = shape[-1:]
    learned = [
        torch.rand(width, device=bench.device).bfloat16().requires_grad_()
        for _ in range(1 if "RMS" in form else 2)
    ]
    name = "rms_norm" if "RMS" in form else "layer_norm"

    def ours(x: Tensor, residual: Tensor | None = None) -> Any:
        norm = getattr(normkit.functional, name)
        return norm(x, width, *learned, 1e-5, residual=residual)

    def torchs(x: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        y = getattr(F, name)(total, width, *learned, 1e-5)
        return y if residual is None else (y, total)

    functions = {"ours": ours, against: ours if against == "today" else torchs}
    yield from _compare(bench, form, shape, functions, learned, numbers)


def _compare(
    bench: Bench,
    form: str,
    shape: tuple[int, ...],
    functions: Functions,
    learned: list[Tensor],
    numbers: Mapping[str, int],
) -> Iterator[Row]:
    """Measure both directions of some functions, interleaved; and a plain copy of x.

    Args:
        bench: Device and rounds.
        form: A key of `BYTES`.
        shape: Of x.
        functions: Of x and, if the form has a sum, the residual; "compile" is compiled.
        learned: Weight and bias, whose gradients are computed.
        numbers: Values for names of `config` while "ours" runs, both ways.
    """
    elements, has_sum = torch.Size(shape).numel(), "add" in form
    copies = max(2, min(16, -(-BYTES_IN_ROTATION // (2 * elements))))
    copies = 1 if bench.is_dry else copies
    sets = [_inputs(bench, shape, 2 if has_sum else 1) for _ in range(copies)]
    if "compile" in functions:
        # One function's code serves all shapes; its cache must not fill up.
        torch._dynamo.reset()
        compiled = bench.compile(functions["compile"])
        functions = {**functions, "compile": compiled}
    target = torch.empty_like(sets[0][0])

    def forward(run: Callable[..., Any]) -> Callable[[int], object]:
        return lambda turn: run(*sets[turn % copies])

    def backward(run: Callable[..., Any]) -> Callable[[int], object]:
        graphs = []
        for inputs in sets:
            y = run(*inputs)
            outputs = y if isinstance(y, tuple) else (y,)
            graphs.append((outputs, [torch.randn_like(o) for o in outputs]))

        def call(turn: int) -> object:
            outputs, dy = graphs[turn % copies]
            wanted = [*sets[turn % copies], *learned]
            return torch.autograd.grad(outputs, wanted, dy, retain_graph=True)

        return call

    for direction, prepare, per_element in zip(
        ("forward", "backward"), (forward, backward), BYTES[form], strict=True
    ):
        contestants = {name: prepare(run) for name, run in functions.items()}
        contestants["ours"] = _with(numbers, contestants["ours"])
        if direction == "forward":
            contestants["copy"] = lambda turn: target.copy_(
                sets[turn % copies][0].detach()
            )
        times = bench.medians(contestants)
        row: Row = {"what": form, "shape": shape, "pass": direction}
        yield {**row, "bytes": per_element * elements, "times": times}


def _with(
    numbers: Mapping[str, int], call: Callable[[int], object]
) -> Callable[[int], object]:
    """Return `call` under other numbers of `config`; their names must exist."""

    def under(turn: int) -> object:
        before = {name: getattr(config, name) for name in numbers}
        vars(config).update(numbers)
        config.forget()
        try:
            return call(turn)
        finally:
            vars(config).update(before)
            config.forget()

    return under if numbers else call


def _inputs(bench: Bench, shape: tuple[int, ...], count: int) -> list[Tensor]:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return [
        torch.randn(shape, device=bench.device)
        .to(torch.bfloat16, memory_format=layout)
        .requires_grad_()
        for _ in range(count)
    ]
