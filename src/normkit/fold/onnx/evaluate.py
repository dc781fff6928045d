"""An ONNX model run in float64 by onnx's reference evaluator, every value kept.

Every float type becomes double, in the graph, its inner graphs and its attributes.
Convolutions and pooling, which the reference computes window by window in Python, run
in torch in float64; regular expressions, which the reference gives to Python's `re`,
run in onnxruntime, whose time is linear. `limits` bounds the memory and the time.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator, op_run
from onnx.reference.ops.op_batch_normalization import (
    BatchNormalization_14 as _BatchNormalization,
)
from onnx.reference.ops.op_conv import Conv as _Conv
from onnx.reference.ops.op_conv_transpose import ConvTranspose as _ConvTranspose
from onnx.reference.ops.op_dequantize_linear import (
    DequantizeLinear_25 as _DequantizeLinear,
)
from onnx.reference.ops.op_max_pool import MaxPool as _MaxPool

from normkit.fold.onnx.files import graphs_in, tensors_of
from normkit.fold.onnx.limits import BoundedEvaluator, check_count, limited

__all__ = [
    "FLOATS",
    "evaluator",
    "jittered_weights",
    "run_once",
    "tensors_among",
    "to_float64",
]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def to_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` that computes in double throughout."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in tensors_of(wide.graph):
        if tensor.data_type in FLOATS:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for graph in graphs_in(wide.graph):
        for held in (graph.input, graph.output, graph.value_info):
            for value in held:
                kind = value.type.tensor_type
                if kind.elem_type in FLOATS:
                    kind.elem_type = TensorProto.DOUBLE
        for node in graph.node:
            for attribute in node.attribute:
                _widen(node, attribute)
    return wide


def jittered_weights(model: onnx.ModelProto, wide: onnx.ModelProto) -> onnx.ModelProto:
    """Return `wide` with each weight moved by up to one rounding of its type.

    Args:
        model: A model.
        wide: What `to_float64` makes of it.
    """
    moved = onnx.ModelProto()
    moved.CopyFrom(wide)
    draw = np.random.default_rng(0)
    pairs = zip(tensors_of(model.graph), tensors_of(moved.graph), strict=True)
    for stored, tensor in pairs:
        if stored.data_type not in _EPS:
            continue
        values = numpy_helper.to_array(tensor)
        noise = draw.uniform(-0.5, 0.5, values.shape) * _EPS[stored.data_type]
        tensor.CopyFrom(numpy_helper.from_array(values * (1 + noise), tensor.name))
    return moved


_EPS: dict[int, float] = {
    TensorProto.FLOAT: torch.finfo(torch.float32).eps,
    TensorProto.FLOAT16: torch.finfo(torch.float16).eps,
    TensorProto.BFLOAT16: torch.finfo(torch.bfloat16).eps,
}


def _widen(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    types = ("to", "dtype", "stash_type", "output_dtype")
    if attribute.name in types and attribute.i in FLOATS:
        attribute.i = TensorProto.DOUBLE
    elif node.op_type == "Constant" and attribute.name in (
        "value_float",
        "value_floats",
    ):
        values = attribute.f if attribute.name == "value_float" else attribute.floats
        tensor = numpy_helper.from_array(np.array(values, dtype=np.float64))
        attribute.CopyFrom(helper.make_attribute("value", tensor))


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """Return an evaluator of `model`, which is in float64 already."""
    return BoundedEvaluator(model, new_ops=_OPERATORS)


def run_once(model: onnx.ModelProto, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return every named value of one run."""
    with np.errstate(all="ignore"), warnings.catch_warnings(), limited():
        warnings.simplefilter("ignore")
        # They are there as long as the results.
        check_count(sum(np.size(value) for value in inputs.values()), "the inputs")
        found = evaluator(model).run(None, inputs, intermediate=True)
    assert isinstance(found, dict)
    return {name: value for name, value in found.items() if name}


def tensors_among(found: dict[str, Any], names: list[str]) -> list[torch.Tensor]:
    """Return the values of a run with these names, without sequences and the like."""
    arrays = [found[name] for name in names]
    return [_tensor(array) for array in arrays if isinstance(array, np.ndarray)]


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


class Conv(_Conv):
    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, **settings: Any) -> Any:  # type: ignore[override]
        rank = x.ndim - 2
        pads = settings.get("pads") or [0] * 2 * rank
        pads = _same_pads(x, w, settings, rank) or pads
        if rank not in (1, 2, 3) or x.dtype != np.float64:
            return super()._run(x, w, b, **settings)
        padded = F.pad(_tensor(x), _for_torch(pads))
        run = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        y = run(
            padded,
            _tensor(w),
            None if b is None else _tensor(b),
            stride=tuple(settings.get("strides") or [1] * rank),
            dilation=tuple(settings.get("dilations") or [1] * rank),
            groups=settings.get("group") or 1,
        )
        return (y.numpy(),)


class ConvTranspose(_ConvTranspose):
    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, **settings: Any) -> Any:  # type: ignore[override]
        rank = x.ndim - 2
        pads = settings.get("pads") or [0] * 2 * rank
        is_plain = (
            rank in (1, 2, 3)
            and x.dtype == np.float64
            and pads[:rank] == pads[rank:]
            and not settings.get("output_shape")
            and settings.get("auto_pad") in (None, "NOTSET")
        )
        if not is_plain:
            return super()._run(x, w, b, **settings)
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        y = run(
            _tensor(x),
            _tensor(w),
            None if b is None else _tensor(b),
            stride=tuple(settings.get("strides") or [1] * rank),
            padding=tuple(pads[:rank]),
            output_padding=tuple(settings.get("output_padding") or [0] * rank),
            groups=settings.get("group") or 1,
            dilation=tuple(settings.get("dilations") or [1] * rank),
        )
        return (y.numpy(),)


class BatchNormalization(op_run.OpRun):
    op_domain = ""

    def _run(self, x: Any, *parts: Any, **settings: Any) -> Any:
        # The reference's own versions for opset 7 to 13 return other things.
        if len(self.onnx_node.output) > 1 or settings.get("training_mode"):
            own = (_BatchNormalization, self.onnx_node, self.run_params)
            return own[0](*own[1:])._run(x, *parts, **settings)
        shape = (-1, *(1,) * (x.ndim - 2))
        if not settings.get("spatial", 1):
            shape = x.shape[1:]
        scale, bias, mean, var = (part.reshape(shape) for part in parts)
        eps = settings.get("epsilon")
        eps = 1e-5 if eps is None else eps
        return (scale * (x - mean) / np.sqrt(var + eps) + bias,)


def _normalized(
    x: Any, axes: tuple[int, ...], eps: float, weight: Any, bias: Any, *, centers: bool
) -> tuple[Any, Any, Any]:
    """Return the layer or RMS norm of x over `axes`, the mean and 1/√(var + eps)."""
    mean = x.mean(axes, keepdims=True)
    if not centers:
        mean = np.zeros_like(mean)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    inv_std = 1 / np.sqrt(var + eps)
    y = (x - mean) * inv_std * weight
    return y if bias is None else y + bias, mean, inv_std


class _RowNorm(op_run.OpRun):
    """Layer or RMS norm; the reference refuses statistics in float64."""

    op_domain = ""
    centers = True

    def _run(self, x: Any, weight: Any, bias: Any = None, **settings: Any) -> Any:
        axis, eps = settings.get("axis"), settings.get("epsilon")
        first = (-1 if axis is None else axis) % x.ndim
        axes = tuple(range(first, x.ndim))
        eps = 1e-5 if eps is None else eps
        made = _normalized(x, axes, eps, weight, bias, centers=self.centers)
        return made[: len(self.onnx_node.output)]


class LayerNormalization(_RowNorm):
    pass


class RMSNormalization(_RowNorm):
    centers = False


class MaxPool(_MaxPool):
    op_domain = ""

    def _run(self, x: Any, **settings: Any) -> Any:  # type: ignore[override]
        rank = x.ndim - 2
        kernel = list(settings.get("kernel_shape") or [])
        pads = settings.get("pads") or [0] * 2 * rank
        is_plain = (
            rank in (1, 2, 3)
            and x.dtype == np.float64
            and len(self.onnx_node.output) == 1
            and settings.get("auto_pad") in (None, "NOTSET")
            and not settings.get("ceil_mode")
            and list(pads[:rank]) == list(pads[rank:])
            and all(2 * pad <= size for pad, size in zip(pads, kernel, strict=False))
        )
        if not is_plain:
            return super()._run(x, **settings)
        run = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        y = run(
            _tensor(x),
            tuple(kernel),
            stride=tuple(settings.get("strides") or [1] * rank),
            padding=tuple(pads[:rank]),
            dilation=tuple(settings.get("dilations") or [1] * rank),
        )
        return (y.numpy(),)


class _SkipNorm(op_run.OpRun):
    """onnxruntime's norm of a sum: (input, skip, weight[, bias], bias of the sum)."""

    op_domain = "com.microsoft"
    centers = True

    def _run(self, x: Any, skip: Any, weight: Any, *more: Any, **_: Any) -> Any:
        node = self.onnx_node
        held = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        bias = more[0] if self.centers and more else None
        summand = more[-1] if len(more) == (2 if self.centers else 1) else None
        total = x + skip + (0 if summand is None else summand)
        eps = held.get("epsilon", 1e-12)
        made = _normalized(total, (-1,), eps, weight, bias, centers=self.centers)
        return (*made, total)[: len(node.output)]


class SkipLayerNormalization(_SkipNorm):
    pass


class SkipSimplifiedLayerNormalization(_SkipNorm):
    centers = False


class DequantizeLinear(_DequantizeLinear):
    op_domain = ""

    def _run(self, x: Any, scale: Any, zero: Any = None, **settings: Any) -> Any:  # type: ignore[override]
        axis = settings.get("axis")
        axis = 1 if axis is None else axis
        if x.dtype.kind not in "iu" or settings.get("block_size"):
            block = settings.get("block_size") or 0
            return super()._run(x, scale, zero, axis=axis, block_size=block)
        # In float64: the reference computes in float32, which has no int32 above 2²⁴.
        wide = np.asarray(x, np.float64)
        if scale.size > 1:
            shape = [1] * x.ndim
            shape[axis] = -1
            scale, zero = (s if s is None else s.reshape(shape) for s in (scale, zero))
        return (((wide - (0 if zero is None else zero)) * scale).astype(scale.dtype),)


class RegexFullMatch(op_run.OpRun):
    op_domain = ""

    def _run(self, x: Any, pattern: str = "") -> Any:
        node = self.onnx_node
        kinds = (
            (node.input[0], TensorProto.STRING),
            (node.output[0], TensorProto.BOOL),
        )
        read, made = ([helper.make_tensor_value_info(*kind, None)] for kind in kinds)
        graph = helper.make_graph([node], "regex", read, made)
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return tuple(session.run(None, {node.input[0]: x}))


def _same_pads(x: Any, w: Any, settings: dict[str, Any], rank: int) -> list[int]:
    """Return the padding of auto_pad; empty if it asks for none."""
    mode = settings.get("auto_pad")
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        return []
    begin, end = [], []
    for i in range(rank):
        stride = (settings.get("strides") or [1] * rank)[i]
        dilation = (settings.get("dilations") or [1] * rank)[i]
        size = x.shape[i + 2]
        span = (w.shape[i + 2] - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        less, more = total // 2, total - total // 2
        begin.append(less if mode == "SAME_UPPER" else more)
        end.append(more if mode == "SAME_UPPER" else less)
    return [*begin, *end]


def _for_torch(pads: list[int]) -> list[int]:
    """Return ONNX pads (all begins, all ends) in torch's order (last dim first)."""
    rank = len(pads) // 2
    return [pads[i + side * rank] for i in reversed(range(rank)) for side in (0, 1)]


_OPERATORS: list[type[op_run.OpRun]] = [
    *(BatchNormalization, Conv, ConvTranspose, MaxPool, RegexFullMatch),
    DequantizeLinear,
    *(LayerNormalization, RMSNormalization),
    *(SkipLayerNormalization, SkipSimplifiedLayerNormalization),
]
