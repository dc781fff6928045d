"""Operators that torchvision's wheel declares and lacks beside a CPU build of torch."""

from importlib.util import find_spec

import torch

_LIBRARIES: list[torch.library.Library] = []


def declare() -> None:
    """Declare them, so that torchvision can be imported where it is installed."""
    if find_spec("torchvision") is not None and not _LIBRARIES:
        _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name_of in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name_of):
                signature = "(Tensor dets, Tensor scores, float threshold) -> Tensor"
                _LIBRARIES[0].define(name_of + signature)
