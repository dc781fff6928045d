"""Single layers at the shapes of ResNet-50 and of transformers, against the floor.

The floor is the fewest bytes that must move, over the bandwidth of a plain copy
measured in the same run. Bytes per element of a half, forward / backward:

    BN, BN+ReLU     6 / 10       x twice, y  /  dy and x twice, dx
    BN+add+ReLU     8.1 / 12.3   and the residual, its gradient, one bit for the gate
    rows            4 / 6        x, y  /  dy, x, dx
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from benchmarks.gpu.timing import Clock, Deadline
from torch import Tensor

import normkit
from normkit.functional import gpu_operators as operators
from normkit.kernels.epilogue import Epilogue

__all__ = ["RESNET_50", "Result", "resnet_norms", "rows"]

# Channels, height, and how many norms of each form the network has there:
# alone (before the sum in a shortcut), with ReLU, with sum and ReLU.
RESNET_50 = [
    (64, 112, (0, 1, 0)),
    (64, 56, (0, 6, 0)),
    (256, 56, (1, 0, 3)),
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
FORMS = ("BN", "BN+ReLU", "BN+add+ReLU")
BYTES_OF_A_HALF = {"BN": (6, 10), "BN+ReLU": (6, 10), "BN+add+ReLU": (8.125, 12.25)}


@dataclass(frozen=True)
class Result:
    """One layer and direction; seconds, None where it was not measured.

    Attributes:
        layer: Its name.
        shape: Of x.
        direction: "forward" or "backward".
        count: How often a ResNet-50 has it.
        ours: Seconds of normkit.
        eager: Seconds of torch.
        compiled: Seconds of torch.compile, or None.
        floor: Bytes that must move over the bandwidth of a copy.
        bytes: Those bytes.
    """

    layer: str
    shape: tuple[int, ...]
    direction: str
    count: int
    ours: float
    eager: float
    compiled: float | None
    floor: float
    bytes: float

    def to_json(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return asdict(self)


def resnet_norms(
    clock: Clock,
    bandwidth: float,
    batch: int,
    *,
    with_compile: bool,
    deadline: Deadline,
    shapes: list[tuple[int, int, tuple[int, int, int]]] = RESNET_50,
) -> Iterator[Result]:
    """Every norm of a ResNet-50 in bfloat16 and channels_last, both directions."""
    for channels, size, counts in shapes:
        for form, count in zip(FORMS, counts, strict=True):
            if count and deadline.allows(5):
                shape = (batch, channels, size, size)
                yield from _batch_norm(
                    clock, bandwidth, shape, form, count, with_compile
                )


def _batch_norm(
    clock: Clock,
    bandwidth: float,
    shape: tuple[int, ...],
    form: str,
    count: int,
    with_compile: bool,
) -> Iterator[Result]:
    has_sum, has_relu = "add" in form, "ReLU" in form
    weight, bias = (torch.rand(shape[1], device=clock.device) for _ in range(2))
    buffers = [torch.zeros(shape[1], device=clock.device) for _ in range(2)]
    buffers[1] += 1
    inputs = [weight.requires_grad_(), bias.requires_grad_()]

    def ours(x: Tensor, residual: Tensor | None) -> Tensor:
        epilogue = Epilogue("relu" if has_relu else "none", residual=residual)
        y = operators.batch_norm(
            *(x, 1, weight, bias, 1e-5),
            running_mean=buffers[0],
            running_var=buffers[1],
            epilogue=epilogue,
        )
        assert y is not None
        return y

    def torchs(x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(x, *buffers, weight, bias, True, 0.1, 1e-5)
        y = y if residual is None else y + residual
        return F.relu(y) if has_relu else y

    per_half = BYTES_OF_A_HALF[form]
    elements = torch.Size(shape).numel()
    yield from _compare(
        *(clock, bandwidth, form, shape, count, inputs, has_sum, with_compile),
        (ours, torchs),
        (per_half[0] * elements, per_half[1] * elements),
    )


def rows(
    clock: Clock,
    bandwidth: float,
    deadline: Deadline,
    sizes: tuple[tuple[int, int], ...] = (
        (4096, 4096),
        (16384, 4096),
        (16384, 8192),
        (16384, 16384),
    ),
) -> Iterator[Result]:
    """Layer norm and RMS norm of bfloat16 rows, both directions."""
    for count, width in sizes:
        for name in ("LayerNorm", "RMSNorm"):
            if not deadline.allows(8):
                return
            weight = torch.rand(width, device=clock.device).bfloat16().requires_grad_()
            bias = torch.rand(width, device=clock.device).bfloat16().requires_grad_()
            inputs = [weight, bias] if name == "LayerNorm" else [weight]
            elements = count * width
            yield from _compare(
                *(clock, bandwidth, name, (count, width), 1, inputs, False, True),
                _row_functions(name, width, weight, bias),
                (4 * elements, 6 * elements),
            )


def _row_functions(
    name: str, width: int, weight: Tensor, bias: Tensor
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def layer(library) -> Callable[..., Tensor]:
        return lambda x, _: library.layer_norm(x, (width,), weight, bias, 1e-5)

    def rms(library) -> Callable[..., Tensor]:
        return lambda x, _: library.rms_norm(x, (width,), weight, 1e-5)

    of = layer if name == "LayerNorm" else rms
    return of(normkit.functional), of(F)


def _compare(
    clock: Clock,
    bandwidth: float,
    layer: str,
    shape: tuple[int, ...],
    count: int,
    inputs: list[Tensor],
    has_sum: bool,
    with_compile: bool,
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    moved: tuple[float, float],
) -> Iterator[Result]:
    """Both directions of ours, torch's and torch.compile's, interleaved."""
    # Enough inputs that none is left in a cache of 60 MB when its turn comes again.
    size = 2 * torch.Size(shape).numel()
    copies = max(2, min(16, -(-256_000_000 // size))) if clock.warmup else 1
    sets = [_inputs(clock.device, shape, has_sum) for _ in range(copies)]
    contestants = [*functions]
    if with_compile:
        # One function's code serves all shapes; its cache must not fill up.
        torch._dynamo.reset()
        contestants.append(torch.compile(functions[1], fullgraph=True, dynamic=False))

    def forward(run: Callable[..., Tensor]) -> Callable[[int], object]:
        def call(turn: int) -> object:
            x, residual, _ = sets[turn % copies]
            return run(x, residual)

        return call

    def backward(run: Callable[..., Tensor]) -> Callable[[int], object]:
        graphs = []
        for x, residual, dy in sets:
            leaves = [x, *inputs] if residual is None else [x, residual, *inputs]
            graphs.append((run(x, residual), leaves, dy))

        def call(turn: int) -> object:
            y, leaves, dy = graphs[turn % copies]
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        return call

    for direction, prepare, size in (
        ("forward", forward, moved[0]),
        ("backward", backward, moved[1]),
    ):
        times = clock.medians([prepare(run) for run in contestants])
        compiled = times[2] if with_compile else None
        floor = size / bandwidth
        yield Result(
            layer, shape, direction, count, times[0], times[1], compiled, floor, size
        )


def _inputs(
    device: torch.device, shape: tuple[int, ...], has_sum: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    def one() -> Tensor:
        x = torch.randn(shape, device=device).bfloat16()
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    return one().requires_grad_(), one().requires_grad_() if has_sum else None, one()
