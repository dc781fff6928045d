"""What the CPU backend refuses, and that it shares torch's threads with everybody."""

import logging
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import normkit
import normkit.functional as F
from normkit.kernels import choose
from normkit.kernels.choose import backend_named
from normkit.kernels.cpu import loading as native
from normkit.kernels.cpu.geometry import geometry_of

needs_library = pytest.mark.skipif(
    native.library() is None, reason=native.why_absent() or "built"
)


def reasons(x: Tensor, dims: tuple[int, ...] = (0,)) -> list[str]:
    return backend_named("cpu").reasons_against(x, dims)


class Subclass(torch.Tensor):
    """Any subclass may hold its values elsewhere."""


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@needs_library
def test_a_plain_tensor_runs_on_the_kernels() -> None:
    x = torch.randn(4, 3, 5)
    assert reasons(x, (0, 2)) == []
    assert choose(x, (0, 2)).name == "cpu"
    assert "cpu: runs" in normkit.explain(x).to_text()


@needs_library
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.randn(4, 3).as_subclass(Subclass), "Subclass"),
        (lambda: torch.randn(4, 3, device="meta"), "meta"),
        (lambda: torch.randn(4, 6)[:, ::2], "gaps"),
        (lambda: torch.randn(3).expand(4, 3), "overlaps"),
        (lambda: torch.randn(0, 3), "no values"),
        (lambda: torch.randn(4, 3).to_sparse(), "sparse"),
        (lambda: torch.randn(4, 3, dtype=torch.complex64), "complex64"),
        (lambda: torch.randn(4, 3, dtype=torch.cfloat).conj().imag, "lazy"),
        (lambda: torch.randn(3, 4).t(), "another order"),
    ],
)
def test_what_is_not_a_plain_dense_tensor_is_refused(make, said: str) -> None:
    x = make()
    dims = () if said == "another order" else (0,)
    (reason,) = reasons(x, dims)
    assert said in reason


@needs_library
def test_fake_tensors_and_modes_that_watch_are_refused() -> None:
    with FakeTensorMode():
        assert "FakeTensor" in reasons(torch.randn(4, 3))[0]
    x = torch.randn(4, 3)
    with Watching():
        assert "dispatch mode" in reasons(x)[0]
    with FlopCounterMode(display=False):
        assert "dispatch mode" in reasons(x)[0]
    assert reasons(x) == []


@needs_library
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_a_trace_records_torch_operations() -> None:
    x = torch.randn(6, 3)
    traced = torch.jit.trace(lambda t: F.batch_norm(t, None, None, training=True), x)
    other = torch.randn(6, 3) * 3 + 1
    expected = F.batch_norm(other, None, None, training=True)
    torch.testing.assert_close(traced(other), expected)


def test_without_the_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_load", lambda: "there was no compiler")
    native._found.cache_clear()
    try:
        x = torch.randn(5, 3)
        with caplog.at_level(logging.WARNING, logger="normkit"):
            for _ in range(3):
                F.batch_norm(x, None, None, training=True)
        assert choose(x, (0,)).name == "reference"
        assert "there was no compiler" in normkit.explain(x).to_text()
        messages = [r.getMessage() for r in caplog.records]
        assert messages == ["no native CPU kernels: there was no compiler"]
        with (
            normkit.backend("cpu"),
            pytest.raises(normkit.errors.KernelError, match="no compiler"),
        ):
            F.batch_norm(x, None, None, training=True)
    finally:
        native._found.cache_clear()


@needs_library
def test_an_unknown_instruction_set_is_named_with_the_known() -> None:
    library = native.library()
    assert library is not None
    with pytest.raises(ValueError, match="baseline"):
        library.choose_isa("avx1024")


def test_the_plan_reads_memory_in_any_order_of_dimensions() -> None:
    x = torch.empty(2, 6, 5, 7)
    last = x.contiguous(memory_format=torch.channels_last)

    def sizes(t: Tensor, statistic, affine=None):
        return geometry_of(tuple(t.shape), t.stride(), statistic, affine).sizes

    per_channel, per_sample = (1, 6, 1, 1), (2, 6, 1, 1)
    assert sizes(x, per_channel, per_channel) == (1, 2, 6, 1, 35, 6, 0)
    assert sizes(last, per_channel, per_channel) == (1, 70, 6, 1, 1, 6, 0)
    assert sizes(x, per_sample, per_channel) == (1, 1, 12, 1, 35, 6, 0)
    assert sizes(last, per_sample, per_channel) == (2, 35, 6, 1, 1, 6, 0)
    assert sizes(x, (2, 1, 1, 1), (1, 6, 5, 7)) == (1, 1, 2, 1, 210, 1, 1)
    assert sizes(x, (2, 1, 1, 1), per_channel) == (1, 1, 2, 6, 35, 1, 0)
    assert sizes(last, (2, 1, 1, 1), per_channel) == (2, 35, 1, 1, 6, 1, 1)
    # One learned value for each sample has no kernel.
    assert geometry_of(tuple(x.shape), x.stride(), per_channel, (2, 1, 1, 1)).reason


@needs_library
def test_four_python_threads_at_once_get_the_results_of_one() -> None:
    inputs = [torch.randn(16, 8, 32, 33) + k for k in range(4)]
    expected = [F.batch_norm(x, None, None, training=True) for x in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            y = F.batch_norm(inputs[k], None, None, training=True)
            if not torch.equal(y, expected[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def run(code: str) -> None:
    """In a process of its own, whose threads nobody has touched."""
    head = "import os, torch, normkit.functional as F\ntorch.set_num_threads(2)\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_and_the_kernels_share_one_pool_of_threads() -> None:
    run("""
threads = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(64, 16, 64, 64)
(x + 1).sum()
before = threads()
assert before > 1
F.batch_norm(x, None, None, training=True)
assert threads() == before, (before, threads())
pools = {l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.split("/")[-1]}
assert len(pools) == 1, pools
""")


@needs_library
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_forked_child_runs_serially_instead_of_waiting_for_lost_threads() -> None:
    run("""
x = torch.randn(64, 16, 64, 64)
y = F.batch_norm(x, None, None, training=True)
y.sum()
child = os.fork()
if child == 0:
    # numpy compares: torch's own parallel operations would wait for the lost threads.
    again = F.batch_norm(x, None, None, training=True)
    os._exit(0 if (again.numpy() == y.numpy()).all() else 7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert torch.equal(F.batch_norm(x, None, None, training=True), y)
""")


@pytest.mark.parametrize("name", ["_FLAGS", "FIXED", "RANKS"])
def test_a_library_of_other_sources_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not isinstance(native._load(), str)
    newer = native._FLAGS + 256 if name == "_FLAGS" else struct.Struct("=16q2d")
    monkeypatch.setattr(native, name, newer)
    assert "built from other sources" in str(native._load())


def test_an_older_library_without_the_functions_of_tensors_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(path: Path) -> None:
        raise AttributeError("undefined symbol: normkit_functions")

    monkeypatch.setattr(native, "_functions", missing)
    assert "does not load (undefined symbol" in str(native._load())


@needs_library
def test_workers_of_a_data_loader_may_normalize() -> None:
    run("""
from torch.utils.data import DataLoader, Dataset

class Normalized(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, k):
        x = torch.arange(60_000.0).view(1, 4, -1) + k
        return F.layer_norm(x, x.shape[1:])

Normalized()[0]
one = list(DataLoader(Normalized(), batch_size=2))
two = list(DataLoader(Normalized(), batch_size=2, num_workers=2))
assert all(torch.equal(a, b) for a, b in zip(one, two))
""")


# A chunk of runs that ends within a sample, one that holds some samples, a run of two
# chunks, and what two threads share.
@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(7, 5, 47, 97), (40, 3, 33, 11), (3, 5, 200, 201)])
def test_given_statistics_are_applied_in_the_order_of_memory(
    shape: tuple[int, ...], threads: int
) -> None:
    x, channels = torch.randn(shape), shape[1]
    mean, weight, bias = (torch.randn(channels) for _ in range(3))
    var = torch.rand(channels) + 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with normkit.backend("cpu"):
            y = F.batch_norm(x, mean, var, weight, bias)
    finally:
        torch.set_num_threads(before)
    column = (1, channels, 1, 1)
    inverse = (var.double() + 1e-5).rsqrt() * weight.double()
    wanted = (x.double() - mean.view(column)) * inverse.view(column) + bias.view(column)
    assert ((y - wanted).abs() <= 2e-6 * wanted.abs().clamp(min=1)).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(), (1,), (7, 5), (16, 16, 33, 31), (4, 3, 5, 6)], ids=str
)
def test_moments_of_all_values_are_those_of_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of values 1e4 standard deviations from zero, float32 among them."""
    x = (1e4 + torch.randn(shape, dtype=torch.float64)).to(dtype)
    if len(shape) == 4 and shape[0] == 4:
        x = x.to(memory_format=torch.channels_last)
    found = backend_named("cpu").moments_of_all(x)  # type: ignore[attr-defined]
    values = x.double()
    deviations = values - values.mean()
    expected = torch.stack([values.mean(), deviations.square().sum()])
    # float32 deviations: their unit at 1e4 is 1e-3 of a standard deviation.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@needs_library
def test_moments_of_all_values_need_a_plain_dense_tensor() -> None:
    of_all = backend_named("cpu").moments_of_all  # type: ignore[attr-defined]
    for x in (
        torch.randn(4, 6)[:, ::2],
        torch.randn(0, 3),
        torch.randn(4, 3, device="meta"),
        torch.ones(4, dtype=torch.int64),
    ):
        assert of_all(x) is None
    with Watching():
        assert of_all(torch.ones(3)) is None
