"""The same algebra on ONNX graphs: folded models stay the same function, and valid."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is missing")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import normkit  # noqa: E402
from normkit.errors import FoldError  # noqa: E402
from normkit.fold.onnx.evaluate import to_float64  # noqa: E402

IMAGE = ("N", 4, 6, 6)
IR_VERSION = 10


class Build:
    """A graph in the making; every weight is drawn."""

    def __init__(self, seed=0, dtype=np.float32, opset=17):
        self.draw = np.random.default_rng(seed)
        self.dtype, self.opset = dtype, opset
        self.nodes, self.weights, self.inputs, self.outputs = [], [], [], []
        self.count = 0

    def name(self, kind):
        self.count += 1
        return f"{kind.lower()}{self.count}"

    def weight(self, *shape, dtype=None, values=None, name=None):
        array = self.draw.standard_normal(shape) if values is None else values
        name = name or self.name("w")
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(dtype or self.dtype)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def input(self, shape=IMAGE, name="x"):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def op(self, kind, *inputs, outputs=1, **attributes):
        name = self.name(kind)
        made = [f"{name}_out{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, made, name=name, **attributes))
        return made[0] if outputs == 1 else made

    def conv(self, x, inputs=4, outputs=4, kernel=1, bias=True, **more):
        groups = more.get("group", 1)
        args = [x, self.weight(outputs, inputs // groups, kernel, kernel)]
        args += [self.weight(outputs)] if bias else []
        return self.op("Conv", *args, **more)

    def norm(self, x, channels=4, positive=False, dtype=None, **more):
        scale = self.draw.uniform(0.5, 1.5, channels)
        signs = 1 if positive else np.where(np.arange(channels) % 3 == 0, -1, 1)
        parts = [scale * signs, self.draw.standard_normal(channels)]
        parts += [self.draw.standard_normal(channels)]
        parts += [self.draw.uniform(0.3, 2.0, channels)]
        names = [
            self.weight(values=part, dtype=dtype if i > 1 else None)
            for i, part in enumerate(parts)
        ]
        return self.op("BatchNormalization", x, *names, **more)

    def stop(self, x):
        """What no map passes."""
        return self.op("Sigmoid", x)

    def model(self, *outputs, ranks=None):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        ranks = ranks or [4] * len(outputs)
        infos = [
            helper.make_tensor_value_info(o, kind, [None] * rank)
            for o, rank in zip(outputs, ranks, strict=True)
        ]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.weights)
        ir_version = 3 if self.opset < 9 else IR_VERSION
        if ir_version == 3:
            for tensor in self.weights:
                graph.input.append(
                    helper.make_tensor_value_info(
                        tensor.name, tensor.data_type, tensor.dims
                    )
                )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=ir_version,
        )


def answers(model, feed):
    """What onnx's own evaluator says in float64, on inputs that the fold never saw."""
    return ReferenceEvaluator(to_float64(model)).run(None, feed)


def feeds(model, seed=99):
    draw = np.random.default_rng(seed)
    held = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name in held:
            continue
        shape = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        kind = value.type.tensor_type.elem_type
        if kind == TensorProto.BOOL:
            feed[value.name] = np.array(seed % 2 == 0).reshape(shape)
        else:
            feed[value.name] = draw.standard_normal(shape)
    return feed


def norms_in(model):
    return [n for n in model.graph.node if n.op_type == "BatchNormalization"]


def check(model, *, left=()):
    """Fold; the same function, valid, running, and the batch norms gone but `left`.

    Args:
        model: In float64 it must agree to 1e-9 in the reference evaluator; in float32
            weights are rounded once, and onnxruntime must agree to 1e-4.
        left: A part of the reason of each that stays, in order.
    """
    before = model.SerializeToString()
    folded, ledger = normkit.fold_onnx(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(folded, full_check=True)
    is_wide = model.graph.input[0].type.tensor_type.elem_type == TensorProto.DOUBLE
    run, tolerance = (answers, 1e-9) if is_wide else (in_runtime, 1e-4)
    for seed in (98, 99):
        feed = feeds(model, seed)
        pairs = zip(run(model, feed), run(folded, feed), strict=True)
        for one, other in pairs:
            gap = np.abs(one - other).max() / max(1, np.abs(one).max())
            assert gap <= tolerance, f"differs by {gap:.1e}\n{ledger}"
    reasons = [entry.reason for entry in ledger.left]
    assert len(reasons) == len(left), f"\n{ledger}"
    for reason, part in zip(reasons, left, strict=True):
        assert part in reason, f"\n{ledger}"
    return folded, ledger


def in_runtime(model, feed, *, fused=True):
    """Run a model in onnxruntime, by default with all that it fuses."""
    options = onnxruntime.SessionOptions()
    if not fused:
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    kinds = {value.name: types.get(value.type) for value in session.get_inputs()}
    cast = {n: a.astype(kinds[n]) if kinds[n] else a for n, a in feed.items()}
    return [np.asarray(y, np.float64) for y in session.run(None, cast)]


def wide():
    return Build(dtype=np.float64)


def before_convolution(b, x):
    return b.stop(b.conv(b.norm(x), kernel=3))


def matmul_add(b, x):
    flat = b.op("Reshape", x, b.weight(values=np.array([-1, 4])))
    y = b.op("Add", b.op("MatMul", flat, b.weight(4, 5)), b.weight(5))
    return b.op("Sigmoid", b.norm(y, 5))


def gemm(**attributes):
    def build(b, x):
        flat = b.op("Reshape", x, b.weight(values=np.array([-1, 4])))
        shape = (5, 4) if attributes.get("transB") else (4, 5)
        y = b.op("Gemm", flat, b.weight(*shape), b.weight(5), **attributes)
        return b.op("Sigmoid", b.norm(y, 5))

    return build


def gemm_of_a_transposed(b, x):
    flat = b.op("Reshape", x, b.weight(values=np.array([4, -1])))
    return b.stop(b.norm(b.op("Gemm", flat, b.weight(4, 5), transA=1), 5))


def gemm_after(b, x):
    flat = b.op("Reshape", x, b.weight(values=np.array([-1, 4])))
    return b.op("Gemm", b.norm(flat), b.weight(4, 5), b.weight(1), alpha=0.5, beta=2.0)


def transposed(groups):
    def build(b, x):
        weight = b.weight(4, 6 // groups, 3, 3)
        y = b.op("ConvTranspose", x, weight, group=groups, strides=[2, 2])
        return b.stop(b.norm(y, 6))

    return build


def through(kind, positive=False, **attributes):
    def build(b, x):
        y = b.op(kind, b.conv(x), **attributes)
        return b.stop(b.norm(y, positive=positive))

    return build


def through_reshape(b, x):
    y = b.op("Reshape", b.conv(x), b.weight(values=np.array([0, 4, -1])))
    return b.stop(b.norm(y))


def through_transpose(b, x):
    last = b.op("Transpose", x, perm=[0, 2, 3, 1])
    y = b.op("Add", b.op("MatMul", last, b.weight(4, 4)), b.weight(4))
    return b.stop(b.norm(b.op("Transpose", y, perm=[0, 3, 1, 2])))


def through_concat(b, x):
    both = b.op("Concat", b.conv(x), b.conv(x, bias=False), axis=1)
    return b.stop(b.norm(both, 8))


def through_split(b, x):
    halves = b.op(
        "Split", b.conv(x, 4, 8), b.weight(values=np.array([4, 4])), outputs=2, axis=1
    )
    return b.op("Add", b.stop(b.norm(halves[0])), b.stop(halves[1]))


def through_add(b, x):
    return b.stop(b.norm(b.op("Add", b.conv(x), b.conv(x))))


def through_pool(b, x):
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    return b.stop(b.norm(b.op("AveragePool", b.conv(x), **pool)))


def through_mean(b, x):
    y = b.op("GlobalAveragePool", b.conv(x))
    return b.stop(b.norm(b.op("Flatten", y)))


def upon_another(b, x):
    return b.stop(b.norm(b.norm(b.conv(x))))


def written_out(b, x):
    y = b.op("Mul", b.conv(x), b.weight(4, 1, 1))
    return b.stop(b.op("Add", y, b.weight(4, 1, 1)))


def identity_branch(b, x):
    return b.stop(b.op("Add", b.conv(x, kernel=3, pads=[1, 1, 1, 1]), b.norm(x)))


def attention(b, x):
    rows = b.op("Reshape", x, b.weight(values=np.array([0, 4, 36])))
    rows = b.op("Transpose", rows, perm=[0, 2, 1])
    values = b.op("MatMul", rows, b.weight(4, 4))
    values = b.op("Add", values, b.weight(4))
    turned = b.op("Transpose", rows, perm=[0, 2, 1])
    scores = b.op("Softmax", b.op("MatMul", rows, turned), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", scores, values), perm=[0, 2, 1])
    return b.stop(b.norm(mixed))


PATTERNS = {
    "conv": lambda b, x: b.stop(b.norm(b.conv(x, kernel=3, pads=[1, 1, 1, 1]))),
    "conv without bias": lambda b, x: b.stop(b.norm(b.conv(x, bias=False))),
    "grouped conv": lambda b, x: b.stop(b.norm(b.conv(x, 4, 8, group=2), 8)),
    "depthwise conv": lambda b, x: b.stop(b.norm(b.conv(x, 4, 8, group=4), 8)),
    "conv at the output": lambda b, x: b.norm(b.conv(x)),
    "transposed conv": transposed(1),
    "grouped transposed conv": transposed(2),
    "before a conv": before_convolution,
    "matmul and add": matmul_add,
    "gemm": gemm(),
    "gemm, alpha and beta": gemm(alpha=0.5, beta=3.0, transB=1),
    "gemm of a transposed": gemm_of_a_transposed,
    "before a gemm": gemm_after,
    "identity": through("Identity"),
    "dropout": through("Dropout"),
    "relu": lambda b, x: b.stop(b.conv(b.op("Relu", b.conv(b.norm(x))))),
    "max pooling": through("MaxPool", True, kernel_shape=[2, 2]),
    "reshape": through_reshape,
    "transpose": through_transpose,
    "concat": through_concat,
    "split": through_split,
    "add": through_add,
    "average pooling": through_pool,
    "global pooling": through_mean,
    "batch norm on batch norm": upon_another,
    "written out": written_out,
    "identity branch": identity_branch,
    "attention": attention,
}


def built(pattern, dtype=np.float32):
    """The model of a pattern."""
    b = Build(dtype=dtype)
    y = PATTERNS[pattern](b, b.input())
    ranks = {"reshape": 3, "global pooling": 2, "attention": 3}
    ranks |= dict.fromkeys(["matmul and add", "before a gemm"], 2)
    rank = 2 if pattern.startswith("gemm") else ranks.get(pattern, 4)
    return b.model(y, ranks=[rank])


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["exact", "runtime"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_folds_and_stays_the_same_function(pattern, dtype):
    if pattern == "grouped transposed conv" and dtype is np.float64:
        pytest.skip("the reference evaluator cannot run it; onnxruntime can")
    folded, ledger = check(built(pattern, dtype))
    assert not norms_in(folded)
    assert len(ledger.folded) >= 1


NEWEST = onnx.defs.onnx_opset_version()


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 18, 21, NEWEST])
def test_every_opset_from_7_to_the_newest_folds(opset):
    b = Build(opset=opset)
    x = b.input((2, 4, 6, 6))
    y = b.op("Relu", b.norm(b.conv(x, kernel=3, pads=[1, 1, 1, 1])))
    if opset < 13:
        parts = b.op("Split", b.norm(b.conv(y)), axis=1, split=[2, 2], outputs=2)
    else:
        sizes = b.weight(values=np.array([2, 2]))
        parts = b.op("Split", b.norm(b.conv(y)), sizes, axis=1, outputs=2)
    y = b.op("Concat", *parts, axis=1)
    shape = b.weight(values=np.array([0, 4, -1]))
    model = b.model(b.op("Reshape", y, shape), ranks=[3])
    try:
        onnxruntime.InferenceSession(model.SerializeToString())
    except Exception:
        folded, _ = normkit.fold_onnx(model)
        feed = feeds(model)
        for one, other in zip(answers(model, feed), answers(folded, feed), strict=True):
            assert np.abs(one - other).max() < 1e-4
    else:
        folded, _ = check(model)
    assert not norms_in(folded)


def test_an_older_opset_is_refused_with_the_way_out():
    b = Build(opset=6)
    x = b.input((2, 4, 6, 6))
    with pytest.raises(FoldError, match=r"opset 6.*convert_version"):
        normkit.fold_onnx(b.model(b.conv(x)))


def test_training_mode_is_left_alone():
    b = wide()
    y = b.norm(b.conv(b.input()), outputs=3, training_mode=1)
    model = b.model(y[0])
    folded, ledger = normkit.fold_onnx(model)
    assert len(norms_in(folded)) == 1
    assert "statistics of each batch" in ledger.left[0].reason


def test_a_shared_initializer_is_changed_for_its_own_reader_alone():
    b = wide()
    x, weight = b.input(), b.weight(4, 4, 1, 1)
    y = b.stop(b.norm(b.op("Conv", x, weight)))
    model = b.model(y, b.op("Conv", x, weight))
    folded, _ = check(model)
    assert weight in [tensor.name for tensor in folded.graph.initializer]


def test_an_initializer_that_a_caller_may_set_is_left_alone():
    b = wide()
    x, weight = b.input(), b.weight(4, 4, 1, 1, name="set_me")
    model = b.model(b.stop(b.norm(b.op("Conv", x, weight))))
    model.graph.input.append(
        helper.make_tensor_value_info("set_me", TensorProto.DOUBLE, [4, 4, 1, 1])
    )
    folded, _ = check(model, left=["nothing can be moved into 'conv"])
    assert norms_in(folded)
    folded, ledger = normkit.fold_onnx(model, fixed_weights=True)
    assert not norms_in(folded), f"\n{ledger}"
    assert [value.name for value in folded.graph.input] == ["x"]
    for one, other in zip(
        answers(model, feeds(model)), answers(folded, feeds(model)), strict=True
    ):
        assert np.abs(one - other).max() < 1e-9


def test_statistics_that_a_caller_may_set_keep_the_batch_norm():
    b = wide()
    model = b.model(b.stop(b.norm(b.conv(b.input()))))
    mean = norms_in(model)[0].input[3]
    model.graph.input.append(
        helper.make_tensor_value_info(mean, TensorProto.DOUBLE, [4])
    )
    _, ledger = check(model, left=["takes its statistics or weights from an input"])
    assert "pass fixed_weights=True" in ledger.left[0].reason


def test_weights_of_ir_version_3_are_constants_and_stay_inputs():
    b = Build(opset=8)
    model = b.model(b.stop(b.norm(b.conv(b.input()))))
    assert model.ir_version == 3
    folded, _ = check(model)
    assert not norms_in(folded)
    assert folded.ir_version == 3
    held = {tensor.name for tensor in folded.graph.initializer}
    assert {value.name for value in folded.graph.input} == {"x", *held}
    kept, ledger = normkit.fold_onnx(model, fixed_weights=False)
    assert norms_in(kept)
    assert "pass fixed_weights=True" in ledger.left[0].reason


def test_parameters_from_constant_nodes_and_through_identities_fold():
    b = wide()
    x = b.input()
    weight = numpy_helper.from_array(b.draw.standard_normal((4, 4, 1, 1)))
    held = b.op("Identity", b.op("Constant", value=weight))
    model = b.model(b.stop(b.norm(b.op("Conv", x, held))))
    folded, _ = check(model)
    assert "Constant" not in {node.op_type for node in folded.graph.node}


def test_names_that_are_taken_are_not_taken_again():
    b = wide()
    x, weight = b.input(), b.weight(4, 4, 1, 1, name="w")
    b.weight(1, name="w_folded")
    y = b.op("Mul", b.op("Conv", x, weight), "w_folded")
    check(b.model(b.stop(b.norm(y))))


def test_a_value_with_a_second_reader_or_that_is_returned_stays():
    b = wide()
    y = b.conv(b.input())
    z = b.op("Sigmoid", y)
    check(b.model(b.stop(b.norm(y)), z), left=["'sigmoid"])
    b = wide()
    y = b.conv(b.input())
    check(b.model(b.stop(b.norm(y)), y), left=["is returned by the model"])


def test_outputs_keep_their_names_and_their_order():
    b = wide()
    x = b.input()
    one, other = b.norm(b.conv(x)), b.norm(b.conv(x))
    folded, _ = check(b.model(one, other))
    assert [output.name for output in folded.graph.output] == [one, other]
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Conv"]


def branching(b, x, inner):
    """If a flag is set `inner`, a list of nodes that make "inner_out", else zero."""
    b.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    out = [helper.make_tensor_value_info("inner_out", TensorProto.DOUBLE, None)]
    other = helper.make_node("Neg", [x], ["inner_out"])
    branches = {
        "then_branch": helper.make_graph(inner, "then", [], out),
        "else_branch": helper.make_graph([other], "else", [], out),
    }
    for graph in branches.values():
        for _ in range(4):
            graph.output[0].type.tensor_type.shape.dim.add()
    return b.op("If", "flag", **branches)


def test_what_an_if_reads_inside_is_seen():
    b = wide()
    x = b.input()
    y = b.conv(x)
    z = b.op("Sigmoid", b.norm(y))
    inner = [helper.make_node("Tanh", [y], ["inner_out"])]
    model = b.model(z, branching(b, x, inner))
    check(model, left=["'if"])


def test_a_weight_that_is_used_inside_an_if_is_not_changed_there():
    b = wide()
    x, weight = b.input(), b.weight(4, 4, 1, 1)
    y = b.stop(b.norm(b.op("Conv", x, weight)))
    inner = [helper.make_node("Conv", [x, weight], ["inner_out"])]
    check(b.model(y, branching(b, x, inner)))


def test_a_batch_norm_inside_an_if_is_in_the_ledger():
    b = wide()
    x = b.input()
    y = b.conv(x)
    b.norm(y)
    norm = b.nodes.pop()
    norm.name, norm.output[0] = "inner_norm", "inner_out"
    model = b.model(branching(b, y, [norm]))
    _, ledger = check(model, left=["runs inside If"])
    assert ledger.left[0].name == "inner_norm"


def inner_conv_and_norm(b, x, out):
    """Nodes that make `out` of x by a conv and a batch norm."""
    at = len(b.nodes)
    y = b.norm(b.conv(x))
    inner, b.nodes[at:] = b.nodes[at:], []
    inner[-1].output[0] = out
    assert y
    return inner


def test_a_batch_norm_beside_its_conv_in_a_branch_folds_there():
    b = wide()
    x = b.input()
    inner = inner_conv_and_norm(b, x, "inner_out")
    weight = inner[0].input[1]
    shared = b.op("Conv", x, weight)
    model = b.model(b.stop(b.norm(shared)), branching(b, x, inner))
    folded, ledger = check(model)
    (branches,) = [node for node in folded.graph.node if node.op_type == "If"]
    kinds = [[n.op_type for n in a.g.node] for a in branches.attribute]
    assert sorted(kinds) == [["Conv"], ["Neg"]]
    assert "inside If" in ledger.folded[-1].how
    feed = feeds(model)
    for flag in (True, False):
        feed["flag"] = np.array(flag)
        one, other = answers(model, feed), answers(folded, feed)
        assert all(np.abs(p - q).max() < 1e-9 for p, q in zip(one, other, strict=True))


def test_a_batch_norm_beside_its_conv_in_a_loop_folds_there():
    b = wide()
    x = b.input()
    inner = inner_conv_and_norm(b, "state", "state_out")
    folded, _ = check(b.model(looping(b, x, inner)))
    (loop,) = [node for node in folded.graph.node if node.op_type == "Loop"]
    kinds = [node.op_type for node in loop.attribute[0].g.node]
    assert sorted(kinds) == ["Conv", "Identity"]


def looping(b, x, inner):
    """Three times `inner`, nodes that make "state_out" of "state", from x on."""
    kinds = [("i", TensorProto.INT64), ("go", TensorProto.BOOL)]
    inputs = [helper.make_tensor_value_info(n, kind, []) for n, kind in kinds]
    shape = [None] * 4
    state = helper.make_tensor_value_info("state", TensorProto.DOUBLE, shape)
    out = helper.make_tensor_value_info("state_out", TensorProto.DOUBLE, shape)
    going = helper.make_tensor_value_info("go_out", TensorProto.BOOL, [])
    nodes = [helper.make_node("Identity", ["go"], ["go_out"]), *inner]
    body = helper.make_graph(nodes, "body", [*inputs, state], [going, out])
    times = b.weight(values=np.array(3))
    return b.op("Loop", times, b.weight(values=np.array(True)), x, body=body)


def test_what_a_loop_reads_inside_is_seen():
    b = wide()
    x = b.input()
    y = b.conv(x)
    z = b.op("Sigmoid", b.norm(y))
    looped = looping(b, x, [helper.make_node("Add", ["state", y], ["state_out"])])
    check(b.model(z, looped), left=["'loop"])


def test_a_weight_that_is_used_inside_a_loop_is_not_changed_there():
    b = wide()
    x, weight = b.input(), b.weight(4, 4, 1, 1)
    y = b.stop(b.norm(b.op("Conv", x, weight)))
    inner = [helper.make_node("Conv", ["state", weight], ["state_out"])]
    check(b.model(y, looping(b, x, inner)))


@pytest.mark.parametrize("statistics", [np.float16, np.float32])
def test_half_weights_with_any_statistics_fold(statistics):
    b = Build(dtype=np.float16)
    y = b.norm(b.conv(b.input((2, 4, 6, 6)), bias=False), dtype=statistics)
    model = b.model(b.stop(y))
    folded, _ = normkit.fold_onnx(model)
    assert not norms_in(folded)
    kinds = {tensor.data_type for tensor in folded.graph.initializer}
    assert kinds == {TensorProto.FLOAT16}
    feed = feeds(model)
    (one,), (other,) = answers(model, feed), answers(folded, feed)
    assert np.abs(one - other).max() < 5e-3


def test_a_half_weight_that_would_overflow_stays():
    b = Build(dtype=np.float16)
    y = b.norm(b.conv(b.input((2, 4, 6, 6))), dtype=np.float32)
    for tensor in b.weights[-1:]:
        tensor.CopyFrom(
            numpy_helper.from_array(np.full(4, 1e-12, np.float32), tensor.name)
        )
    b.nodes[-1].attribute.append(helper.make_attribute("epsilon", 0.0))
    model = b.model(b.stop(y))
    _, ledger = normkit.fold_onnx(model)
    assert "would overflow its dtype" in ledger.left[0].reason


def test_a_fold_that_makes_an_infinity_a_nan_is_refused():
    """An infinite factor times a weight of 0 would be folded into the weights."""
    b = Build()
    flat = b.op("Reshape", b.input(), b.weight(values=np.array([-1, 4])))
    y = b.norm(flat)
    gemm = b.op("Gemm", y, b.weight(4, 5), b.weight(5), alpha=float("inf"))
    model = b.model(b.stop(gemm), ranks=[2])
    folded, ledger = normkit.fold_onnx(model)
    assert "would overflow its dtype" in ledger.left[0].reason
    assert norms_in(folded)


def test_rms_and_layer_norms_are_left_alone():
    b = wide()
    x = b.input((2, 4, 6))
    y = b.op("LayerNormalization", x, b.weight(6), b.weight(6))
    mean = b.op("ReduceMean", b.op("Mul", y, y), axes=[-1])
    y = b.op("Mul", b.op("Div", y, b.op("Sqrt", mean)), b.weight(6))
    model = b.model(y, ranks=[3])
    folded, ledger = check(model)
    assert not ledger.entries
    assert [n.op_type for n in folded.graph.node] == [
        n.op_type for n in model.graph.node
    ]


def test_a_padded_conv_after_keeps_a_sum_per_channel():
    b = wide()
    y = b.conv(b.norm(b.stop(b.input())), kernel=3, pads=[1, 1, 1, 1])
    folded, ledger = check(b.model(y), left=["a sum per channel stays"])
    assert [n.op_type for n in folded.graph.node] == ["Sigmoid", "Add", "Conv"]
    assert ledger.entries[0].reduced


# Files --------------------------------------------------------------------------


def saved(tmp_path, *, external=False):
    b = Build()
    y = b.conv(b.input(), 4, 16, kernel=3)
    model = b.model(b.stop(b.norm(y, 16)))
    path = tmp_path / "net.onnx"
    onnx.save_model(
        model,
        path,
        save_as_external_data=external,
        location="net.bin",
        size_threshold=0,
    )
    return path


@pytest.mark.parametrize("external", [False, True])
def test_a_file_is_folded_into_a_file_of_the_same_kind(tmp_path, external):
    path, out = saved(tmp_path, external=external), tmp_path / "out.onnx"
    model, _ = normkit.fold_onnx(path, out)
    assert (tmp_path / "out.onnx.data").exists() == external
    written = onnx.load_model(out)
    onnx.checker.check_model(out)
    assert not norms_in(written)
    feed = feeds(onnx.load_model(path))
    (one,), (other,) = in_runtime(written, feed), in_runtime(model, feed)
    assert np.abs(one - other).max() == 0


def relocated(path, **told):
    """The model at `path` with other words about where its first tensor lies."""
    model = onnx.load_model(path, load_external_data=False)
    entries = model.graph.initializer[0].external_data
    for entry in entries:
        entry.value = str(told.get(entry.key, entry.value))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin"]
)
def test_external_data_may_not_lead_out_of_the_folder(tmp_path, location):
    (tmp_path / "models" / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(b"0" * 4096)
    path = saved(tmp_path / "models", external=True)
    with pytest.raises(FoldError, match="outside the model's folder"):
        normkit.fold_onnx(relocated(path, location=location))


def test_external_data_may_not_follow_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"0" * 4096)
    path = saved(tmp_path / "models", external=True)
    (tmp_path / "models" / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(FoldError, match="outside the model's folder"):
        normkit.fold_onnx(relocated(path, location="link.bin"))


def test_external_data_must_be_as_large_as_it_says(tmp_path):
    path = saved(tmp_path, external=True)
    with pytest.raises(FoldError, match="the file is damaged"):
        normkit.fold_onnx(relocated(path, length=2**40))


def test_a_missing_data_file_is_named(tmp_path):
    path = saved(tmp_path, external=True)
    (tmp_path / "net.bin").unlink()
    with pytest.raises(FoldError, match=r"'net\.bin', which is not a file"):
        normkit.fold_onnx(path)


def blown_up(b, x, kind):
    """What a node of this kind makes of a tensor of 4 × 4 and a large number."""

    def numbers(*values):
        return b.weight(values=np.array(values))

    def row(y):
        return b.op("Reshape", y, numbers(1, -1))

    def column(y):
        return b.op("Reshape", y, numbers(-1, 1))

    huge = 2**40
    return {
        "ConstantOfShape": lambda: b.op("ConstantOfShape", numbers(2**20, 2**20)),
        "Expand": lambda: b.op("Expand", x, numbers(huge, 4, 4)),
        "Tile": lambda: b.op("Tile", x, numbers(huge, 1)),
        "Pad": lambda: b.op("Pad", x, numbers(0, huge, 0, 0)),
        "Resize": lambda: b.op("Resize", x, "", "", numbers(2**20, 2**20)),
        "Resize by": lambda: b.op(
            "Resize", x, "", b.weight(values=[1e5, 1e5], dtype=np.float32)
        ),
        "Range": lambda: b.op("Range", *(b.weight(values=v) for v in (0, huge, 1))),
        "OneHot": lambda: b.op(
            "OneHot", numbers(0), b.weight(values=huge), numbers(0.0, 1.0)
        ),
        "RandomNormal": lambda: b.op("RandomNormal", shape=[2**20, 2**20]),
        "Concat": lambda: again(30, lambda y: b.op("Concat", y, y, axis=0), x),
        "Mul": lambda: again(4, lambda y: b.op("Mul", row(y), column(y)), x),
        "inside If": lambda: inside_if(b, x, numbers(huge, 1)),
    }[kind]()


def again(times, step, x):
    for _ in range(times):
        x = step(x)
    return x


def inside_if(b, x, repeats):
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Tile", [x, repeats], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.DOUBLE, None)],
        )
        for name in ("then", "else")
    }
    flag = b.weight(values=np.array(True))
    return b.op("If", flag, **branches)


@pytest.mark.parametrize(
    "kind",
    [
        *("ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "Resize by", "Range"),
        *("OneHot", "RandomNormal", "Concat", "Mul", "inside If"),
    ],
)
def test_a_small_file_cannot_ask_for_much_memory(kind):
    b = wide()
    x = b.input((4, 4))
    large = blown_up(b, x, kind)
    model = b.model(b.op("Shape", large), ranks=[1])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(FoldError, match=r"would make .* larger memory_limit"):
        normkit.fold_onnx(model, memory_limit=0.01)  # Reached at once.


def test_an_input_as_large_as_the_file_says_is_not_made():
    b = wide()
    model = b.model(b.norm(b.conv(b.input((2**20, 4, 2**10, 2**10)))))
    with pytest.raises(FoldError, match=r"the inputs would make .* elements"):
        normkit.fold_onnx(model)


def test_what_is_no_model_is_refused(tmp_path):
    path = tmp_path / "no.onnx"
    path.write_bytes(b"\x00not a model")
    with pytest.raises(FoldError, match="is not an ONNX model"):
        normkit.fold_onnx(path)
    with pytest.raises(FoldError, match="there is no file"):
        normkit.fold_onnx(tmp_path / "absent.onnx")


def test_a_model_that_the_checker_rejects_is_refused():
    b = wide()
    model = b.model(b.conv(b.input()))
    model.graph.node[0].op_type = "Convolve"
    with pytest.raises(FoldError, match=r"onnx\.checker rejects the model given"):
        normkit.fold_onnx(model)


def test_a_wrong_fold_is_undone_in_onnx_too(monkeypatch):
    from normkit.fold import algebra
    from normkit.fold.ir.nodes import linear

    right = algebra.fold_output_affine

    def forgets_the_bias(weight, bias, affine, layout):
        return right(weight, None, affine, layout)

    monkeypatch.setattr(linear, "fold_output_affine", forgets_the_bias)
    b = wide()
    model = b.model(b.stop(b.norm(b.conv(b.input()))))
    folded, ledger = normkit.fold_onnx(model)
    assert norms_in(folded)
    assert "undone: it differed by" in ledger.left[0].reason


def test_example_inputs_serve_a_model_that_random_ones_do_not_fit():
    b = Build()
    x = b.input(("N", 4, "H", "W"))
    y = b.norm(b.conv(x))
    shape = b.weight(values=np.array([-1, 4 * 11 * 11]))
    model = b.model(b.op("Reshape", b.stop(y), shape), ranks=[2])
    with pytest.raises(FoldError, match="pass example_inputs"):
        normkit.fold_onnx(model)
    image = np.ones((1, 4, 11, 11))
    _, ledger = normkit.fold_onnx(model, example_inputs={"x": image})
    assert len(ledger.folded) == 1
