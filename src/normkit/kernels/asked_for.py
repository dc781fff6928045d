"""Name of the backend that the enclosing block of `kernels.backend` asks for."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["asked_for_name"]

asked_for_name: ContextVar[str | None] = ContextVar("normkit_backend", default=None)
