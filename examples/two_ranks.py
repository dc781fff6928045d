"""Batch norm over two processes: each rank alone, and both as one batch.

python examples/two_ranks.py
"""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import normkit

CHANNELS, SAMPLES = 8, 4


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def data(rank: int) -> torch.Tensor:
    """Return the few samples of one rank, which come from a domain of their own."""
    source = torch.Generator().manual_seed(rank)
    return rank + torch.randn(SAMPLES, CHANNELS, generator=source)


def work(rank: int, port: int, answers: mp.SimpleQueue) -> None:
    """Normalize this rank's samples alone, then together with the other rank's."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    x = data(rank)
    alone = nn.BatchNorm1d(CHANNELS, affine=False)
    together = nn.Sequential(nn.BatchNorm1d(CHANNELS, affine=False))
    normkit.convert(together, to="sync")  # every batch norm in it; runs on a CPU, too
    whole = nn.BatchNorm1d(CHANNELS, affine=False)(torch.cat([data(0), data(1)]))
    mine = whole[rank * SAMPLES : (rank + 1) * SAMPLES]
    answers.put(
        (
            rank,
            float((alone(x) - mine).abs().max()),
            float((together(x) - mine).abs().max()),
        )
    )
    dist.destroy_process_group()


def main() -> dict[int, tuple[float, float]]:
    """Run two ranks and print how far each is from batch norm of the whole batch."""
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    mp.spawn(work, (free_port(), answers), nprocs=2)
    found = dict(sorted((r, (a, t)) for r, a, t in (answers.get() for _ in range(2))))
    for rank, (alone, together) in found.items():
        print(
            f"rank {rank}: {alone:.2f} off alone, {together:.1e} off as SyncBatchNorm"
        )
    return found


if __name__ == "__main__":
    main()
