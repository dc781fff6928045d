"""Statistics for each named domain of the data, one network for all.

Domains are, for example, pictures taken by day, by night and in a simulator. Each is
normalized by its own statistics; the affine map is shared or separate.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normkit.errors import ArgumentError
from normkit.nn.tracing import recorded_call

__all__ = ["DomainBatchNorm", "use_domain"]


class DomainBatchNorm(nn.Module):
    """A batch norm that keeps statistics for each named domain.

    `use_domain(model, "night")` chooses the domain for a block of code, in all layers
    at once. To adapt to a domain without labels, add it, then calibrate on its data:

        layer.add_domain("fog", like="day")
        with use_domain(model, "fog"):
            normkit.calibrate(model, batches)

    Args:
        layer: A layer with running statistics; each domain gets a copy of it, the first
            one the layer itself.
        domains: Names of the domains; the first is in use at the start.
        shared_affine: One `weight` and one `bias` for all domains; otherwise each
            learns its own.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None keeps the ranks of `layer`.

    Raises:
        ArgumentError: A layer without running statistics; no domain, one twice, or a
            name that is empty or has a dot; in forward, an unknown name.

    Numerics:
        A batch is of one domain. Each copy is the layer that was given: its `mask=`,
        eval mode, fold and calibration are those of that layer. `state_dict` holds a
        shared weight under every domain's name.

    Example:
        >>> import torch
        >>> from normkit.nn import BatchNorm1d
        >>> layer = DomainBatchNorm(BatchNorm1d(2), ("day", "night"))
        >>> day = layer(5 + torch.randn(8, 2))
        >>> night = layer(torch.randn(8, 2), domain="night")
        >>> bool((layer.norms["day"].running_mean > 0.3).all())
        True
        >>> bool((layer.norms["night"].running_mean < 0.3).all())
        True

    References:
        Li, Wang, Shi, Liu & Hou, "Revisiting Batch Normalization for Practical Domain
        Adaptation", 2016.
        Chang, You, Seo, Kwak & Han, "Domain-Specific Batch Normalization for
        Unsupervised Domain Adaptation", CVPR 2019.
    """

    def __init__(
        self,
        layer: nn.Module,
        domains: Sequence[str],
        *,
        shared_affine: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, _NormBase) or layer.running_mean is None:
            raise ArgumentError(
                "DomainBatchNorm needs a layer with running statistics, such as "
                f"BatchNorm2d(64), got {type(layer).__name__}"
            )
        if not domains or isinstance(domains, str):
            raise ArgumentError(
                f"DomainBatchNorm needs a sequence of names, got {domains!r}; e.g. "
                "('day', 'night')"
            )
        if process_group is not None:
            layer.process_group = process_group
        self.shared_affine = shared_affine
        self.norms = nn.ModuleDict()
        self.domain = domains[0]
        self._insert(domains[0], layer)
        for name in domains[1:]:
            self._insert(name, self._copy_of(domains[0]))
            self.norms[name].reset_running_stats()  # type: ignore[operator]

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(self.norms)

    def add_domain(self, name: str, *, like: str | None = None) -> None:
        """Add a domain, with the statistics of another to start from.

        Args:
            name: A new name.
            like: The domain to copy; by default the one in use.

        Raises:
            ArgumentError: The name is taken, or there is no domain `like`.
        """
        self._insert(name, self._copy_of(self.domain if like is None else like))

    def forward(
        self,
        input: Tensor,  # noqa: A002
        *,
        domain: str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize a batch of one domain.

        Args:
            input: Values, as the layer takes them.
            domain: Name of the domain; by default the one in use.
            mask: Mask, as the layer takes it.
        """
        node = recorded_call(self, input, domain=domain, mask=mask)
        if node is not None:
            return node
        layer = self._at(self.domain if domain is None else domain)
        return layer(input) if mask is None else layer(input, mask=mask)

    def _at(self, domain: str) -> nn.Module:
        if domain not in self.norms:
            raise ArgumentError(
                f"there is no domain {domain!r}, only "
                f"{', '.join(map(repr, self.norms))}; add_domain() adds one"
            )
        return self.norms[domain]

    def _copy_of(self, domain: str) -> nn.Module:
        layer = copy.deepcopy(self._at(domain))
        if self.shared_affine:
            layer.weight, layer.bias = self._at(domain).weight, self._at(domain).bias
        return layer

    def _insert(self, name: str, layer: nn.Module) -> None:
        if not name or "." in name or hasattr(self.norms, name):
            raise ArgumentError(
                f"a domain needs a new name without a dot, got {name!r}; there are "
                f"{', '.join(map(repr, self.norms)) or 'none yet'}"
            )
        layer.train(self.training)
        self.norms[name] = layer

    def extra_repr(self) -> str:
        """Return the domain in use."""
        return f"domain={self.domain!r}, shared_affine={self.shared_affine}"


@contextmanager
def use_domain(model: nn.Module, domain: str) -> Generator[None]:
    """Normalize by one domain's statistics in every `DomainBatchNorm` of a model.

    Args:
        model: A model with at least one such layer.
        domain: The name of a domain that all of them have.

    Raises:
        ArgumentError: There is no such layer, or one does not have the domain.

    Example:
        >>> from normkit.nn import BatchNorm1d
        >>> model = nn.Sequential(DomainBatchNorm(BatchNorm1d(2), ("day", "night")))
        >>> with use_domain(model, "night"):
        ...     model[0].domain
        'night'
        >>> model[0].domain
        'day'
    """
    layers = [m for m in model.modules() if isinstance(m, DomainBatchNorm)]
    if not layers:
        raise ArgumentError(
            f"use_domain needs a model with a DomainBatchNorm, {type(model).__name__} "
            "has none"
        )
    for layer in layers:
        layer._at(domain)
    before = [layer.domain for layer in layers]
    try:
        for layer in layers:
            layer.domain = domain
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer.domain = name
