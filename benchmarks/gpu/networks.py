"""A whole ResNet-50 step in plain torch: its own norms, and ours in their place."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.gpu.stages import Case, Row
from benchmarks.gpu.timing import Bench
from torch import Tensor, nn

import normkit

__all__ = ["cases"]


class Norm(nn.BatchNorm2d):
    """Batch norm with an optional sum and ReLU after it, by torch."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


class OurNorm(Norm):
    """The same in one operator."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        return normkit.functional.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias),
            training=True,
            num_batches_tracked=self.num_batches_tracked,
            activation="relu" if relu else "none",
            residual=residual,
        )


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int, norm: type[Norm]) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = norm(width), norm(width), norm(outside)
        self.shortcut = self.norm4 = None
        if stride != 1 or inside != outside:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.norm4 = norm(outside)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.shortcut is not None and self.norm4 is not None:
            residual = self.norm4(self.shortcut(x), relu=False)
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        return self.norm3(self.conv3(y), residual)


class ResNet50(nn.Module):
    """He et al. 2016, the stride in the 3×3 convolution."""

    def __init__(
        self, norm: type[Norm], depths: tuple[int, ...] = (3, 4, 6, 3)
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = norm(64)
        blocks, inside = [], 64
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(inside, 64 << stage, stride, norm))
                inside = 256 << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.stem(x)), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def cases(bench: Bench) -> list[Case]:
    """Return the eager steps, then the compiled one: compilation may take a minute."""
    sizes = [("eager", 2), ("compile", 2)]
    if not bench.is_dry:
        sizes = [("eager", 64), ("eager", 256), ("compile", 64)]
    return [
        Case(f"{mode}, batch {batch}", functools.partial(_steps, bench, mode, batch))
        for mode, batch in sizes
    ]


def _steps(bench: Bench, mode: str, batch: int) -> Iterator[Row]:
    """Measure a step in bfloat16 autocast and channels_last: both passes and SGD."""
    size, depths = (16, (1,)) if bench.is_dry else (224, (3, 4, 6, 3))
    x = torch.randn(batch, 3, size, size, device=bench.device)
    x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=bench.device)
    steps, saved = {}, {}
    for name, norm in (("ours", OurNorm), (mode, Norm)):
        torch.manual_seed(0)
        model = ResNet50(norm, depths).to(bench.device)
        model = model.to(memory_format=torch.channels_last)
        saved[name] = saved_bytes(model, x, bench.device.type)
        run = bench.compile(model, fullgraph=False) if mode == "compile" else model
        steps[name] = _step(model, run, x, target)
    row: Row = {"what": f"ResNet-50, {mode}", "shape": (batch,), "pass": "step"}
    yield {**row, "times": bench.medians(steps), "saved_bytes": saved}


def _step(
    model: nn.Module, run: Callable[..., Tensor], x: Tensor, target: Tensor
) -> Callable[[int], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(turn: int) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, x: Tensor, device: str) -> int:
    """Return bytes of distinct storages that a forward keeps, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(device, torch.bfloat16),
    ):
        y = model(x)
    del y
    return sum(kept.values())
