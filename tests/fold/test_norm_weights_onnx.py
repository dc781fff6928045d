"""Weight and bias of the norms of ONNX graphs, moved into what reads them."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is missing")

import torch  # noqa: E402
from onnx import helper  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from fold.test_norm_weights import OnePlus, Rms, block, lively  # noqa: E402
from fold.test_onnx import Build, feeds, in_runtime  # noqa: E402
from normkit.errors import ArgumentError  # noqa: E402

ROWS = (2, 5, 6)


def check(model, *, left=(), reduced=0):
    """Fold all norms: the same function in onnxruntime, and a valid model."""
    before = model.SerializeToString()
    folded, ledger = normkit.fold_onnx(model, norms="all")
    assert model.SerializeToString() == before
    onnx.checker.check_model(folded, full_check=True)
    for seed in (98, 99):
        feed = feeds(model, seed)
        one, other = in_runtime(model, feed), in_runtime(folded, feed)
        for expected, found in zip(one, other, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    reasons = [entry.reason for entry in ledger.left]
    assert len(reasons) == len(left), f"\n{ledger}"
    for reason, part in zip(reasons, left, strict=True):
        assert part in reason, f"\n{ledger}"
    assert sum(entry.reduced for entry in ledger.entries) == reduced
    assert ledger.max_difference <= 1e-9
    return folded, ledger


def weights_of(folded, kind, index):
    """The content of an input of the first node of that kind; None if it has none."""
    node = next(n for n in folded.graph.node if n.op_type == kind)
    if index >= len(node.input) or not node.input[index]:
        return None
    held = {t.name: t for t in folded.graph.initializer}
    return onnx.numpy_helper.to_array(held[node.input[index]])


def linear(build, x, inputs=6, outputs=4):
    """MatMul and Add, as exporters write a linear layer on three dimensions."""
    y = build.op("MatMul", x, build.weight(inputs, outputs))
    return build.op("Add", y, build.weight(outputs))


def test_a_layer_norm_goes_into_the_sum_behind_a_matmul():
    build = Build()
    y = build.op(
        "LayerNormalization", build.input(ROWS), build.weight(6), build.weight(6)
    )
    folded, ledger = check(build.model(linear(build, y), ranks=[3]))
    assert np.all(weights_of(folded, "LayerNormalization", 1) == 1)
    assert weights_of(folded, "LayerNormalization", 2) is None
    assert "1 of 1 norms folded" in ledger.to_text()


def test_the_default_leaves_it_alone():
    build = Build()
    y = build.op(
        "LayerNormalization", build.input(ROWS), build.weight(6), build.weight(6)
    )
    model = build.model(linear(build, y), ranks=[3])
    folded, ledger = normkit.fold_onnx(model)
    assert ledger.entries == ()
    assert folded.SerializeToString() == model.SerializeToString()


def test_an_rms_norm_goes_into_a_matmul():
    build = Build(opset=23)
    y = build.op("RMSNormalization", build.input(ROWS), build.weight(6))
    y = build.op("MatMul", y, build.weight(6, 4))
    folded, _ = check(build.model(y, ranks=[3]))
    assert np.all(weights_of(folded, "RMSNormalization", 1) == 1)


def rms(build, x, weight):
    """An RMS norm written out, as exporters of opset 22 and older do."""
    square = build.op("Pow", x, build.weight(values=np.array(2.0)))
    mean = build.op("ReduceMean", square, axes=[-1], keepdims=1)
    size = build.op("Add", mean, build.weight(values=np.array(1e-6)))
    inverse = build.op("Reciprocal", build.op("Sqrt", size))
    return build.op("Mul", build.op("Mul", x, inverse), weight)


def test_an_rms_norm_written_out_loses_its_product():
    build = Build()
    y = rms(build, build.input(ROWS), build.weight(6))
    model = build.model(build.op("MatMul", y, build.weight(6, 4)), ranks=[3])
    folded, ledger = check(model)
    assert len(folded.graph.node) == len(model.graph.node) - 1
    assert ledger.entries[0].kind == "Mul"


def test_a_layer_norm_written_out_with_a_quotient():
    build = Build()
    x = build.input(ROWS)
    mean = build.op("ReduceMean", x, axes=[-1], keepdims=1)
    d = build.op("Sub", x, mean)
    square = build.op("Mul", d, d)
    var = build.op("ReduceMean", square, axes=[-1], keepdims=1)
    size = build.op("Sqrt", build.op("Add", var, build.weight(values=np.array(1e-5))))
    y = build.op("Mul", build.op("Div", d, size), build.weight(6))
    y = build.op("Add", y, build.weight(6))
    model = build.model(linear(build, y), ranks=[3])
    folded, _ = check(model)
    assert len(folded.graph.node) == len(model.graph.node) - 2


def test_the_norm_of_a_sum_of_onnxruntime():
    build = Build()
    x = build.input(ROWS)
    z = build.op("Relu", x)
    names = [build.weight(6), build.weight(6)]
    y, _, _, total = build.op(
        *("SkipLayerNormalization", x, z, *names),
        outputs=4,
        domain="com.microsoft",
        epsilon=1e-5,
    )
    y = linear(build, y)
    model = build.model(y, build.op("Tanh", total), ranks=[3, 3])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    folded, _ = check(model)
    assert np.all(weights_of(folded, "SkipLayerNormalization", 2) == 1)
    assert weights_of(folded, "SkipLayerNormalization", 3) is None


def test_group_and_instance_norm_go_into_a_convolution():
    build = Build(opset=21)
    y = build.op(
        *("GroupNormalization", build.input(), build.weight(4), build.weight(4)),
        num_groups=2,
    )
    y = build.conv(y)
    y = build.op("InstanceNormalization", y, build.weight(4), build.weight(4))
    folded, _ = check(build.model(build.conv(y, kernel=3)))
    assert np.all(weights_of(folded, "InstanceNormalization", 2) == 0)


def test_padding_lets_the_weight_through_and_not_the_bias():
    build = Build(opset=21)
    y = build.op("InstanceNormalization", build.input(), *map(build.weight, (4, 4)))
    model = build.model(build.conv(y, kernel=3, pads=[1] * 4))
    folded, _ = check(model, left=["its bias stays"], reduced=1)
    assert np.all(weights_of(folded, "InstanceNormalization", 1) == 1)


def test_a_norm_whose_output_is_added_stays():
    build = Build()
    x = build.input(ROWS)
    y = build.op("LayerNormalization", x, build.weight(6), build.weight(6))
    z = build.op("Add", build.op("Tanh", y), y)
    check(build.model(z, ranks=[3]), left=["of the residual stream ('add"])
    build = Build()
    x = build.input(ROWS)
    y = build.op("LayerNormalization", x, build.weight(6), build.weight(6))
    check(build.model(build.op("Tanh", y), ranks=[3]), left=["tanh"])


@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), Rms(6), OnePlus(6)], ids=repr)
def test_a_transformer_exported_by_torch(norm, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs it")
    model = block(norm)
    model.qkv = nn.Linear(6, 18)
    model = lively(model).float()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(ROWS),), path, dynamo=True, verbose=False, optimize=True
    )
    folded, ledger = check(onnx.load(path))
    assert len(ledger.folded) == 1, ledger
    assert len(folded.graph.node) <= len(onnx.load(path).graph.node)


def test_a_product_without_a_sum_behind_takes_the_weight_alone():
    build = Build()
    y = build.op(
        "LayerNormalization", build.input(ROWS), build.weight(6), build.weight(6)
    )
    y = build.op("Tanh", build.op("MatMul", y, build.weight(6, 4)))
    check(build.model(y, ranks=[3]), left=["its bias stays"], reduced=1)


def test_an_unknown_choice_of_norms_is_refused():
    build = Build()
    model = build.model(build.op("Relu", build.input()))
    with pytest.raises(ArgumentError, match='"batch" or "all"'):
        normkit.fold_onnx(model, norms="layer")
