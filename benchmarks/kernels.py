"""The CPU kernels alone, in copies of the tensor, with the memory of outputs there.

`normkit bench speed` times whole functions, whose outputs are fresh memory: 32 MB and
more of it is mapped anew at each call, which costs more than the arithmetic. Here
outputs are used again, as the plain copy's target is. One thread, in turns, process CPU
time; least and median of the turns.

Run: `python benchmarks/kernels.py [seconds for each case]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from normkit.bench.cases import RESNET, ROWS
from normkit.bench.timing import in_turns
from normkit.kernels.cpu import call as native
from normkit.kernels.spec import Spec


def same_outputs(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, with the k-th output of every call in the same memory."""
    outputs: list[Tensor] = []
    real = native._empty_like

    def again() -> object:
        taken = iter(outputs)

        def empty_like(x: Tensor) -> Tensor:
            output = next(taken, None)
            if output is None:
                output = real(x)
                outputs.append(output)
            return output

        with mock.patch.object(native, "_empty_like", empty_like):
            return call()

    return again


def measure(
    name: str, x: Tensor, dims: tuple[int, ...], varies: int, activation: str
) -> str:
    """One row of the table; weight and bias vary along one dimension."""
    weight, bias, dy = (
        *(torch.randn(x.shape[varies]) for _ in range(2)),
        torch.randn_like(x),
    )
    vector = tuple(n if d == varies else 1 for d, n in enumerate(x.shape))
    spec = Spec(dims, 1e-5, vector=vector, activation=activation)
    operands = x, weight, bias, None, None
    call = native.call_for(spec, operands)
    assert call is not None
    _, kept = call.forward(operands, None, "some")
    source = np.zeros(x.nbytes, np.uint8)
    target = np.zeros_like(source)
    timings = in_turns(
        {
            "copy": lambda: np.copyto(target, source),
            "forward": same_outputs(lambda: call.forward(operands, None, "some")),
            "backward": same_outputs(
                lambda: call.backward(
                    dy, (*operands, None, kept), (True, True, True, False)
                )
            ),
        },
        float(sys.argv[1]) if len(sys.argv) > 1 else 2.0,
    )
    copy = timings["copy"]
    cells = [
        f"{timing.cpu / copy.cpu:.2f} ({timing.cpu_median / copy.cpu_median:.2f})"
        for timing in (timings["forward"], timings["backward"])
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| copies, least (median) | forward | backward |\n| --- | ---: | ---: |")
    for layout in ("nchw", "nhwc"):
        for shape in RESNET:
            x = torch.randn(shape)
            if layout == "nhwc":
                x = x.contiguous(memory_format=torch.channels_last)
            name = f"batch+relu {'×'.join(map(str, shape))} {layout}"
            print(measure(name, x, (0, 2, 3), 1, "relu"), flush=True)
    for rows, width in ROWS:
        name = f"layer {rows}×{width}"
        print(measure(name, torch.randn(rows, width), (1,), 1, "none"), flush=True)


if __name__ == "__main__":
    main()
