"""The table of rules that lower ONNX operators to nodes; without one, opaque."""

from __future__ import annotations

from collections.abc import Callable

from normkit.fold.onnx.reading import Lowering

__all__ = ["RULES", "lowers"]

RULES: dict[str, Lowering] = {}


def lowers(names: str) -> Callable[[Lowering], Lowering]:
    """Register the decorated rule for the operators in `names`.

    One of another domain than ONNX's own is named `domain::operator`.
    """

    def register(rule: Lowering) -> Lowering:
        for name in names.split():
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = rule
        return rule

    return register
