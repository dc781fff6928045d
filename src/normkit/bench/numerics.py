"""Errors of each layer against float64, in normkit and in torch.nn.

For every layer, memory layout, dtype and mean/std of the input:

    error = max |y − y64| / max(1, |y64|)

y64 is the layer's definition in float64 on the same, already rounded input. In half
precision the rounding of y itself is most of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normkit
from normkit.bench.gradients import LAYERS, SHAPES, gradient_errors
from normkit.bench.marks import marks
from normkit.environment import environment

__all__ = ["BEGIN", "CASES", "COMMAND", "END", "RATIOS", "Case", "Numerics", "numerics"]

RATIOS = (0.0, 1.0, 1e2, 1e4, 1e6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (8, 16, 48, 48)
COMMAND = "normkit bench numerics"
BEGIN, END = marks(COMMAND)

_C = SHAPE[1]
_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One row of the table, but for the dtype.

    Attributes:
        layer: The layer's name and mode.
        layout: Memory layout of the input.
        dims: The dimensions that share a statistic, of `(N, C, H, W)` groups and all.
        build: Builds the layer from `normkit.nn` or `torch.nn`.
        place: Puts an input of `SHAPE` into the layout.
        is_eval: Normalize by running statistics, set to those of the input.
    """

    layer: str
    layout: str
    dims: tuple[int, ...]
    build: Callable[..., nn.Module]
    place: Callable[[Tensor], Tensor]
    is_eval: bool = False


_PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "NC": lambda x: x.movedim(1, -1).reshape(-1, _C),
    "NCL": lambda x: x.flatten(2),
}


def _cases() -> list[Case]:
    found = []
    for mode in ("training", "eval"):
        for layout, rank in (("NCHW", 2), ("channels_last", 2), ("NC", 1), ("NCL", 1)):
            dims = {"NC": (0,), "NCL": (0, 2)}.get(layout, (0, 2, 3))
            found.append(
                Case(
                    *(f"batch norm, {mode}", layout, dims),
                    lambda m, r=rank: getattr(m, f"BatchNorm{r}d")(_C, affine=False),
                    *(_PLACES[layout], mode == "eval"),
                )
            )
    per_sample: tuple[tuple[str, tuple[int, ...], Callable[..., nn.Module]], ...] = (
        ("instance norm", (2, 3), lambda m: m.InstanceNorm2d(_C)),
        ("group norm", (2, 3), lambda m: m.GroupNorm(4, _C, affine=False)),
        ("layer norm, rows", (3,), lambda m: m.LayerNorm(48, elementwise_affine=False)),
        (
            "layer norm, images",
            (1, 2, 3),
            lambda m: m.LayerNorm(SHAPE[1:], elementwise_affine=False),
        ),
        ("RMS norm, rows", (3,), lambda m: m.RMSNorm(48, _EPS, False)),
    )
    for layer, dims, build in per_sample:
        found += [
            Case(layer, layout, dims, build, _PLACES[layout])
            for layout in ("NCHW", "channels_last")
        ]
    return found


CASES = tuple(_cases())


@dataclass(frozen=True)
class Numerics:
    """The measured errors.

    Attributes:
        errors: For each (layer, layout, dtype), an (ours, torch's) pair for each ratio
            of `RATIOS`.
        machine: The machine of the measurement.
        gradients: For each layer, an (ours, torch's) pair for each shape of
            `gradients.SHAPES`.
    """

    errors: dict[tuple[str, str, str], tuple[tuple[float, float], ...]]
    machine: str
    gradients: dict[str, tuple[tuple[float, float], ...]]

    def to_text(self) -> str:
        """Return the table: a row for each layer, layout and dtype; ours / torch's."""
        lines = []
        for rows in (self._rows(), self._gradient_rows()):
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += [
                "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
            lines.append("")
        return "\n".join([*lines, self.machine])

    def _rows(self) -> list[list[str]]:
        return [_HEAD, *([*key, *map(_pair, self.errors[key])] for key in self.errors)]

    def _gradient_rows(self) -> list[list[str]]:
        head = ["gradient of x", *map(str, SHAPES)]
        return [
            head,
            *([name, *map(_pair, pairs)] for name, pairs in self.gradients.items()),
        ]

    def to_markdown(self) -> str:
        """Return a marked block of docs/numerics.md."""
        tables = [
            "\n".join(
                f"| {' | '.join(row)} |"
                for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])
            )
            for rows in (self._rows(), self._gradient_rows())
        ]
        return f"{BEGIN}\n{tables[0]}\n\n{tables[1]}\n\n{self.machine}\n{END}"

    def to_json(self) -> str:
        """Return the rows as plain data, unrounded."""
        rows = [
            {
                **dict(zip(("layer", "layout", "dtype"), key, strict=True)),
                "mean_over_std": list(RATIOS),
                "normkit": [pair[0] for pair in pairs],
                "torch": [pair[1] for pair in pairs],
            }
            for key, pairs in self.errors.items()
        ]
        gradients = [
            {
                "layer": name,
                "shapes": SHAPES,
                "normkit": [pair[0] for pair in pairs],
                "torch": [pair[1] for pair in pairs],
            }
            for name, pairs in self.gradients.items()
        ]
        found = {"machine": self.machine, "rows": rows, "gradients": gradients}
        return json.dumps(found, indent=2)

    def __str__(self) -> str:
        return self.to_text()


def numerics(*, seed: int = 0) -> Numerics:
    """Measure every case on this machine.

    Args:
        seed: Random seed of the inputs; torch's own generators are not touched.

    Returns:
        The errors of normkit and of torch.nn.
    """
    errors = {}
    for case in CASES:
        for dtype in DTYPES:
            key = (case.layer, case.layout, str(dtype).removeprefix("torch."))
            errors[key] = tuple(_errors(case, dtype, r, seed) for r in RATIOS)
    facts = environment()
    able = next(name for name, against in facts.backends.items() if not against)
    machine = (
        f"{SHAPE} values; {facts.cpu}; torch {facts.torch}; normkit {facts.normkit}, "
        f"{able} kernels."
    )
    gradients = {
        layer: tuple(gradient_errors(layer, shape, seed) for shape in SHAPES)
        for layer in LAYERS
    }
    return Numerics(errors, machine, gradients)


@torch.no_grad()
def _errors(
    case: Case, dtype: torch.dtype, ratio: float, seed: int
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    # float16 ends at 65504.
    std = 1e-2 if dtype == torch.float16 and ratio > 1e4 else 1.0
    x = case.place((std * (drawn + ratio)).to(dtype))
    wanted = _definition(case, x)
    found = []
    for module in (normkit.nn, nn):
        layer = case.build(module)
        if case.is_eval:
            _give_statistics(layer, x, case.dims)
            layer.eval()
        y = layer(x).double()
        error = ((y - wanted).abs() / wanted.abs().clamp(min=1)).max()
        found.append(error.item())
    return found[0], found[1]


def _definition(case: Case, x: Tensor) -> Tensor:
    wide = x.double()
    if case.layer.startswith("RMS"):
        mean_square = wide.square().mean(case.dims, keepdim=True)
        return wide * (mean_square + _EPS).rsqrt()
    grouped = wide
    dims = case.dims
    if case.layer == "group norm":
        grouped, dims = wide.unflatten(1, (4, -1)), (2, 3, 4)
    mean = grouped.mean(dims, keepdim=True)
    var = (grouped - mean).square().mean(dims, keepdim=True)
    if case.is_eval:
        # As rounded in the layer's float32 buffers.
        mean, var = mean.float().double(), var.float().double()
    return ((grouped - mean) * (var + _EPS).rsqrt()).reshape(wide.shape)


def _give_statistics(layer: nn.Module, x: Tensor, dims: tuple[int, ...]) -> None:
    wide = x.double()
    mean = wide.mean(dims, keepdim=True)
    var = (wide - mean).square().mean(dims)
    layer.load_state_dict(
        {"running_mean": mean.flatten(), "running_var": var}, strict=False
    )


_HEAD = [
    *("layer", "layout", "dtype"),
    *(f"mean/std {ratio:g}" for ratio in RATIOS),
]


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.0e} / {pair[1]:.0e}"
