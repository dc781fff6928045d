"""torch's operator database, run against normkit.functional."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from normkit import functional

NAMES = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
INFOS = [
    info
    for info in op_db
    if info.name.removeprefix("nn.functional.") in NAMES and info.dtypes
]
each_op = pytest.mark.parametrize("op", INFOS, ids=lambda op: op.name[14:])


def ours(op: OpInfo) -> Callable[..., Tensor]:
    return getattr(functional, op.name.removeprefix("nn.functional."))


def theirs(op: OpInfo) -> Callable[..., Tensor]:
    return getattr(torch.nn.functional, op.name.removeprefix("nn.functional."))


def test_the_database_knows_every_function() -> None:
    assert {op.name for op in INFOS} == {f"nn.functional.{name}" for name in NAMES}


def samples(
    op: OpInfo, dtype: torch.dtype, *, grad: bool = False, reference: bool = False
) -> Iterator[tuple[str, SampleInput]]:
    torch.manual_seed(0)
    draw = op.reference_inputs if reference else op.sample_inputs
    for k, sample in enumerate(draw("cpu", dtype, requires_grad=grad)):
        given = {
            name: tuple(v.shape) if isinstance(v, Tensor) else v
            for name, v in sample.kwargs.items()
        }
        yield f"sample {k} {tuple(sample.input.shape)} {given}", sample


def called(f: Callable[..., Tensor], sample: SampleInput) -> Tensor:
    """Call f on copies: running statistics are changed in place."""
    return f(copied(sample.input), *map(copied, sample.args), **copied(sample.kwargs))


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        twin = value.detach().clone()
        return twin.requires_grad_() if value.requires_grad else twin
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return value


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(torch.promote_types(value.dtype, torch.float64))
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    return value


def compare_samples(
    peers: Any, op: OpInfo, check: Callable, dtype: torch.dtype = torch.float64
) -> None:
    """Run `check(f, sample)` for each differentiable sample, on torch and normkit."""
    for case, sample in samples(op, dtype, grad=True):
        peers.compare(
            case,
            lambda s=sample: check(theirs(op), s),
            lambda s=sample: check(ours(op), s),
        )
    peers.judge()


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in INFOS for dtype in sorted(op.dtypes, key=str)],
    ids=lambda v: str(v)[6:] if isinstance(v, torch.dtype) else v.name[14:],
)
def test_values_dtype_and_layout_are_those_of_torch(
    peers: Any, op: OpInfo, dtype: torch.dtype
) -> None:
    for case, sample in both_kinds_of_samples(op, dtype):
        like = called(theirs(op), sample)
        truth = float64_truth(op, sample)

        def check(f: Callable, sample=sample, like=like, truth=truth) -> None:
            found = called(f, sample)
            assert found.dtype == like.dtype == dtype
            assert not found.numel() or found.stride() == like.stride()
            # torch's own tolerances for the dtype
            torch.testing.assert_close(found, truth.to(dtype), equal_nan=True)

        peers.compare(case, lambda c=check: c(theirs(op)), lambda c=check: c(ours(op)))
    peers.judge()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@each_op
def test_values_are_those_of_float64(op: OpInfo, dtype: torch.dtype) -> None:
    """8 roundings in float32; 1 in halves, whose statistics are wide."""
    roundings = 8 if dtype == torch.float32 else 1
    for case, sample in both_kinds_of_samples(op, dtype):
        truth = float64_truth(op, sample)
        found = called(ours(op), sample).double()
        if found.numel() and truth.isfinite().all():
            scale = max(1.0, float(truth.abs().max()))
            error = float((found - truth).abs().max()) / scale
            assert error <= roundings * torch.finfo(dtype).eps, case


def both_kinds_of_samples(
    op: OpInfo, dtype: torch.dtype
) -> Iterator[tuple[str, SampleInput]]:
    yield from samples(op, dtype)
    if op.reference_inputs_func is not None:
        yield from samples(op, dtype, reference=True)


def float64_truth(op: OpInfo, sample: SampleInput) -> Tensor:
    kwargs = widened(sample.kwargs)
    if op.name.endswith("rms_norm") and kwargs.get("eps") is None:
        # The default depends on the dtype, and the truth is computed in another.
        is_narrow = sample.input.dtype not in (torch.float64, torch.complex128)
        narrow = torch.float32 if is_narrow else torch.float64
        kwargs["eps"] = torch.finfo(narrow).eps
    return theirs(op)(widened(sample.input), *map(widened, sample.args), **kwargs)


@pytest.mark.parametrize(
    "op", [op for op in INFOS if op.ref is not None], ids=lambda op: op.name[14:]
)
def test_values_are_those_of_the_numpy_reference(peers: Any, op: OpInfo) -> None:
    for case, sample in samples(op, torch.float64, reference=True):
        as_numpy = sample.numpy()

        def check(f: Callable, sample=sample, as_numpy=as_numpy) -> None:
            wanted = op.ref(as_numpy.input, *as_numpy.args, **as_numpy.kwargs)
            found = called(f, sample).numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-7)

        peers.compare(case, lambda c=check: c(theirs(op)), lambda c=check: c(ours(op)))
    peers.judge()


@pytest.mark.parametrize(
    "op",
    [op for op in INFOS if op.error_inputs_func is not None],
    ids=lambda op: op.name[14:],
)
def test_bad_input_raises_the_type_and_the_words_of_torch(op: OpInfo) -> None:
    for bad in op.error_inputs("cpu"):
        # torch 2.14 refuses empty groups; older versions and normkit return them.
        is_empty = "to be greater than 0" in bad.error_regex
        for f in (theirs(op),) if is_empty else (theirs(op), ours(op)):
            with pytest.raises(bad.error_type, match=bad.error_regex):
                called(f, bad.sample_input)


def split_tensors(
    f: Callable[..., Tensor], sample: SampleInput
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Make f a function of the tensors that require a gradient alone."""
    values = [sample.input, *sample.args]
    places = [
        k for k, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad
    ]
    named = [
        k for k, v in sample.kwargs.items() if isinstance(v, Tensor) and v.requires_grad
    ]

    def g(*tensors: Tensor) -> Tensor:
        given = [None if k in places else copied(v) for k, v in enumerate(values)]
        kwargs = {k: copied(v) for k, v in sample.kwargs.items() if k not in named}
        rest = iter(tensors)
        for k in places:
            given[k] = next(rest)
        for k in named:
            kwargs[k] = next(rest)
        return f(*given, **kwargs)

    tensors = [values[k] for k in places] + [sample.kwargs[k] for k in named]
    return g, tuple(t.detach().clone().requires_grad_() for t in tensors)


@pytest.fixture
def is_deep(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """True for the first eight calls, four cases on two peers; always when slow.

    Batched and mixed-mode derivatives take four times as long as plain ones.
    """
    calls, every = itertools.count(), request.config.getoption("--run-slow")
    return lambda: every or next(calls) < 8


@each_op
def test_derivatives_pass_gradcheck_in_reverse_and_forward_mode(
    peers: Any, op: OpInfo, is_deep: Callable[[], bool]
) -> None:
    def check(f: Callable, sample: SampleInput) -> None:
        g, tensors = split_tensors(f, sample)
        deep = is_deep()
        assert gradcheck(
            g,
            tensors,
            fast_mode=sum(t.numel() for t in tensors) > 12,
            check_forward_ad=True,
            check_batched_grad=deep,
            check_batched_forward_grad=deep,
        )

    compare_samples(peers, op, check)


@each_op
def test_second_derivatives_pass_gradgradcheck(
    peers: Any, op: OpInfo, is_deep: Callable[[], bool]
) -> None:
    def check(f: Callable, sample: SampleInput) -> None:
        g, tensors = split_tensors(f, sample)
        assert gradgradcheck(g, tensors, fast_mode=True, check_fwd_over_rev=is_deep())

    compare_samples(peers, op, check)


@each_op
def test_non_contiguous_arguments_give_the_same(peers: Any, op: OpInfo) -> None:
    def check(f: Callable, sample: SampleInput) -> None:
        g, tensors = split_tensors(f, sample)
        y = g(*tensors)
        dy = torch.randn_like(y)
        wanted = torch.autograd.grad(y, tensors, dy)
        odd = [
            noncontiguous_like(t.detach()).requires_grad_() if t.numel() > 1 else t
            for t in tensors
        ]
        again = g(*odd)
        found = torch.autograd.grad(again, odd, noncontiguous_like(dy))
        for a, b in zip((again, *found), (y, *wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    compare_samples(peers, op, check)


@each_op
def test_vmap_equals_a_loop(peers: Any, op: OpInfo) -> None:
    def check(f: Callable, sample: SampleInput) -> None:
        g, tensors = split_tensors(f, sample)
        tensors = tuple(t.detach() for t in tensors)
        stacked = [torch.stack([t, 2 * t, t - 1]) for t in tensors]
        for dims in itertools.islice(itertools.product((0, None), repeat=3), 7):
            in_dims = tuple(dims[: len(tensors)])
            if not any(d == 0 for d in in_dims):
                continue
            triples = zip(stacked, tensors, in_dims, strict=True)
            given = [s if d == 0 else t for s, t, d in triples]
            found = torch.vmap(g, in_dims)(*given)
            for k in range(3):
                pairs = zip(given, in_dims, strict=True)
                one = [s[k] if d == 0 else s for s, d in pairs]
                torch.testing.assert_close(found[k], g(*one), rtol=1e-9, atol=1e-9)

    compare_samples(peers, op, check)
