"""Every route is taken where the table of functional/README.md says, also after others.

A call that was met before is remembered by its signature; what a later call changes
(a dtype, a transform, a mode, a backend) must not run what was remembered.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
from normkit.errors import DtypeError, ShapeError
from normkit.functional import engine, signature
from normkit.functional.passes import Passes
from normkit.functional.route import Route
from normkit.kernels.cpu.call import NativeCall
from normkit.kernels.cpu.loading import library, why_absent

needs_library = pytest.mark.skipif(
    library() is None, reason=why_absent() or "the library is there"
)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch 1-d": (lambda: normkit.nn.BatchNorm1d(6), (8, 6)),
    "batch 2-d": (lambda: normkit.nn.BatchNorm2d(6), (4, 6, 5, 3)),
    "layer": (lambda: normkit.nn.LayerNorm(16), (8, 16)),
    "rms": (lambda: normkit.nn.RMSNorm(6), (8, 6)),
    "group": (lambda: normkit.nn.GroupNorm(2, 6), (4, 6, 5, 3)),
    "instance": (lambda: normkit.nn.InstanceNorm2d(6, affine=True), (4, 6, 5, 3)),
}
# The node of torch's operator, where it is tried first on what needs a gradient.
ATEN = {"layer": "NativeLayerNorm", "group": "NativeGroupNorm"}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routes of the calls so far; kernels with the name of what ran them."""
    routes: list[str] = []
    signature.calls.clear()
    for kind, name in ((NativeCall, "native"), (Passes, "passes")):

        def noting(
            call: Any, *given: Any, honest: Any = kind.forward, name: str = name
        ) -> Any:
            routes.append(f"kernels: {name}")
            return honest(call, *given)

        monkeypatch.setattr(kind, "forward", noting)
    for name in ("normalize", "normalize_by_constants"):
        honest = getattr(engine.differentiable, name)

        def formula(*given: Any, honest: Any = honest, **named: Any) -> Any:
            routes.append("differentiable")
            return honest(*given, **named)

        monkeypatch.setattr(engine.differentiable, name, formula)
    return routes


class Watching(TorchDispatchMode):
    """Notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_library
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_plain_tensors_run_on_native_kernels_first_and_again(
    name: str, training: bool, taken: list[str]
) -> None:
    build, shape = LAYERS[name]
    layer, x = build().train(training), torch.randn(shape)
    outputs = [layer(x) for _ in range(3)]
    if name in ATEN:
        for y in outputs:
            assert type(y.grad_fn).__name__.startswith(ATEN[name])
        taken.clear()
        with torch.no_grad():
            for _ in range(3):
                layer(x)
        assert taken == ["kernels: native"] * 3
        layer(x + 100)
        assert taken == ["kernels: native"] * 4
        return
    assert taken == ["kernels: native"] * 3


@needs_library
@pytest.mark.parametrize("name", LAYERS)
def test_what_was_remembered_is_not_run_where_another_route_is_due(
    name: str, taken: list[str]
) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    with torch.no_grad():  # recorded, torch's operator may run
        layer(x)
    with normkit.backend("reference"):
        layer(x)
    with normkit.deterministic():
        layer(x)
    with Watching() as watching:
        layer(x)
    assert any("aten" in name for name in watching.seen)
    layer(x.as_subclass(type("Own", (Tensor,), {})))
    native, passes = "kernels: native", "kernels: passes"
    assert taken == [native, passes, native, passes, passes]
    taken.clear()
    torch.func.jvp(layer.eval(), (x,), (x,))
    weights = {"weight": layer.weight.detach()}
    torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).sum())(weights)
    with torch.no_grad():
        layer(x)
    assert taken == ["differentiable", "differentiable", "kernels: native"]


@pytest.mark.parametrize("shape", [(2, 4, 3, 9), (4, 6, 5, 3, 7), (4, 6, 30, 30)])
def test_forward_mode_is_right_for_every_layer_and_size(shape: tuple[int, ...]) -> None:
    rank = len(shape) - 2
    layers = [
        normkit.nn.GroupNorm(2, shape[1]),
        getattr(normkit.nn, f"InstanceNorm{rank}d")(shape[1]),
        getattr(normkit.nn, f"BatchNorm{rank}d")(shape[1]),
        normkit.nn.LayerNorm(shape[-1]),
        normkit.nn.RMSNorm(shape[-1]),
    ]
    x, t = torch.randn(shape), torch.randn(shape)
    for layer in layers:
        layer(x)  # remembered
        _, moved = torch.func.jvp(layer, (x,), (t,))
        wide = layer.double()
        _, exact = torch.func.jvp(wide, (x.double(),), (t.double(),))
        torch.testing.assert_close(moved.double(), exact, rtol=1e-4, atol=1e-4)


def test_weights_of_a_mask_have_no_kernel(taken: list[str]) -> None:
    layer, x = normkit.nn.BatchNorm1d(6), torch.randn(8, 6)
    layer(x, mask=torch.rand(8, 1))
    assert taken == ["differentiable"]


@needs_library
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_tracers_record_torchs_own_layer(taken: list[str]) -> None:
    model, x = nn.Sequential(normkit.nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4)
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    traced = torch.jit.trace(model.eval(), x, check_trace=False)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    assert taken == []


def test_the_table_of_routes_names_each_once() -> None:
    page = Path(engine.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    # That of the recorded calls is asked for before any other.
    assert rows == [*(route.value for route in Route), "recorded"]


@needs_library
def test_a_signature_holds_all_that_decides() -> None:
    """Each change gives the result of a call that nothing was remembered for."""
    layer: Any = normkit.nn.BatchNorm2d(6)
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 6, 5, 4)
    residual = torch.randn(4, 6, 5, 4)
    layer(x)
    last = torch.channels_last

    def half(layer: Any) -> None:
        layer.weight.data = layer.weight.data.bfloat16()

    changes: list[tuple[str, Callable[[Any], None], Callable[[Tensor], Any]]] = [
        ("layout", lambda layer: None, lambda x: x.contiguous(memory_format=last)),
        ("view", lambda layer: None, lambda x: x.transpose(2, 3)),
        ("dtype of x", lambda layer: None, lambda x: x.double()),
        ("batch", lambda layer: None, lambda x: x[1:]),
        ("eps", lambda layer: setattr(layer, "eps", 0.5), lambda x: x),
        ("momentum", lambda layer: setattr(layer, "momentum", 0.7), lambda x: x),
        ("all batches", lambda layer: setattr(layer, "momentum", None), lambda x: x),
        ("mode", lambda layer: layer.eval(), lambda x: x),
        ("activation", lambda layer: setattr(layer, "activation", "silu"), lambda x: x),
        ("dtype of weight", half, lambda x: x),
        ("no bias", lambda layer: layer.register_parameter("bias", None), lambda x: x),
        ("no buffers", lambda layer: setattr(layer, "track_running_stats", False),
         lambda x: x),
    ]  # fmt: skip
    for name, change, given in changes:
        found = []
        for forgets in (False, True):
            other: Any = normkit.nn.BatchNorm2d(6)
            other.load_state_dict(layer.state_dict())
            for _ in range(2):
                other(x), other(x, residual=residual), other(x, mask=x > 0)
            change(other)
            if forgets:
                signature.calls.clear()
            z = given(x)
            added = torch.empty_like(z).copy_(given(residual))
            y = [other(z), other(z, residual=added), other(z, mask=z > 0)]
            found.append([*y, other.running_mean, other.running_var])
        for remembered, fresh in zip(*found, strict=True):
            assert torch.equal(remembered, fresh), name


def test_vectors_that_no_longer_fit_raise_after_the_call_was_remembered() -> None:
    layer, x = normkit.nn.LayerNorm(6), torch.randn(8, 6)
    layer(x)
    layer.weight.data = torch.ones(5)
    with pytest.raises(ShapeError):
        layer(x)
    batch, y = normkit.nn.BatchNorm1d(6), torch.randn(8, 6)
    batch(y)
    batch.running_mean = torch.zeros(5)
    with pytest.raises(ShapeError):
        batch(y)
    with pytest.raises(ShapeError):
        normkit.nn.BatchNorm1d(6)(y, residual=y[:4])


def test_a_counter_of_another_dtype_is_refused_and_nothing_beside_it_written() -> None:
    counters = torch.tensor([255, 7], dtype=torch.uint8)
    running = torch.zeros(4), torch.ones(4)
    with pytest.raises(DtypeError, match="int64"):
        normkit.functional.batch_norm(
            *(torch.randn(8, 4), *running),
            training=True,
            num_batches_tracked=counters[0],
        )
    assert counters.tolist() == [255, 7]


def test_signatures_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "MAX_CALLS", 8)
    layer = normkit.nn.LayerNorm(6)
    for size in range(1, 40):
        layer(torch.randn(size, 6))
        assert len(signature.calls) <= 8


FORMATS = ("row-major", "channels last", "transposed", "strided")


def laid(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        order = (0, *range(2, x.dim()), 1)
        back = (0, x.dim() - 1, *range(1, x.dim() - 1))
        return x.permute(order).contiguous().permute(back)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        return wide[..., ::2].copy_(x)
    return x.clone()


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, 6, 1, 10), (4, 6, 10, 1), (1, 6, 5, 4), (4, 6, 1, 1), (4, 6, 1, 5, 1)]
)
def test_gradients_are_right_where_input_and_gradient_differ_in_layout(
    shape: tuple[int, ...], training: bool, backend: str | None
) -> None:
    """Sizes of 1 leave strides open: torch's CPU kernels are off by O(1) there."""
    rank = len(shape) - 2
    for name in ("BatchNorm", "InstanceNorm", "GroupNorm"):
        if name == "InstanceNorm" and torch.Size(shape[2:]).numel() == 1:
            continue
        if name == "GroupNorm":
            layer = normkit.nn.GroupNorm(2, 6)
        else:
            layer = getattr(normkit.nn, f"{name}{rank}d")(6, affine=True)
        nn.init.normal_(layer.weight)
        layer.train(training)
        exact = copy.deepcopy(layer).double()
        x, dy = torch.randn(shape), torch.randn(shape)
        for of_x in FORMATS:
            for of_dy in FORMATS:
                if backend == "cpu" and of_x == "strided":
                    continue  # no kernel reads gaps
                given = laid(x, of_x).requires_grad_()
                wide = x.double().requires_grad_()
                with (
                    contextlib.nullcontext()
                    if backend is None
                    else normkit.backend(backend)
                ):
                    (dx,) = torch.autograd.grad(layer(given), given, laid(dy, of_dy))
                with normkit.backend("reference"):
                    (truth,) = torch.autograd.grad(exact(wide), wide, dy.double())
                torch.testing.assert_close(
                    dx.double(),
                    truth,
                    rtol=1e-5,
                    atol=1e-5,
                    msg=f"{name} {of_x} {of_dy}",
                )


def test_passes_and_native_calls_agree_on_what_they_keep() -> None:
    """A backward under a mode continues what native kernels began."""
    layer, x = normkit.nn.BatchNorm2d(6, activation="relu"), torch.randn(4, 6, 5, 4)
    nn.init.normal_(layer.weight)
    dy, found = torch.randn(4, 6, 5, 4), []
    mask = torch.rand(4, 6, 5, 4) > 0.2
    for watched in (False, True):
        given = x.clone().requires_grad_()
        y = layer(given, mask=mask, residual=given * 2)
        with Watching() if watched else contextlib.nullcontext():
            found.append(torch.autograd.grad(y, [given, *layer.parameters()], dy))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_an_output_may_be_changed_in_place(
    name: str, training: bool, backend: str
) -> None:
    if backend == "cpu" and library() is None:
        pytest.skip("needs the native kernels")
    build, shape = LAYERS[name]
    layer, x = build().train(training), torch.randn(shape)
    with normkit.backend(backend):
        expected = nn.functional.relu(layer(x))
        y = nn.functional.relu(layer(x), inplace=True)
        y.sum().backward()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_statistic_that_is_negated_lazily_is_not_read_by_its_address(
    training: bool,
) -> None:
    """After a call with plain ones has been remembered."""
    x, mean, var = torch.randn(8, 3), torch.randn(3), torch.rand(3) + 0.5
    plain = mean.clone(), var.clone()
    negated = torch._neg_view(-mean), torch._neg_view(-var)
    wanted = normkit.functional.batch_norm(x, *plain, training=training)
    found = normkit.functional.batch_norm(x, *negated, training=training)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(negated, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_in_halves_is_rounded_once_on_the_differentiable_route(
    name: str, dtype: torch.dtype
) -> None:
    """Two casts of x gave two gradients, each rounded before they cancel."""
    build, shape = LAYERS[name]
    layer, x = build(), (torch.randn(shape) * 0.05).to(dtype)
    layer.eps = 1e-5  # RMS norm's own depends on the dtype
    # Nearly what the layer removes: what is left is far smaller than its terms.
    dy = (1 + 0.01 * torch.randn(shape)).to(dtype)
    exact = copy.deepcopy(layer).double()
    _, back = torch.func.vjp(exact, x.double())
    (truth,) = back(dy.double())
    _, back = torch.func.vjp(layer, x)
    (found,) = back(dy)
    allowed = torch.finfo(dtype).eps * 0.51 * truth.abs() + 2e-4
    assert ((found.double() - truth).abs() <= allowed).all()
