"""Faults that tests/kernels must catch; see `sabotage`."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sabotage import fault, wrap


def _reference() -> Any:
    from normkit.kernels.reference import ReferenceBackend

    return ReferenceBackend


@fault(caught_by="tests/kernels/test_agree.py::test_moments")
def the_last_column_is_dropped(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, self, x, dims, mask=None):
        if mask is None and x.shape[-1] > 1 and x.dim() - 1 in dims:
            x = x[..., :-1]
        return honest(self, x, dims, mask)

    wrap(patch, "normkit.kernels.reference.ReferenceBackend.moments", broken)


@fault(caught_by="tests/kernels/test_agree.py::test_moments")
def the_variance_is_a_difference_of_squares(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels.primitives import vector_dtype
    from normkit.moments import Moments, statistics_dtype

    def broken(self, x, dims, mask=None):
        import torch

        wide = x.to(statistics_dtype(x.dtype))
        count = torch.tensor(x.numel() // max(1, wide.sum(dims).numel()))
        mean = wide.mean(dims, keepdim=True)
        m2 = (wide.square().mean(dims, keepdim=True) - mean.square()) * count
        return Moments(count, mean, m2.clamp(min=0)).to(dtype=vector_dtype(x.device))

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/kernels/test_agree.py::test_masked_moments")
def a_mask_divides_by_the_padded_length(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, self, x, dims, mask=None):
        return honest(self, x if mask is None else x.nan_to_num() * mask, dims)

    wrap(patch, "normkit.kernels.reference.ReferenceBackend.moments", broken)


def _broken_kernel(name: str, test: str, module: str, honest: str, broken: str) -> None:
    """Register a fault that changes one line of a kernel's source."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        from importlib import import_module, util

        users = [
            import_module(f"normkit.kernels.gpu.{user}")
            for user in (
                *("tile", "partials", "statistics", "sums", "elementwise", "rows"),
                *("launchers.reductions", "launchers.elementwise", "launchers.rows"),
                "layers",
            )
        ]
        original = import_module(f"normkit.kernels.gpu.{module}")
        whole = dict(vars(original))
        source = Path(str(original.__file__)).read_text()
        assert source.count(honest) == 1, f"{honest!r} must name one place of {module}"
        path = Path(tempfile.mkdtemp()) / f"{module}.py"
        path.write_text(source.replace(honest, broken))
        spec = util.spec_from_file_location(f"broken_{module}", path)
        assert spec is not None
        assert spec.loader is not None
        copy = util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        for user in users:
            for key, value in whole.items():
                if callable(value) and vars(user).get(key) is value:
                    patch.setattr(user, key, getattr(copy, key))

    plant.__name__ = name
    run = f"-p kernels.interpreted tests/kernels/gpu_suite.py -k {test}"
    fault(caught_by=run)(plant)


if find_spec("triton") is not None:

    @fault(caught_by="tests/kernels/test_gpu_calls.py -k no_more_than")
    def gpu_reduces_twice(patch: pytest.MonkeyPatch) -> None:
        from normkit.kernels.gpu import launchers

        honest = launchers.statistics
        patch.setattr(
            *(launchers, "statistics"),
            lambda *a, **k: (honest(*a, **k), honest(*a, **k))[1],
        )

    @fault(caught_by="tests/kernels/test_gpu_calls.py -k launches_what")
    def gpu_clears_what_it_writes(patch: pytest.MonkeyPatch) -> None:
        from normkit.kernels.gpu import launchers

        honest = launchers.apply
        patch.setattr(launchers, "apply", lambda *a, **k: honest(*a, **k).zero_())

    @fault(caught_by="tests/kernels/test_gpu_calls.py -k met_before")
    def gpu_forgets_every_call(patch: pytest.MonkeyPatch) -> None:
        from normkit.functional import engine

        patch.setattr(engine, "remember", lambda key, call: None)

    _broken_kernel(
        *("gpu_merge_forgets_a_split", "running_statistics_move"),
        *("partials", "part < splits", "part < splits - 1"),
    )
    _broken_kernel(
        *("gpu_running_variance_is_biased", "running_statistics_move"),
        *("statistics", "/ (count - 1)", "/ count"),
    )
    _broken_kernel(
        *("gpu_never_reads_a_chunk_again", "all_outliers"),
        *("statistics", "while reads < 2:", "while reads < 1:"),
    )
    _broken_kernel(
        *("gpu_lets_a_bad_batch_in", "bad_batch_moves_nothing"),
        *("statistics", "if bad == 0:", "if bad >= 0:"),
    )
    _broken_kernel(
        *("gpu_leaves_its_ticket", "tickets_at_zero"),
        *("partials", "tl.store(ticket_ptr, 0)", "tl.store(ticket_ptr, drawn + 1)"),
    )
    _broken_kernel(
        *("gpu_center_without_its_low_part", "mean_far_from_zero"),
        *("tile", "return (x - hi) - lo", "return x - hi"),
    )
    _broken_kernel(
        *("gpu_bits_ignore_their_order", "test_every_activation[relu]"),
        *("tile", "grouped << place", "grouped << (7 - place)"),
    )
    _broken_kernel(
        *("gpu_rows_forget_the_weight_in_dx", "test_rows_and_their"),
        *(
            "rows",
            "            g = dy * weight.to(tl.float32)\n",
            "            g = dy\n",
        ),
    )
    _broken_kernel(
        *("gpu_rows_forget_the_mean_of_g", "test_rows_and_their"),
        *("rows", "dx = dx - level[:, None]", "dx = dx"),
    )


@fault(caught_by="tests/kernels/test_templates.py")
def each_cached_call_holds_tensors(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels.cpu import call, packing

    class Own(packing.Doubles):
        def __init__(self, shape: tuple[int, ...]) -> None:
            self._shape, self._like = shape, packing.doubles(shape)

    patch.setattr(call, "Doubles", Own)
