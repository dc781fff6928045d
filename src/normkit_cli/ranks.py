"""Commands over several processes: `torchrun --nproc-per-node 4 -m normkit_cli …`."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist

from normkit.errors import NormkitError, RanksError

__all__ = ["all_ranks", "launched"]


def all_ranks() -> Any:
    """Return the group of all ranks; None for a single process."""
    is_many = dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if is_many and dist.get_world_size() > 1 else None


@contextmanager
def launched() -> Generator[bool]:
    """Join the process group of torchrun, if it started this process; True on rank 0.

    Other ranks print nothing to standard output. An error is raised again with the rank
    that it is of; torchrun then ends the others.

    Raises:
        RanksError: Whatever the block raised, on several ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield True
        return
    uses_gpu = torch.cuda.is_available()
    if uses_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if uses_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        if rank == 0:
            yield True
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield False
        dist.barrier()
        dist.destroy_process_group()
    except (NormkitError, OSError) as error:
        raise RanksError(f"rank {rank} of {size}: {error}") from error
    except Exception as error:
        raise RanksError(
            f"rank {rank} of {size}: {type(error).__name__}: {error}"
        ) from error
