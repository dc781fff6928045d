"""S16: one image per device, with and without statistics across devices."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.nn import BatchNorm2d, SyncBatchNorm
from normkit.studies import verdict as rules
from normkit.studies.figure import bars
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(trial: Trial, *, ranks: int, channels: int, side: int) -> Result:
    """Compare batch norm of a batch with the same batch spread over processes."""
    generator = trial.generator()
    x = 3 + 2 * torch.randn(ranks, channels, side, side, generator=generator)
    cotangent = torch.randn(x.shape, generator=generator)
    weight = torch.randn(channels, generator=generator)
    whole = _whole(x, cotangent, weight)
    local = [_whole(x[r : r + 1], cotangent[r : r + 1], weight) for r in range(ranks)]
    synced = _on_ranks(x, cotangent, weight)
    names = ("output", "input gradient", "weight gradient")
    return {
        "ranks": ranks,
        "synced": {n: _relative(synced[n], whole[n]) for n in names},
        "local": {
            n: _relative(torch.cat([one[n] for one in local]), whole[n])
            for n in names[:2]
        },
    }


def _whole(x: Tensor, cotangent: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return _through(BatchNorm2d(len(weight), bias=False), x, cotangent, weight)


def _through(
    layer: BatchNorm2d | SyncBatchNorm, x: Tensor, cotangent: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Return the forward and backward of `layer` in training with this weight."""
    with torch.no_grad():
        layer.weight.copy_(weight)
    x = x.clone().requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), cotangent)
    return {"output": y.detach(), "input gradient": dx, "weight gradient": dw}


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _on_ranks(x: Tensor, cotangent: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Run the same with one image per process, over gloo."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save({"x": x, "cotangent": cotangent, "weight": weight}, folder / "in.pt")
        # Processes of their own main: a caller's script need not be importable.
        command = [sys.executable, "-m", __name__, name]
        workers = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(len(x))
        ]
        for worker in workers:
            _, said = worker.communicate(timeout=240)
            if worker.returncode:
                raise RuntimeError(f"a process of S16 failed: {said.strip()[-400:]}")
        parts = [torch.load(folder / f"{rank}.pt") for rank in range(len(x))]
    joined = {n: torch.cat([p[n] for p in parts]) for n in ("output", "input gradient")}
    # Each rank has the part of its own image; data-parallel training adds them.
    summed = torch.stack([p["weight gradient"] for p in parts]).sum(0)
    return {**joined, "weight gradient": summed}


def _work(folder: Path, rank: int) -> None:
    """Run one process: its image, normalized by the statistics of all."""
    torch.set_num_threads(1)
    given = torch.load(folder / "in.pt")
    meeting = f"file://{folder / 'meeting'}"
    ranks, weight = len(given["x"]), given["weight"]
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    mine, cotangent = (given[n][rank : rank + 1] for n in ("x", "cotangent"))
    layer = SyncBatchNorm(len(weight), bias=False)
    torch.save(_through(layer, mine, cotangent, weight), folder / f"{rank}.pt")
    # Destroying a gloo group can block for ever (torch 2.13): the process just exits.
    os._exit(0)


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def synced(name: str) -> list[float]:
        return [r["synced"][name] for r in results]

    return [
        rules.verdict(
            "C65",
            *(
                rules.at_most(
                    f"relative error of synchronized {name}s",
                    synced(name),
                    1e-5,
                    about=f"synchronized {name}s are those of one device",
                )
                for name in ("output", "input gradient", "weight gradient")
            ),
            rules.at_least(
                "error of outputs without synchronizing",
                [r["local"]["output"] for r in results],
                0.1,
                none=0,
                about="other outputs without",
            ),
            rules.reported("processes", [r["ranks"] for r in results]),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw errors against one process with the whole batch."""
    axes = figure.subplots()
    names = ("output", "input gradient", "weight gradient")
    rows = [[r["synced"][n] for r in results] for n in names]
    rows += [[r["local"][n] for r in results] for n in names[:2]]
    labels = [f"{n},\nsynchronized" for n in names] + [
        f"{n},\neach alone" for n in names[:2]
    ]
    bars(
        axes,
        labels,
        [[max(v, 1e-9) for v in row] for row in rows],
        indices=(0, 0, 0, 1, 1),
    )
    axes.axhline(1e-5, color="black", lw=0.8, ls=":")
    axes.set(
        title="Relative error against one process with the whole batch", yscale="log"
    )


STUDY = Study(
    id="S16",
    title="one image per device",
    question="Does batch norm over devices equal batch norm of the whole batch?",
    prediction="Synchronized it does, outputs and gradients; alone it is far off.",
    seen="Synchronized, two processes with an image each give outputs and gradients of "
    "one process with both, to rounding.",
    meaning="Statistics over devices are the statistics of the whole batch. Whether a "
    "task needs them is S11.",
    arms=("statistics merged over processes", "each process alone"),
    metric="Relative error of outputs and gradients against a single process.",
    criterion="C65: 1e-5 synchronized, more than 0.1 alone.",
    claims=("C65",),
    minutes=1,
    scales={
        "quick": Scale(1, {"ranks": 2, "channels": 8, "side": 5}),
        "cpu": Scale(10, {"ranks": 2, "channels": 16, "side": 7}),
        "gpu": Scale(5, {"ranks": 4, "channels": 64, "side": 14}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
