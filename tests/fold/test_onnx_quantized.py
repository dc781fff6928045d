"""Batch norms in and around QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is missing")

from onnx import ModelProto, numpy_helper

import normkit
from fold.test_onnx import Build, in_runtime
from normkit.fold import FoldLedger

# Without VNNI, fused convolutions of bytes add pairs of products in 16 bits: the sums
# saturate, and differ by more than rounding between two scales.
CPU_INFO = Path("/proc/cpuinfo")
HAS_VNNI = CPU_INFO.exists() and "vnni" in CPU_INFO.read_text()
INPUT = np.random.default_rng(5).standard_normal((2, 4, 6, 6)).astype(np.float32)


class Integers(Build):
    """A graph with integer weights and with quantized activations."""

    def integers(self, *shape: int, axis: int | None = None, kind=np.int8, zero=0):
        """Return a weight of integers; one scale, or one per index of `axis`."""
        low = -127 if kind == np.int8 else 1
        values = self.draw.integers(low, low + 254, shape)
        scale = self.draw.uniform(0.01, 0.02, () if axis is None else shape[axis])
        parts = [
            self.weight(values=values.astype(kind)),
            self.weight(values=np.asarray(scale)),
            self.weight(
                values=np.full(scale.shape if axis is not None else (), zero, kind)
            ),
        ]
        settings = {} if axis is None else {"axis": axis}
        return self.op("DequantizeLinear", *parts, **settings)

    def quantized(self, x: str, step: float = 0.05) -> str:
        """Return an activation through a quantizer."""
        parts = [self.weight(values=np.array(step)), self.weight(values=np.uint8(128))]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *parts), *parts)

    def int_conv(self, x: str, bias: str = "", kernel: int = 1, **more) -> str:
        weight = self.integers(4, 4, kernel, kernel, **more)
        return self.op("Conv", x, weight, *([bias] if bias else []))


def folded(b: Integers, *outputs: str) -> tuple[ModelProto, ModelProto, FoldLedger]:
    """Fold, and compare in onnxruntime on an input that the fold did not see."""
    model = b.model(*outputs)
    new, ledger = normkit.fold_onnx(model)
    for fused in (False, True) if HAS_VNNI else (False,):
        (true,), (found,) = (
            in_runtime(each, {"x": INPUT}, fused=fused) for each in (model, new)
        )
        assert np.abs(true - found).max() <= 1e-5 * max(np.abs(true).max(), 1)
    return model, new, ledger


def kinds(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def integers_of(model: ModelProto) -> list[np.ndarray]:
    arrays = [numpy_helper.to_array(t) for t in model.graph.initializer]
    return [a for a in arrays if a.dtype == np.int8 and a.ndim > 1]


@pytest.mark.parametrize("axis", [None, 0])
def test_a_batch_norm_goes_into_the_scales_of_an_integer_weight(axis) -> None:
    b = Integers()
    y = b.norm(b.int_conv(b.quantized(b.input()), axis=axis, kernel=3), positive=True)
    model, new, ledger = folded(b, b.quantized(y))
    assert [entry.folded for entry in ledger.entries] == [True]
    assert "BatchNormalization" not in kinds(new)
    assert kinds(new).count("DequantizeLinear") == kinds(model).count(
        "DequantizeLinear"
    )
    (old,), (kept,) = integers_of(model), integers_of(new)
    np.testing.assert_array_equal(old, kept)


def test_channels_with_a_negative_scale_turn_the_sign_of_their_integers() -> None:
    b = Integers()
    y = b.norm(b.int_conv(b.input(), axis=0))
    model, new, ledger = folded(b, y)
    assert ledger.entries[0].folded
    (old,), (kept,) = integers_of(model), integers_of(new)
    signs = np.array([-1, 1, 1, -1])[:, None, None, None]
    np.testing.assert_array_equal(old * signs, kept)


def test_minus_128_has_no_negative() -> None:
    b = Integers()
    y = b.norm(b.int_conv(b.input(), axis=0))
    for tensor in b.weights:
        array = np.array(numpy_helper.to_array(tensor))
        if array.dtype == np.int8 and array.ndim == 4:
            array[0, 0] = -128
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    _, new, ledger = folded(b, b.stop(y))
    assert not ledger.entries[0].folded
    assert "no negative in its type" in ledger.entries[0].reason
    assert "BatchNormalization" in kinds(new)


def test_a_zero_point_stays_with_its_integers() -> None:
    b = Integers()
    weight = b.integers(4, 4, 1, 1, kind=np.uint8, zero=117)
    y = b.norm(b.op("Conv", b.input(), weight), positive=True)
    _, _, ledger = folded(b, y)
    assert ledger.entries[0].folded


def test_weights_quantized_in_the_graph_keep_their_quantizer() -> None:
    b = Integers()
    scale = b.weight(values=b.draw.uniform(0.01, 0.02, 4))
    zero = b.weight(values=np.zeros(4, np.int8))
    q = b.op("QuantizeLinear", b.weight(4, 4, 3, 3), scale, zero, axis=0)
    weight = b.op("DequantizeLinear", q, scale, zero, axis=0)
    y = b.norm(b.op("Conv", b.quantized(b.input()), weight), positive=True)
    _, new, ledger = folded(b, b.quantized(y))
    assert ledger.entries[0].folded
    assert kinds(new).count("QuantizeLinear") == 3


def test_an_integer_bias_becomes_a_float() -> None:
    b = Integers()
    # Above 2²⁴, which float32 does not hold.
    bias = b.op(
        "DequantizeLinear",
        b.weight(values=np.array([2**25 + 1, -3, 5, 2**20], np.int32)),
        b.weight(values=np.full(4, 1e-7)),
        axis=0,
    )
    y = b.norm(b.int_conv(b.input(), bias, axis=0))
    _, new, ledger = folded(b, y)
    assert ledger.entries[0].folded
    assert kinds(new) == ["DequantizeLinear", "Conv"]


def test_a_shared_integer_weight_gets_scales_of_its_own() -> None:
    b = Integers()
    weight = b.integers(4, 4, 1, 1, axis=0)
    x = b.input()
    left = b.norm(b.op("Conv", x, weight), positive=True)
    _, new, ledger = folded(b, b.op("Add", left, b.op("Conv", x, weight)))
    assert ledger.entries[0].folded
    assert kinds(new).count("DequantizeLinear") == 2
    assert len(integers_of(new)) == 1


def test_a_scale_per_output_takes_no_map_of_the_inputs() -> None:
    b = Integers()
    y = b.int_conv(b.norm(b.stop(b.input()), positive=True), axis=0)
    _, _, ledger = folded(b, y)
    assert not ledger.entries[0].folded
    assert "integers with scales along dimension 0 alone" in ledger.entries[0].reason


def test_one_scale_may_become_one_per_input() -> None:
    b = Integers()
    y = b.int_conv(b.norm(b.stop(b.input()), positive=True))
    model, new, ledger = folded(b, y)
    assert ledger.entries[0].folded
    np.testing.assert_array_equal(integers_of(model)[0], integers_of(new)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_nothing_is_moved_past_the_quantizer_of_an_activation(dynamic) -> None:
    b = Integers()
    x = b.norm(b.stop(b.input()), positive=True)
    if dynamic:
        q, scale, zero = b.op("DynamicQuantizeLinear", x, outputs=3)
        y = b.op("DequantizeLinear", q, scale, zero)
    else:
        y = b.quantized(x)
    _, new, ledger = folded(b, b.int_conv(y, axis=0))
    assert not ledger.entries[0].folded
    assert "rounds to integers" in ledger.entries[0].reason
    assert "BatchNormalization" in kinds(new)


def test_a_batch_norm_behind_a_quantizer_goes_into_what_reads_it_alone() -> None:
    b = Integers()
    y = b.conv(b.norm(b.quantized(b.input()), positive=True))
    _, _, ledger = folded(b, y)
    assert ledger.entries[0].how.startswith("into ")
    assert "after it" in ledger.entries[0].how


def test_blocks_of_scales_stay_as_they_are() -> None:
    b = Integers(opset=21)
    weight = b.op(
        "DequantizeLinear",
        b.weight(values=b.draw.integers(-127, 127, (4, 4)).astype(np.int8)),
        b.weight(values=b.draw.uniform(0.01, 0.02, (4, 2))),
        axis=1,
        block_size=2,
    )
    x = b.op("ReduceMean", b.input(), b.weight(values=np.array([2, 3])), keepdims=0)
    y = b.norm(b.op("Gemm", x, weight, transB=1), positive=True)
    model = b.model(b.stop(y), ranks=[2])
    _, ledger = normkit.fold_onnx(model)
    assert not ledger.entries[0].folded
    assert "is computed from quantized numbers" in ledger.entries[0].reason
