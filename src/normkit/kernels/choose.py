"""Choice of the backend for a case, with the reasons against the others.

choose(x, dims)          the first backend with no reason against the case
backend("reference")     one backend by name within a block; no silent fallback
explain(x, dims)         the table behind the choice
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from normkit.errors import ArgumentError, KernelError
from normkit.kernels.asked_for import asked_for_name
from normkit.kernels.cpu import CpuBackend
from normkit.kernels.gpu import GpuBackend
from normkit.kernels.primitives import Backend
from normkit.kernels.reference import ReferenceBackend
from normkit.views import View, view_of

__all__ = [
    "Explanation",
    "available_backends",
    "backend",
    "backend_named",
    "choose",
    "explain",
]

# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "gpu": GpuBackend(),
    "cpu": CpuBackend(),
    "reference": ReferenceBackend(),
}


@dataclass(frozen=True)
class Explanation:
    """Backend chosen for a case, and the reasons against each other one.

    Attributes:
        chosen: Name of the backend that would run.
        view: Memory layout of the case.
        reasons: Reasons why each backend, in order of preference, cannot run;
            an empty list when it can.
        route: Route through the library, a value of `functional.route.Route`; None
            where only the backends were asked about.
    """

    chosen: str
    view: View
    reasons: dict[str, list[str]]
    route: str | None = None

    def to_text(self) -> str:
        """Return one line per backend."""
        lines = [f"view: {self.view.kind} {self.view.sizes}"]
        if self.route is not None:
            lines.append(f"route: {self.route}")
        for name, reasons in self.reasons.items():
            if name == self.chosen:
                lines.append(f"{name}: runs")
            else:
                lines.append(f"{name}: " + ("; ".join(reasons) or "can run"))
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            "chosen": self.chosen,
            "view": {"kind": self.view.kind, "sizes": list(self.view.sizes)},
            "reasons": self.reasons,
            "route": self.route,
        }

    def __str__(self) -> str:
        return self.to_text()


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends, in order of preference."""
    return tuple(_BACKENDS)


def backend_named(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        ArgumentError: There is none.
    """
    if name not in _BACKENDS:
        raise ArgumentError(
            f"backend={name!r} must be one of {', '.join(map(repr, _BACKENDS))}"
        )
    return _BACKENDS[name]


def choose(x: Tensor, dims: tuple[int, ...]) -> Backend:
    """Return the backend that reduces `x` over `dims`.

    Raises:
        KernelError: A backend was asked for by name and cannot run this case.
    """
    asked = asked_for_name.get()
    if asked is not None:
        reasons = _BACKENDS[asked].reasons_against(x, dims)
        if reasons:
            able = [n for n, b in _BACKENDS.items() if not b.reasons_against(x, dims)]
            raise KernelError(
                f"backend {asked!r} cannot run this: {'; '.join(reasons)}. "
                f"{', '.join(map(repr, able))} can: ask for that or for none"
            )
        return _BACKENDS[asked]
    device = x.device.type
    for candidate in _BACKENDS.values():
        # Most calls are refused by the kind of device; that needs no list of reasons.
        serves: tuple[str, ...] | None = getattr(candidate, "device_types", None)
        if serves is not None and device not in serves:
            continue
        if not candidate.reasons_against(x, dims):
            return candidate
    raise KernelError(f"no backend can run this: {explain(x, dims).to_text()}")


@contextmanager
def backend(name: str) -> Generator[None]:
    """Use one backend for everything within the block.

    Args:
        name: One of `available_backends()`.

    Raises:
        ArgumentError: There is no backend of that name.

    Example:
        >>> import torch
        >>> with backend("reference"):
        ...     print(explain(torch.zeros(2, 3), (0,)).chosen)
        reference
    """
    token = asked_for_name.set(backend_named(name).name)
    try:
        yield
    finally:
        asked_for_name.reset(token)


def explain(x: Tensor, dims: tuple[int, ...] | None = None) -> Explanation:
    """Say which kernel would run on `x`, and why not another.

    Args:
        x: The input of a normalization, shape `(N, C, *)`.
        dims: The dimensions its statistics run over; by default all but
            dimension 1, as in batch norm.
    """
    if dims is None:
        dims = tuple(d for d in range(x.dim()) if d != 1)
    reasons = {name: b.reasons_against(x, dims) for name, b in _BACKENDS.items()}
    asked = asked_for_name.get()
    able = [name for name, against in reasons.items() if not against]
    chosen = asked if asked is not None else able[0]
    return Explanation(chosen, view_of(x, dims), reasons)
