"""torch's module database, run against normkit: nothing fails that torch.nn passes."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal import common_nn
from torch.testing._internal.common_modules import (
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    module_db,
)
from torch.testing._internal.common_utils import noncontiguous_like

import normkit.nn

INFOS = [i for i in module_db if hasattr(normkit.nn, i.module_cls.__name__)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = {
    torch.float64: 128,
    torch.float32: 8,
    torch.bfloat16: 1,
    torch.float16: 1,
}
FORMATS = {
    3: [torch.contiguous_format],
    4: [torch.contiguous_format, torch.channels_last],
    5: [torch.contiguous_format, torch.channels_last_3d],
}

each_module = pytest.mark.parametrize(
    "info", INFOS, ids=[i.module_cls.__name__ for i in INFOS]
)
# Layers without a mode are checked once.
each_module_and_mode = pytest.mark.parametrize(
    ("info", "training"),
    [(i, t) for i in INFOS for t in (True, False) if t or i.train_and_eval_differ],
    ids=lambda v: ("train" if v else "eval") if isinstance(v, bool) else v.name[3:],
)


def test_the_database_knows_every_layer() -> None:
    named = {info.module_cls.__name__ for info in INFOS}
    eager = {name for name in normkit.nn.__all__ if not name.startswith("Lazy")}
    torch_has = {name for name in eager if hasattr(nn, name)}
    # torch's database has no SyncBatchNorm: it runs on several ranks (tests/sync).
    assert named == torch_has - {"SyncBatchNorm"}


def ours(info: ModuleInfo) -> type[nn.Module]:
    return getattr(normkit.nn, info.module_cls.__name__)


def samples(
    info: ModuleInfo, dtype: torch.dtype, training: bool, *, grad: bool = True
) -> Iterator[tuple[str, ModuleInput]]:
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=grad, training=training
    )
    for k, sample in enumerate(found):
        yield f"sample {k} {sample.desc}".strip(), sample


def built(
    cls: type[nn.Module], sample: ModuleInput, dtype: torch.dtype, training: bool
) -> nn.Module:
    """The sample's layer, with parameters and statistics that are not 1 and 0."""
    given = sample.constructor_input
    layer = cls(*given.args, **given.kwargs, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=g) + 0.5
                tensor.copy_(drawn)
    return layer.train(training)


def inputs(sample: ModuleInput) -> Tensor:
    (x,) = sample.forward_input.args
    assert not sample.forward_input.kwargs
    return x.detach()


def buffers(layer: nn.Module) -> list[Tensor]:
    return [b.detach() for b in layer.buffers()]


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients under the cotangent `dy`, and state after one forward."""
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad(y, wanted, dy)
    return [y.detach(), *grads, *(b.clone() for b in buffers(layer))]


def assert_near(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Within a few roundings of `dtype`, relative to the largest value of each tensor.

    Halves: the statistics are wide, so one rounding on the way out is all there is.
    float32: a rounding each for centring, scaling and the affine, and the conditioning
    of groups of four values (worst seen 4.4). float64: as much, and the truth that it
    is compared with is torch's float64, with its own roundings (worst seen 58).
    """
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, f"tensor {k}: {a.shape} instead of {b.shape}"
        if not b.numel():
            continue
        scale = max(1.0, float(b.abs().max()))
        error = float((a.double() - b.double()).abs().max()) / scale
        bound = ROUNDINGS[dtype] * torch.finfo(dtype).eps
        assert error <= bound, f"tensor {k} is off by {error:.2g}, allowed {bound:.2g}"


@each_module_and_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_gradients_and_state_are_those_of_float64(
    info: ModuleInfo, training: bool, dtype: torch.dtype
) -> None:
    for _, sample in samples(info, dtype, training):
        x = inputs(sample)
        truth = built(info.module_cls, sample, dtype, training).double()
        dy = torch.randn(x.shape).to(dtype)
        wanted = run(truth, x.double(), dy.double())
        found = run(built(ours(info), sample, dtype, training), x, dy)
        assert found[0].dtype == dtype
        # An empty batch is not a batch: normkit does not count it, torch does.
        last = None if x.numel() else -1
        assert_near(found[:last], wanted[:last], dtype)


def compare_samples(
    peers, info: ModuleInfo, training: bool, check: Callable, *, empty: bool = True
) -> None:
    """Run `check(cls, sample)` for each float64 sample, on torch and on normkit."""
    for case, sample in samples(info, torch.float64, training):
        if not empty and not inputs(sample).numel():
            continue
        peers.compare(
            case,
            lambda s=sample: check(info.module_cls, s),
            lambda s=sample: check(ours(info), s),
        )
    peers.judge()


@each_module_and_mode
def test_first_and_second_derivatives_pass_gradcheck(
    peers, info: ModuleInfo, training: bool
) -> None:
    def check(cls: type[nn.Module], sample: ModuleInput) -> None:
        layer = built(cls, sample, torch.float64, training)
        names = [name for name, _ in layer.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        x = inputs(sample).clone().requires_grad_()

        def f(x: Tensor, *parameters: Tensor) -> Tensor:
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(layer, given, x)

        fast = x.numel() > 30
        assert gradcheck(f, (x, *values), fast_mode=fast)
        assert gradgradcheck(f, (x, *values), fast_mode=fast, atol=1e-5)

    compare_samples(peers, info, training, check)


@each_module_and_mode
def test_non_contiguous_inputs_give_the_same(
    peers, info: ModuleInfo, training: bool
) -> None:
    def check(cls: type[nn.Module], sample: ModuleInput) -> None:
        x, dy = inputs(sample), torch.randn(inputs(sample).shape, dtype=torch.float64)
        wanted = run(built(cls, sample, torch.float64, training), x, dy)
        odd_x, odd_dy = noncontiguous_like(x), noncontiguous_like(dy)
        for a, b in ((odd_x, dy), (x, odd_dy), (odd_x, odd_dy)):
            found = run(built(cls, sample, torch.float64, training), a, b)
            assert_near(found, wanted, torch.float64)

    # noncontiguous_like cannot make an empty tensor non-contiguous.
    compare_samples(peers, info, training, check, empty=False)


@each_module_and_mode
def test_memory_formats_go_in_and_come_out(
    peers, info: ModuleInfo, training: bool
) -> None:
    def check(cls: type[nn.Module], sample: ModuleInput) -> None:
        x, dy = inputs(sample), torch.randn(inputs(sample).shape, dtype=torch.float64)
        wanted = run(built(cls, sample, torch.float64, training), x, dy)
        formats = FORMATS.get(x.dim(), [torch.contiguous_format])
        for form, of_grad, of_layer in itertools.product(formats, formats, formats):
            layer = built(cls, sample, torch.float64, training)
            layer = layer.to(memory_format=of_layer)
            laid_out = x.contiguous(memory_format=form)
            cotangent = dy.contiguous(memory_format=of_grad)
            found = run(layer, laid_out, cotangent)
            assert_near(found, wanted, torch.float64)
            kept = found[0].is_contiguous(memory_format=form)
            assert kept, f"{form} goes in, strides {found[0].stride()} come out"

    compare_samples(peers, info, training, check)


@each_module
def test_repr_is_that_of_torch(info: ModuleInfo) -> None:
    for _, sample in samples(info, torch.float32, True):
        theirs = built(info.module_cls, sample, torch.float32, True)
        assert repr(built(ours(info), sample, torch.float32, True)) == repr(theirs)


@each_module_and_mode
def test_pickle_and_deepcopy_keep_the_function(
    peers, info: ModuleInfo, training: bool
) -> None:
    def check(cls: type[nn.Module], sample: ModuleInput) -> None:
        layer = built(cls, sample, torch.float64, training)
        x = inputs(sample)
        copies = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)]
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        wanted = layer(x)
        for twin in copies:
            assert type(twin) is cls
            assert twin.training is training
            torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
            assert_near(list(twin.buffers()), list(layer.buffers()), torch.float64)

    compare_samples(peers, info, training, check)


@each_module_and_mode
def test_checkpoints_go_from_torch_to_normkit_and_back(
    info: ModuleInfo, training: bool
) -> None:
    for _, sample in samples(info, torch.float64, training):
        theirs = built(info.module_cls, sample, torch.float64, training)
        mine = ours(info)(
            *sample.constructor_input.args,
            **sample.constructor_input.kwargs,
            dtype=torch.float64,
        ).train(training)
        saved = theirs.state_dict()
        assert list(mine.state_dict()) == list(saved)
        assert mine.state_dict()._metadata == saved._metadata
        assert not any(mine.load_state_dict(saved))
        x = inputs(sample)
        assert_near([mine(x).detach()], [theirs(x).detach()], torch.float64)
        again = copy.deepcopy(theirs)
        file = io.BytesIO()
        torch.save(mine.state_dict(), file)
        file.seek(0)
        assert not any(again.load_state_dict(torch.load(file, weights_only=True)))
        if x.numel():
            assert_near(buffers(mine), buffers(theirs), torch.float64)


@each_module
def test_device_and_dtype_reach_every_tensor(peers, info: ModuleInfo) -> None:
    def check(cls: type[nn.Module], sample: ModuleInput) -> None:
        given = sample.constructor_input
        for device, dtype in itertools.product(("cpu", "meta"), DTYPES):
            with torch.device(device):
                under = cls(*given.args, **given.kwargs, dtype=dtype)
            named = cls(*given.args, **given.kwargs, device=device, dtype=dtype)
            moved = cls(*given.args, **given.kwargs).to(device, dtype)
            skipped = nn.utils.skip_init(cls, *given.args, **given.kwargs, dtype=dtype)
            for layer in (under, named, moved, skipped.to(device)):
                # torchtitan#674: a cast leaves the running statistics of ours wide.
                is_ours = cls.__module__.startswith("normkit")
                is_kept = is_ours and layer is moved and dtype.itemsize == 2
                wanted = torch.float32 if is_kept else dtype
                for tensor in itertools.chain(layer.parameters(), layer.buffers()):
                    assert tensor.device.type == device
                assert all(p.dtype == dtype for p in layer.parameters())
                for buffer in layer.buffers():
                    if buffer.is_floating_point():
                        assert buffer.dtype == wanted
            empty = named.to_empty(device="cpu")
            assert all(p.device.type == "cpu" for p in empty.parameters())
            empty.reset_parameters()
            if getattr(empty, "weight", None) is not None:
                assert bool((empty.weight == 1).all())

    compare_samples(peers, info, True, check)


@pytest.mark.parametrize(
    "info",
    [i for i in INFOS if i.module_error_inputs_func is not None],
    ids=lambda info: info.name[3:],
)
def test_bad_input_raises_the_type_and_the_words_of_torch(info: ModuleInfo) -> None:
    given = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    for bad, cls in itertools.product(given, (info.module_cls, ours(info))):
        made = bad.module_error_input.constructor_input
        fed = bad.module_error_input.forward_input
        if bad.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(bad.error_type, match=bad.error_regex):
                cls(*made.args, **made.kwargs)
        else:
            layer = cls(*made.args, **made.kwargs)
            with pytest.raises(bad.error_type, match=bad.error_regex):
                layer(*fed.args, **fed.kwargs)


@each_module_and_mode
def test_forward_mode_and_vmap_and_stateless_calls_work(
    peers, info: ModuleInfo, training: bool
) -> None:
    def check(cls: type[nn.Module], sample: ModuleInput) -> None:
        x = inputs(sample)
        tangent = torch.randn(x.shape, dtype=torch.float64)
        truth = built(info.module_cls, sample, torch.float64, training)
        _, wanted = torch.autograd.functional.jvp(truth, x, tangent)
        layer = built(cls, sample, torch.float64, training)
        y, found = torch.func.jvp(layer, (x,), (tangent,))
        y, found = y.detach(), found.detach()
        assert_near([found], [wanted], torch.float64)
        again = built(cls, sample, torch.float64, training)
        state = {**dict(again.named_parameters()), **dict(again.named_buffers())}
        stateless = torch.func.functional_call(again, state, x).detach()
        assert_near([stateless], [y], torch.float64)
        if not training or not list(layer.buffers()):
            both = torch.stack([x, 2 * x])
            each = torch.stack([truth(x), truth(2 * x)]).detach()
            assert_near([torch.vmap(layer)(both).detach()], [each], torch.float64)

    compare_samples(peers, info, training, check)


def _new_module_tests() -> list[dict]:
    """A list in torch 2.6, a function in 2.13."""
    given = getattr(common_nn, "get_new_module_tests", None)
    return given() if given else common_nn.new_module_tests


OLDER = [
    case
    for case in (*common_nn.module_tests, *_new_module_tests())
    if hasattr(normkit.nn, case.get("module_name", ""))
]


@pytest.mark.parametrize("case", OLDER, ids=lambda case: case["desc"])
def test_the_cases_of_torchs_older_table_hold(case: dict) -> None:
    """`common_nn` has one norm: of 175,616 values, without weights."""
    arguments, shape = case["constructor_args"], case["input_size"]
    theirs, mine = (
        getattr(m, case["module_name"])(*arguments) for m in (nn, normkit.nn)
    )
    x = torch.randn(shape, dtype=torch.float64)
    dy = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        wanted = run(theirs.double().train(training), x, dy)
        for dtype in (torch.float64, torch.float32, torch.float16):
            given = (t.to(dtype) for t in (x, dy))
            found = run(mine.to(dtype).train(training), *given)
            if dtype != torch.float64:
                inexact = run(theirs.double(), *(t.to(dtype).double() for t in (x, dy)))
                assert_near(found, inexact, dtype)
            else:
                assert_near(found, wanted, dtype)
    assert gradcheck(mine.double(), x.requires_grad_(), fast_mode=True)


def test_the_older_table_has_a_norm() -> None:
    assert [case["module_name"] for case in OLDER] == ["LayerNorm"]
