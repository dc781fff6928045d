"""Logits and masks of attention, read as the functions that compute it are called.

Attention has no layer of its own for its logits: `scaled_dot_product_attention` makes
them inside, and other programs call a softmax. While somebody listens, these functions
are replaced by ones that tell the listeners of their thread and then do the same. A
mode of torch's function protocol would see the calls too, but sends every other
operation of the model another way.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normkit.doctor.probes.keys import Keys
from normkit.doctor.probes.tensor_statistics import is_traced

__all__ = ["AttentionProbe", "Logits", "listen", "stop_listening"]

# Logits read per call; more are thinned by samples, then by queries. All of those of 16
# samples, 12 heads and 37 tokens.
MAX_LOGITS = 1 << 18
# An additive mask: -1e4 is the least that programs use.
MASKED = -9e3
# The weight of a query that reads one key alone: its gradient is below 1 % of the most.
SHARP = 0.99


@dataclass(frozen=True)
class Logits:
    """Logits that a softmax takes, shape `(…, queries, keys)`; masked ones are -inf.

    With the keys where those and a mask are known.
    """

    values: Tensor
    keys: Keys | None = None

    def largest(self) -> Tensor:
        """Return the largest |logit| of a key that is not masked."""
        values = self.values
        return values.masked_fill(values == -math.inf, 0).abs().amax()

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed entropy, the number of sharp queries and of all queries.

        Queries with fewer than two keys have no choice, and do not count.
        """
        keys = (self.values > -math.inf).sum(-1)
        counts = keys >= 2
        weights = torch.special.softmax(self.values, -1)
        entropy = torch.special.entr(weights).sum(-1) / keys.clamp(min=2).log()
        sharp = weights.amax(-1) > SHARP
        zero = torch.zeros_like(entropy)
        return (
            torch.where(counts, entropy, zero).sum(),
            (sharp & counts).sum().float(),
            counts.sum().float(),
        )


class AttentionProbe:
    """One attention: its logits since the last `reset`, merged over all its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Clear the measurements."""
        self._largest: Tensor | None = None
        self._sums: tuple[Tensor, ...] = ()
        self._keys: tuple[Tensor, ...] = ()

    def add(self, found: Logits | Keys) -> None:
        """Merge the logits or the keys of one call."""
        keys = found if isinstance(found, Keys) else found.keys
        if keys is not None:
            self._keys = _added(keys.spreads(), self._keys)
        if isinstance(found, Logits):
            self._add_logits(found)

    def _add_logits(self, logits: Logits) -> None:
        largest, sums = logits.largest(), logits.weights()
        if self._largest is not None:
            largest = torch.maximum(largest, self._largest.to(largest.device))
        self._largest, self._sums = largest, _added(sums, self._sums)

    def numbers(self) -> dict[str, Tensor]:
        """Return the measurements as one-value tensors; none before a call."""
        found: dict[str, Tensor] = {}
        if self._keys:
            read, hidden, num_read, num_hidden = self._keys
            found = {"read": read / num_read, "hidden": hidden / num_hidden}
        if self._largest is None:
            return found
        entropy, sharp, queries = self._sums  # 0/0, not measured, without a choice
        return found | {
            "largest": self._largest,
            "entropy": entropy / queries,
            "sharp": sharp / queries,
        }


def _added(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not old:
        return new
    return tuple(a + b.to(a.device) for a, b in zip(new, old, strict=True))


Listener = Callable[[Callable[[], Logits | Keys], int], None]
_listeners: list[tuple[int, Listener]] = []
_originals: list[tuple[Any, str, Any]] = []
_lock = threading.Lock()


def listen(listener: Listener) -> None:
    """Call `listener` for each attention computed in this thread, until it is stopped.

    It is called with a function that gives the logits or the keys, and the number of
    dimensions.
    """
    with _lock:
        if not _listeners:
            _replace(F, "scaled_dot_product_attention", _read_product)
            # It has the keys apart from their heads, and a mask of its own.
            _replace(F, "multi_head_attention_forward", _read_heads)
            _replace(torch, "softmax", _read_softmax)
            # Called by torch.nn.functional.softmax, and so by nn.Softmax.
            _replace(Tensor, "softmax", _read_softmax)
        _listeners.append((threading.get_ident(), listener))


def stop_listening(listener: Listener) -> None:
    """Stop a listener; the last one puts the functions back."""
    with _lock:
        _listeners[:] = [pair for pair in _listeners if pair[1] != listener]
        while _originals and not _listeners:
            owner, name, original = _originals.pop()
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _replace(owner: Any, name: str, read: Callable[..., None]) -> None:
    """Put a function in place of `owner.name` that reads its arguments first."""
    call = getattr(owner, name)

    @functools.wraps(call)
    def reading(*args: Any, **kwargs: Any) -> Any:
        own = threading.get_ident()
        for thread, listener in tuple(_listeners):
            if thread == own:
                read(listener, *args, **kwargs)
        return call(*args, **kwargs)

    # A method that a class inherits is not put back but deleted.
    _originals.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, reading)


def _is_readable(*tensors: Any) -> bool:
    return not (
        torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    ) and all(
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.numel() > 0
        and not x.is_nested
        and x.layout == torch.strided
        and not is_traced(x)
        for x in tensors
    )


def _read_product(
    listener: Listener,
    query: Any = None,
    key: Any = None,
    value: Any = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> None:
    if _is_readable(query, key) and query.dim() >= 2:
        listener(
            lambda: _of_product(query, key, attn_mask, is_causal, scale), query.dim()
        )


def _read_heads(
    listener: Listener, query: Any = None, key: Any = None, *args: Any, **kwargs: Any
) -> None:
    hidden = kwargs.get("key_padding_mask")
    if _is_readable(query, key) and key.dim() == 3 and isinstance(hidden, Tensor):
        if hidden.dtype != torch.bool:
            hidden = hidden <= MASKED
        if hidden.shape == (key.shape[1], key.shape[0]):
            listener(lambda: Keys(key.detach().transpose(0, 1), hidden), 4)


def _read_softmax(listener: Listener, x: Any = None, *args: Any, **kwargs: Any) -> None:
    x = kwargs.get("input", x)
    dim = args[0] if args else kwargs.get("dim")
    if not _is_readable(x) or dim not in (-1, x.dim() - 1):
        return
    if x.dim() >= 3 and x.shape[-1] >= 2:
        listener(lambda: _of_softmax(x), x.dim())


def _of_product(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Logits:
    *batch, length, width = query.shape
    keys = key.shape[-2]
    q, k = query.detach(), key.detach()
    if len(batch) == 2 and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped queries
    seen = None
    if mask is not None:
        mask = mask.detach().expand(*batch, length, keys)
        seen = Keys.of_product(k, mask if mask.dtype == torch.bool else mask > MASKED)
    sample, row = _thinned((*batch, length, keys))
    q = q[(*sample, ..., row, slice(None))].float()
    k = k[sample].float()
    with torch.autocast(q.device.type, enabled=False):
        values = q @ k.mT * (width**-0.5 if scale is None else scale)
    if is_causal:
        query_at = torch.arange(length, device=q.device)[row, None]
        key_at = torch.arange(keys, device=q.device)
        values = values.masked_fill(query_at < key_at, -math.inf)
    if mask is not None:
        mask = mask[(*sample, ..., row, slice(None))]
        if mask.dtype == torch.bool:
            values = values.masked_fill(~mask, -math.inf)
        else:
            values = values + mask
    return Logits(_masked(values).values, seen)


def _of_softmax(x: Tensor) -> Logits:
    sample, row = _thinned(tuple(x.shape))
    return _masked(x.detach()[(*sample, ..., row, slice(None))].float())


def _masked(values: Tensor) -> Logits:
    return Logits(values.masked_fill(values <= MASKED, -math.inf))


def _thinned(shape: tuple[int, ...]) -> tuple[tuple[slice, ...], slice]:
    """Return slices of the samples and of the queries that leave `MAX_LOGITS`."""
    *batch, length, _ = shape
    more = math.prod(shape) / MAX_LOGITS
    if not batch:
        return (), slice(0, length, max(1, math.ceil(more)))
    samples = max(1, min(batch[0], math.floor(batch[0] / more)))
    step = math.ceil(batch[0] / samples)
    more /= step
    return (slice(None, None, step),), slice(0, length, max(1, math.ceil(more)))
