"""Momentum, eps and variance as other systems define them.

    system    momentum        running variance      usual eps, momentum
    torch     share of new    Σ(x − mean)²/(n − 1)  1e-5, 0.1
    keras     share of old    Σ(x − mean)²/n        1e-3, 0.99
    flax      share of old    Σ(x − mean)²/n        1e-5, 0.99
    onnx      share of old    Σ(x − mean)²/n        1e-5, 0.9

All four add eps to the variance, inside the root.
"""

from __future__ import annotations

from typing import Any

from normkit.errors import ArgumentError

__all__ = ["settings_from", "settings_of"]

# System: (is momentum the share of the old value, estimator, eps, momentum)
_CONVENTIONS = {
    "torch": (False, "unbiased", 1e-5, 0.1),
    "keras": (True, "biased", 1e-3, 0.99),
    "flax": (True, "biased", 1e-5, 0.99),
    "onnx": (True, "biased", 1e-5, 0.9),
}


def settings_from(
    system: str, *, momentum: float | None = None, eps: float | None = None
) -> dict[str, Any]:
    """Return the arguments of a batch norm that trains as one of `system` does.

    Args:
        system: "torch", "keras", "flax" or "onnx" (`BatchNormalization` in training
            mode).
        momentum: As that system writes it; None for its default.
        eps: Its epsilon; None for its default.

    Raises:
        ArgumentError: Another system, or a momentum outside [0, 1].

    Example:
        >>> settings_from("keras", momentum=0.75)
        {'momentum': 0.25, 'eps': 0.001, 'estimator': 'biased'}
    """
    is_decay, estimator, usual_eps, usual_momentum = _convention(system)
    given = usual_momentum if momentum is None else momentum
    if not 0.0 <= given <= 1.0:
        raise ArgumentError(f"momentum={given} must lie in [0, 1]")
    # 1 − 0.99 is 0.010000000000000009; the tenth digit is rounding.
    share = round(1.0 - given, 12) if is_decay else given
    return {
        "momentum": share,
        "eps": usual_eps if eps is None else eps,
        "estimator": estimator,
    }


def settings_of(layer: Any, system: str) -> dict[str, float | None]:
    """Return momentum and epsilon of `layer` as `system` writes them.

    Args:
        layer: Has `momentum` and `eps` in torch's sense.
        system: As in `settings_from`.

    Raises:
        ArgumentError: Another system, or a layer with momentum=None, which only torch
            and normkit have.

    Example:
        >>> from normkit.nn import BatchNorm2d
        >>> settings_of(BatchNorm2d(3), "keras")
        {'momentum': 0.9, 'epsilon': 1e-05}
    """
    is_decay, *_ = _convention(system)
    if layer.momentum is None:
        if system == "torch":
            return {"momentum": layer.momentum, "epsilon": layer.eps}
        raise ArgumentError(
            f"momentum=None averages over all batches, which {system} does not have; "
            "choose a momentum"
        )
    share = round(1.0 - layer.momentum, 12) if is_decay else layer.momentum
    return {"momentum": share, "epsilon": layer.eps}


def _convention(system: str) -> tuple[bool, str, float, float]:
    if system not in _CONVENTIONS:
        raise ArgumentError(
            f"system={system!r} must be one of {', '.join(map(repr, _CONVENTIONS))}"
        )
    return _CONVENTIONS[system]
