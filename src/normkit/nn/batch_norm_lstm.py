"""An LSTM whose input, recurrent and cell terms are batch-normalized at each step.

(i, f, g, o) = BN(W_ih·x_t) + BN(W_hh·h_{t−1}) + bias
c_t = σ(f)·c_{t−1} + σ(i)·tanh(g)
h_t = σ(o)·tanh(BN(c_t))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.errors import ArgumentError, ShapeError
from normkit.nn.recurrent import RecurrentBatchNorm
from normkit.nn.tracing import recorded_call

__all__ = ["BatchNormLSTM"]


class BatchNormLSTM(nn.Module):
    """One direction of `torch.nn.LSTM`, with batch norm at every time step.

    Args:
        input_size: Features of the input.
        hidden_size: Features H of the state.
        num_layers: Number of stacked LSTMs.
        batch_first: Take and return `(N, T, *)` instead of `(T, N, *)`.
        max_steps: Time steps with statistics of their own; later ones share those of
            the last.
        eps: Added to the variances, inside the root.
        momentum: Share of the batch in the new running statistics; None gives all
            batches the same share.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        first_weight: The weight of the batch norms to start from.

    Raises:
        ArgumentError: A size below 1; in forward, lengths outside 1 to T.
        ShapeError: In forward, an input or a state of another shape.

    Numerics:
        `weight_ih_l{k}` and `weight_hh_l{k}` are laid out as in torch, and so load
        from its checkpoints; one bias takes the place of its two. The two terms are
        normalized separately, each with a weight of its own and no bias.

    Example:
        >>> lstm = BatchNormLSTM(3, 5, max_steps=7)
        >>> y, (h, c) = lstm(torch.randn(7, 4, 3), lengths=torch.tensor([7, 2, 5, 7]))
        >>> y.shape, h.shape, c.shape
        (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]), torch.Size([1, 4, 5]))
        >>> bool((y[2:, 1] == 0).all()), torch.equal(h[0, 1], y[1, 1])
        (True, True)

    References:
        Cooijmans, Ballas, Laurent, Gülçehre & Courville, "Recurrent Batch
        Normalization", ICLR 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        max_steps: int,
        batch_first: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
        first_weight: float = 0.1,
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if size < 1:
                raise ArgumentError(f"{name}={size} must be at least 1")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.batch_first = num_layers, batch_first
        self.max_steps = max_steps
        place = {"device": device, "dtype": dtype}

        def norm(features: int, *, bias: bool) -> RecurrentBatchNorm:
            return RecurrentBatchNorm(
                *(features, max_steps, eps, momentum),
                bias=bias,
                first_weight=first_weight,
                **place,
            )

        gates = 4 * hidden_size
        for k in range(num_layers):
            width = input_size if k == 0 else hidden_size
            for name, shape in (
                (f"weight_ih_l{k}", (gates, width)),
                (f"weight_hh_l{k}", (gates, hidden_size)),
                (f"bias_l{k}", (gates,)),
            ):
                setattr(self, name, nn.Parameter(torch.empty(shape, **place)))
            setattr(self, f"norm_ih_l{k}", norm(gates, bias=False))
            setattr(self, f"norm_hh_l{k}", norm(gates, bias=False))
            setattr(self, f"norm_cell_l{k}", norm(hidden_size, bias=True))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as torch's LSTM does, set bias to 0, reset the batch norms."""
        bound = 1 / math.sqrt(self.hidden_size)
        for k in range(self.num_layers):
            nn.init.uniform_(getattr(self, f"weight_ih_l{k}"), -bound, bound)
            nn.init.uniform_(getattr(self, f"weight_hh_l{k}"), -bound, bound)
            nn.init.zeros_(getattr(self, f"bias_l{k}"))
        for module in self.children():
            assert isinstance(module, RecurrentBatchNorm)
            module.reset_parameters()

    def forward(
        self,
        input: Tensor,  # noqa: A002
        state: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a batch of sequences.

        Args:
            input: Shape `(T, N, input_size)`, or `(N, T, input_size)` if batch_first.
            state: h and c before the first step, shape `(num_layers, N, H)` each; 0
                by default.
            lengths: Valid steps of each sequence, int64 of shape `(N,)` or a list, 1 to
                T; all T by default. Values after a sequence's end have no effect: they
                enter no statistic, the state does not change, and the output is 0.

        Returns:
            The output of the last layer at every step, and the state of every layer
            after each sequence's last valid step.
        """
        node = recorded_call(self, input, state=state, lengths=lengths)
        if node is not None:
            return node
        x = input.transpose(0, 1) if self.batch_first and input.dim() == 3 else input
        if x.dim() != 3 or x.shape[2] != self.input_size or not x.shape[0]:
            order = "(N, T, C)" if self.batch_first else "(T, N, C)"
            raise ShapeError(
                f"BatchNormLSTM takes {order} with C = {self.input_size} and at least "
                f"one step, got {tuple(input.shape)}"
            )
        steps, batch = x.shape[:2]
        mask = _mask(lengths, steps, batch, x.device)
        hidden, cell = self._state(state, x)
        last_hidden, last_cell = [], []
        for k in range(self.num_layers):
            x, h, c = self._layer(k, x, hidden[k], cell[k], mask)
            last_hidden.append(h)
            last_cell.append(c)
        y = x.transpose(0, 1) if self.batch_first else x
        return y, (torch.stack(last_hidden), torch.stack(last_cell))

    def _layer(
        self, k: int, x: Tensor, h: Tensor, c: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_hh, bias = getattr(self, f"weight_hh_l{k}"), getattr(self, f"bias_l{k}")
        norm_hh, norm_cell = (
            getattr(self, f"norm_hh_l{k}"),
            getattr(self, f"norm_cell_l{k}"),
        )
        # The input's term needs no recurrence: all steps at once.
        drive = F.linear(x, getattr(self, f"weight_ih_l{k}"))
        drive = getattr(self, f"norm_ih_l{k}")(drive, mask=mask)
        outputs = []
        for t in range(x.shape[0]):
            valid = None if mask is None else mask[t]
            term = norm_hh(F.linear(h, weight_hh), t, mask=valid)
            i, f, g, o = (drive[t] + term + bias).chunk(4, 1)
            next_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            next_h = o.sigmoid() * norm_cell(next_c, t, mask=valid).tanh()
            if valid is None:
                h, c = next_h, next_c
                outputs.append(h)
            else:
                h, c = torch.where(valid, next_h, h), torch.where(valid, next_c, c)
                outputs.append(torch.where(valid, h, torch.zeros_like(h)))
        return torch.stack(outputs), h, c

    def _state(
        self, state: tuple[Tensor, Tensor] | None, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape = (self.num_layers, x.shape[1], self.hidden_size)
        if state is None:
            zero = torch.zeros(shape, dtype=x.dtype, device=x.device)
            return zero, zero
        for tensor in state:
            if tuple(tensor.shape) != shape:
                raise ShapeError(
                    "BatchNormLSTM needs h and c of shape (num_layers, N, H), here "
                    f"{shape}, got {tuple(tensor.shape)}"
                )
        return state

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"max_steps={self.max_steps}, batch_first={self.batch_first}"
        )


def _mask(
    lengths: Tensor | Sequence[int] | None, steps: int, batch: int, device: torch.device
) -> Tensor | None:
    """Return the valid entries as a mask of shape `(T, N, 1)`."""
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(
            f"lengths must have shape ({batch},), one for each sequence, got "
            f"{tuple(lengths.shape)}"
        )
    # On a GPU the check would wait for the device; nothing is read out of bounds.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (lengths < 1) | (lengths > steps)
        if bool(outside.any()):
            raise ArgumentError(
                f"lengths must lie within 1 and {steps}, the steps of the input, got "
                f"{lengths[outside][0].item()}; drop empty sequences"
            )
    at = torch.arange(steps, device=device).view(-1, 1, 1)
    return at < lengths.to(device).view(1, -1, 1)
