"""Synchronized batch norm for Lightning's Trainer, on any device.

    from normkit.integrations.lightning_sync import NormkitSyncBatchNorm
    trainer = Trainer(strategy="ddp", plugins=[NormkitSyncBatchNorm()])

Lightning's `sync_batchnorm=True` converts to torch's layer, which refuses a CPU.
"""

# Where the package is absent, pyright cannot resolve it.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn

from normkit.convert import convert

__all__ = ["NormkitSyncBatchNorm"]


class NormkitSyncBatchNorm(LayerSync):
    """Make every batch norm a `normkit.nn.SyncBatchNorm` while the Trainer runs.

    Args:
        process_group: The ranks, as in `SyncBatchNorm`; None is all of them. A name or
            a function without arguments, called when the ranks have met, since groups
            exist only then.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers of `model`, in place."""
        group = self.process_group
        convert(model, to="sync", process_group=group() if callable(group) else group)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Make them what they were before."""
        convert(model, to="normkit", strict=False)
        return model
