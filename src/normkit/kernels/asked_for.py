"""The backend that the enclosing block of `kernels.backend` asks for."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["asked_for", "asked_for_name"]

asked_for_name: ContextVar[str | None] = ContextVar("normkit_backend", default=None)


def asked_for() -> str | None:
    """Return its name; None where no block asks for one."""
    return asked_for_name.get()
