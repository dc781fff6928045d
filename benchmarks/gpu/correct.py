"""Correctness on the device at real shapes, against float64 on the same device."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.gpu.stages import Case, Row
from benchmarks.gpu.timing import Bench
from torch import Tensor

import normkit
import oracles

__all__ = ["cases"]

# What was checked, the error found, and the largest that is right.
Checks = list[tuple[str, float, float]]


IMAGES = [(64, 256, 56, 56), (64, 64, 112, 112), (64, 512, 7, 7), (32, 2048, 7, 7)]
ROWS = [(16384, 4096), (4096, 1024), (4096, 8192), (2048, 16384), (512, 40000)]


def cases(bench: Bench) -> list[Case]:
    """Return the checks, bfloat16 and channels_last first."""
    images = [(2, 16, 4, 4)] if bench.is_dry else IMAGES
    rows = [(8, 64)] if bench.is_dry else ROWS
    checks: list[Callable[[], Checks]] = []
    for dtype, lasts in ((torch.bfloat16, (True,)), (torch.float32, (True, False))):
        checks += [
            functools.partial(_batch_norm, bench, shape, dtype, last)
            for shape in images
            for last in lasts
        ]
        checks += [
            functools.partial(_rows, bench, shape, dtype, kind)
            for shape in rows
            for kind in ("LayerNorm", "RMSNorm")
        ]
    checks += [
        functools.partial(check, bench, images)
        for check in (_repeats, _compiled, _many_values, _groups)
    ]
    return [Case(_name(check), functools.partial(_as_rows, check)) for check in checks]


def _name(check: functools.partial) -> str:
    name = check.func.__name__.strip("_").replace("_", " ")
    return f"{name} {', '.join(map(str, check.args[1:]))}"


def _as_rows(check: Callable[[], Checks]) -> Iterator[Row]:
    for what, error, limit in check():
        yield {"check": what, "error": error, "limit": limit}


def draw(bench: Bench, *shape: int, dtype=torch.float32, mean=0.0) -> Tensor:
    return (torch.randn(shape, device=bench.device) + mean).to(dtype)


def relative(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖; inf if anything is not finite."""
    ours, exact = ours.detach(), exact.detach()
    error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def allowed(dtype: torch.dtype) -> float:
    """One rounding to a half is at most 2⁻⁹ or 2⁻¹² of a value."""
    return {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}.get(dtype, 1e-6)


def _batch_norm(bench, shape, dtype, last) -> Checks:
    layout = torch.channels_last if last else torch.contiguous_format
    x, residual, dy = (
        draw(bench, *shape, dtype=dtype, mean=m).contiguous(memory_format=layout)
        for m in (3.0, 0.0, 0.0)
    )
    weight, bias = draw(bench, shape[1]), draw(bench, shape[1])
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = normkit.functional.batch_norm(
        *(x, None, None, weight, bias, True), activation="relu", residual=residual
    )
    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = oracles.batch_norm(*exact[:3]) + exact[3]
    # Where the sum is within a rounding of 0 the gate may differ: no gradient there.
    dy = dy.masked_fill(z.abs() < 1e-4, 0)
    ours = torch.autograd.grad(y, inputs, dy)
    theirs = torch.autograd.grad(F.relu(z), exact, dy.double())
    name = f"BN+add+ReLU {shape} {str(dtype)[6:]} {'NHWC' if last else 'NCHW'}"
    limits = (allowed(dtype), 1e-5, 1e-5, allowed(dtype))
    found = [(f"{name} y", relative(y, F.relu(z)), allowed(dtype))]
    for what, a, b, limit in zip(
        ("x", "weight", "bias", "residual"), ours, theirs, limits, strict=True
    ):
        found.append((f"{name} d{what}", relative(a, b), limit))
    return found


def _many_values(bench: Bench, images: list[tuple[int, ...]]) -> Checks:
    """1e7 values per channel, mean 1e6 standard deviations from 0: 2e-6 at most."""
    n = 4000 if bench.is_dry else 10_000_000
    results = []
    for mean in (0.0, 1e3, 1e6):
        for shape in ((n, 4), (1, 4, n)):
            x = draw(bench, *shape, mean=mean)
            y = normkit.functional.batch_norm(x, None, None, training=True)
            exact = oracles.batch_norm(x)
            error = float(((y - exact).abs() / exact.abs().clamp(min=1)).max())
            results.append((f"mean {mean:g}·std, {shape}", error, 2e-6))
    return results


def _rows(bench, shape, dtype, kind) -> Checks:
    k = shape[-1]
    x = draw(bench, *shape, dtype=dtype, mean=1.0).requires_grad_()
    dy = draw(bench, *shape, dtype=dtype)
    weight = draw(bench, k).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    if kind == "LayerNorm":
        y = normkit.functional.layer_norm(x, (k,), weight)
        expected = oracles.layer_norm(exact[0], (k,), exact[1])
    else:
        y = normkit.functional.rms_norm(x, (k,), weight, 1e-5)
        expected = oracles.rms_norm(exact[0], (k,), exact[1])
    ours = torch.autograd.grad(y, (x, weight), dy)
    theirs = torch.autograd.grad(expected, exact, dy.double())
    name = f"{kind} {shape} {str(dtype)[6:]}"
    return [
        (f"{name} y", relative(y, expected), allowed(dtype)),
        (f"{name} dx", relative(ours[0], theirs[0]), allowed(dtype)),
        (f"{name} dweight", relative(ours[1], theirs[1]), 1e-5),
    ]


def _groups(bench: Bench, images: list[tuple[int, ...]]) -> Checks:
    """Group norm, whole groups on the chip and not."""
    results = []
    for shape in images[:2]:
        for count in (shape[1] // 2, 4):
            x = draw(bench, *shape, mean=1.0).requires_grad_()
            dy, weight = draw(bench, *shape), draw(bench, shape[1]).requires_grad_()
            exact = [t.detach().double().requires_grad_() for t in (x, weight)]
            y = normkit.functional.group_norm(x, count, weight)
            split = exact[0].unflatten(1, (count, -1))
            gain = exact[1].view(1, count, -1, 1, 1)
            expected = oracles.normalized(split, (2, 3, 4), gain).flatten(1, 2)
            ours = torch.autograd.grad(y, (x, weight), dy)
            theirs = torch.autograd.grad(expected, exact, dy.double())
            name = f"GroupNorm {shape} in {count}"
            results.append((f"{name} y", relative(y, expected), 1e-6))
            results.append((f"{name} dx", relative(ours[0], theirs[0]), 1e-6))
            results.append((f"{name} dweight", relative(ours[1], theirs[1]), 1e-5))
    return results


def _repeats(bench: Bench, images: list[tuple[int, ...]]) -> Checks:
    """Check for the same bits twice, on another stream, and from a CUDA graph."""
    x = draw(bench, *images[-1]).contiguous(memory_format=torch.channels_last)
    running = [torch.zeros(x.shape[1], device=x.device) for _ in range(2)]

    def run() -> Tensor:
        return normkit.functional.batch_norm(x, *running, training=True)

    first = run()
    results = [("run twice, other bits", float((run() != first).sum()), 0.0)]
    if bench.device.type != "cuda":
        return results
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        beside = run()
    torch.cuda.current_stream().wait_stream(other)
    results.append(
        ("on a second stream, other bits", float((beside != first).sum()), 0.0)
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        wrong = float((captured != first).sum())
        results.append(("graph replayed, other bits", wrong, 0.0))
    return results


def _compiled(bench: Bench, images: list[tuple[int, ...]]) -> Checks:
    """One graph under torch.compile, the same numbers as in eager mode."""
    layer = normkit.nn.BatchNorm2d(images[0][1], device=bench.device)
    x = draw(bench, *images[0]).contiguous(memory_format=torch.channels_last)
    y = bench.compile(layer)(x)
    return [("torch.compile, fullgraph, other bits", float((y != layer(x)).sum()), 0.0)]
