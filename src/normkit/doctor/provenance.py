"""What a page was made of: the examined objects, the date and the versions."""

from __future__ import annotations

from datetime import date

import torch

from normkit.version import __version__

__all__ = ["provenance"]


def provenance(*seen: str) -> str:
    """Return what was examined, the date and the versions in one sentence.

    Example:
        >>> provenance("ResNet", "4 batches").split("; ")[:2]
        ['ResNet', '4 batches']
    """
    today = date.today().isoformat()
    versions = f"{today}, normkit {__version__}, torch {torch.__version__}"
    return "; ".join([*seen, versions]) + "."
