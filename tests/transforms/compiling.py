"""torch.compile without what an earlier test left behind."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Of torch's own making: it warns about its own deprecated parts.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch._dynamo.reset()
