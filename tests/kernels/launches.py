"""The GPU backend on CPU tensors with every launch left out: what a call costs.

    python -m kernels.launches

Prints the launches of each layer, the functions that Python enters for a call, and its
time: without kernels and driver, it is what the host adds to each layer.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import normkit
from normkit.functional.signature import calls
from normkit.kernels.choose import _BACKENDS
from normkit.kernels.gpu import GpuBackend, launch

# Operations of torch that start nothing on a device.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "view", "view_as", "select"),
    *("as_strided", "slice", "unbind", "detach", "reshape", "expand", "alias", "to"),
    *("unsqueeze", "permute", "result_type", "contiguous", "_unsafe_view"),
}


class Caught(list):
    """The launches within the block, none of which is made."""

    def __enter__(self):
        self._submit = launch.submit
        launch.submit = self._catch
        return self

    def _catch(self, kernel, grid, num_warps, max_registers=None, **arguments) -> None:
        options = launch.options_of(num_warps, max_registers)
        self.append((kernel, grid, options, arguments))

    def __exit__(self, *error) -> None:
        launch.submit = self._submit


@contextlib.contextmanager
def on_cpu_tensors() -> Iterator[None]:
    """Let the GPU backend take CPU tensors within the block, and launch nothing."""
    backend, submit = _BACKENDS["gpu"], launch.submit
    _BACKENDS["gpu"] = GpuBackend(device_types=("cpu",))
    launch.submit = lambda *_, **__: None
    try:
        with normkit.backend("gpu"):
            yield
    finally:
        _BACKENDS["gpu"], launch.submit = backend, submit
        calls.clear()  # they were found for CPU tensors


def launches(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call starts, and of torch's operations that do."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with Caught() as caught, torch.profiler.profile(activities=activities) as profile:
        call()
    ours = [kernel.__name__ for kernel, *_ in caught]
    outermost = [event for event in profile.events() if event.cpu_parent is None]
    return ours + [name for event in outermost for name in _started(event)]


def _started(event) -> list[str]:
    """Names of torch's outermost operations in an event that start a kernel."""
    name = event.name.removeprefix("aten::")
    if event.name != name and name not in FREE:
        return [event.name]
    return [found for child in event.cpu_children for found in _started(child)]


def entered(call: Callable[[], object]) -> int:
    """How many Python functions a call enters."""
    found = [0]

    def count(frame, event, argument) -> None:
        found[0] += event == "call"

    call()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[0]


def microseconds(call: Callable[[], object], turns: int = 50) -> float:
    """The least mean time of a call without its launches."""
    times = []
    for _ in range(40):
        start = time.perf_counter()
        for _ in range(turns):
            call()
        times.append((time.perf_counter() - start) / turns)
    return 1e6 * min(times)


Forward = Callable[[], Tensor]


def layers(learns: bool = True) -> dict[str, tuple[Forward, list[Tensor]]]:
    """Forward of each layer, and the tensors whose gradients are wanted."""
    functional = normkit.functional

    def images() -> Tensor:
        x = torch.randn(4, 16, 8, 8, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(learns)

    def vector(size: int) -> Tensor:
        return torch.rand(size).requires_grad_(learns)

    x, residual, rows = images(), images(), torch.randn(64, 128, dtype=torch.bfloat16)
    rows.requires_grad_(learns)
    weight, bias, factor, summand = vector(16), vector(16), vector(128), vector(128)
    running = [torch.zeros(16), torch.ones(16)]
    counters = {
        "num_batches_tracked": torch.tensor(0),
        "num_batches_skipped": torch.tensor(0),
    }
    arguments = (x, *running, weight, bias, True)
    batch = functional.batch_norm
    of_sum = {"residual": residual, "activation": "relu"}
    return {
        "batch norm": (lambda: batch(*arguments, **counters), [x, weight, bias]),
        "batch norm, relu": (
            lambda: batch(*arguments, **counters, activation="relu"),
            [x, weight, bias],
        ),
        "batch norm, add, relu": (
            lambda: batch(*arguments, **counters, **of_sum),
            [x, weight, bias, residual],
        ),
        "layer norm": (
            lambda: functional.layer_norm(rows, (128,), factor, summand),
            [rows, factor, summand],
        ),
        "RMS norm": (
            lambda: functional.rms_norm(rows, (128,), factor),
            [rows, factor],
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':24}{'functions':>10}{'us, no grad':>13}{'us, grad':>10}  launches")
    with on_cpu_tensors():
        plain = layers(learns=False)
        for name, (forward, _) in layers().items():
            times = microseconds(plain[name][0]), microseconds(forward)
            print(
                f"{name:24}{entered(forward):10}{times[0]:13.1f}{times[1]:10.1f}"
                f"  {', '.join(launches(forward))}"
            )


if __name__ == "__main__":
    main()
