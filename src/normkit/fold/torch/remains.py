"""Remains of a batch norm's module: its sum, its activation, a shift, a copy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normkit.fold.torch.op_names import op_name

__all__ = ["Applied", "Copied", "Rest", "Shift", "Sum"]


@dataclass(frozen=True)
class Rest:
    """Operations of a batch norm's module after the normalization.

    Attributes:
        children: Its children that it calls with the normalized values, in that order.
        activation: The activation that it applies in the same pass, before them.
        slope: Of a leaky_relu.
        adds: Whether it adds a `residual` before that.
        functions: The functions that its forward calls after that.
        calls: The same as text, to tell two calls of a module apart.
    """

    children: tuple[str, ...] = ()
    activation: str = "none"
    slope: float = 0.01
    adds: bool = False
    functions: tuple[Applied, ...] = field(default=(), compare=False)
    calls: tuple[str, ...] = ()

    def of(self, old: nn.Module, first: OrderedDict[str, nn.Module]) -> nn.Module:
        """Return a module of `first` and these operations; `old` has the children."""
        parts, activation = OrderedDict(first), self._activation()
        if self.adds:
            return Sum(nn.Sequential(parts), activation or nn.Identity())
        if activation is not None:
            parts["activation"] = activation
        for i, function in enumerate(self.functions):
            parts[f"{function.name}_{i}" if i else function.name] = function.copied()
        parts.update((name, old.get_submodule(name)) for name in self.children)
        if not parts:
            return nn.Identity()
        if len(parts) == 1 and not self.children:
            return next(iter(parts.values()))
        return nn.Sequential(parts)

    def _activation(self) -> nn.Module | None:
        if self.activation == "leaky_relu":
            return nn.LeakyReLU(self.slope)
        made: dict[str, type[nn.Module]] = {
            "relu": nn.ReLU,
            "silu": nn.SiLU,
            "gelu": nn.GELU,
            "sigmoid": nn.Sigmoid,
            "tanh": nn.Tanh,
        }
        return None if self.activation == "none" else made[self.activation]()


class Sum(nn.Module):
    """act(before(x) + residual), with the signature of the batch norm it replaces.

    Args:
        before: The rest of the batch norm before the sum.
        activation: The activation after it.
    """

    def __init__(self, before: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.before, self.activation = before, activation

    def forward(self, x: Tensor, *, mask: None = None, residual: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        return self.activation(self.before(x) + residual)


class Copied(nn.Module):
    """A copy of the input.

    It replaces a batch norm whose output is written to in place while its input is
    still needed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        return x.clone()


class Shift(nn.Module):
    """X + bias per channel: the rest of a batch norm of which the scale was folded.

    Args:
        bias: Summand per channel, shape `(C,)`.
        dim: The dimension of the channels, counted from the end.
    """

    def __init__(self, bias: Tensor, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the shape of `x`."""
        return x + self.bias.reshape(-1, *(1,) * (-self.dim - 1))


class Applied(nn.Module):
    """One call of a torch function, on the input and fixed arguments.

    Args:
        func: The function.
        args: Positional arguments; the one at `place` is the input.
        kwargs: Named arguments; the one named `place` is the input.
        place: Where the input goes.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        place: int | str,
    ) -> None:
        super().__init__()
        self.func, self.args, self.kwargs, self.place = func, args, kwargs, place

    @property
    def name(self) -> str:
        """The bare name of the function."""
        return op_name(self.func)

    def describe(self) -> str:
        """Return the call as text."""
        return f"{self.name}{self.args}{self.kwargs}{self.place}"

    def copied(self) -> Applied:
        """Return a module that does the same."""
        return Applied(self.func, self.args, self.kwargs, self.place)

    def forward(self, x: Tensor) -> Tensor:
        """Return the function's result."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = x
        else:
            kwargs[self.place] = x
        return self.func(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the name of the function."""
        return self.name
