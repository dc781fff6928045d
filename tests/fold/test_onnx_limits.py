"""ONNX files of unknown origin: no data file is lost, no run lasts for ever."""

import shutil
import time

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is missing")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import normkit  # noqa: E402
from fold.test_onnx import Build, norms_in, saved, wide  # noqa: E402
from normkit.errors import FoldError  # noqa: E402


def outside(tmp_path, name="model.onnx", seed=0):
    """A model in `name` whose weights are in a file of their own."""
    b = Build(seed=seed)
    path = tmp_path / name
    onnx.save_model(
        b.model(b.stop(b.norm(b.conv(b.input(), 4, 16, kernel=3), 16))),
        path,
        save_as_external_data=True,
        location=f"{name}.data",
        size_threshold=0,
    )
    return path


def weights(path):
    held = onnx.load_model(path).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in held}


def test_the_data_file_that_the_input_reads_keeps_its_bytes(tmp_path):
    model = outside(tmp_path)
    backup = tmp_path / "backup.onnx"
    shutil.copy(model, backup)
    before = (tmp_path / "model.onnx.data").read_bytes()
    normkit.fold_onnx(backup, model)
    assert (tmp_path / "model.onnx.data").read_bytes() == before
    assert not norms_in(onnx.load_model(model))
    assert norms_in(onnx.load_model(backup))


def test_a_data_file_that_two_models_read_keeps_its_bytes(tmp_path):
    model, other = outside(tmp_path), outside(tmp_path, "other.onnx", seed=1)
    shutil.copy(model, tmp_path / "twin.onnx")
    before = weights(tmp_path / "twin.onnx")
    normkit.fold_onnx(other, model)
    after = weights(tmp_path / "twin.onnx")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_folding_a_model_into_itself_keeps_its_weights_until_the_end(
    tmp_path, monkeypatch
):
    model = outside(tmp_path)
    before = weights(model)

    def fails(*args, **settings):
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save_model", fails)
    with pytest.raises(OSError, match="no space"):
        normkit.fold_onnx(model, model)
    after = weights(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    normkit.fold_onnx(model, model)
    assert not norms_in(onnx.load_model(model))


def test_writing_to_the_same_file_again_leaves_one_data_file(tmp_path):
    source, out = outside(tmp_path), tmp_path / "out.onnx"
    for _ in range(3):
        normkit.fold_onnx(source, out)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 4, names
    assert not norms_in(onnx.load_model(out))


@pytest.mark.parametrize("other", [False, True], ids=["own", "of another model"])
def test_a_model_is_not_written_over_a_data_file(tmp_path, other):
    model = outside(tmp_path)
    source = outside(tmp_path, "source.onnx") if other else model
    with pytest.raises(FoldError, match=r"holds weights that .* reads"):
        normkit.fold_onnx(source, tmp_path / "model.onnx.data")


def test_a_nul_in_the_name_of_a_data_file_is_an_error_that_says_so(tmp_path):
    path = outside(tmp_path)
    model = onnx.load_model(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "a\0b"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FoldError, match="a data file with a NUL in it"):
        normkit.fold_onnx(path)


def looped(body, trips=2**40):
    """A model that counts in a `Loop` with the nodes `body` in it."""
    i = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    go = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    b = wide()
    x = b.input((2, 4))
    nodes = [helper.make_node(*node) for node in body]
    state = helper.make_tensor_value_info("state", TensorProto.DOUBLE, None)
    last = nodes[-1].output[0] if nodes else "state"
    made = helper.make_tensor_value_info(last, TensorProto.DOUBLE, None)
    graph = helper.make_graph(nodes, "body", [i, go, state], [go, made])
    count = b.weight(values=np.array(trips))
    y = b.op("Loop", count, b.weight(values=np.array(True)), x, body=graph)
    return b.model(y, ranks=[2])


@pytest.mark.parametrize(
    "body", [[], [("Neg", ["state"], ["negated"])]], ids=["empty", "a node"]
)
def test_a_loop_without_end_is_stopped(body):
    start = time.monotonic()
    with pytest.raises(FoldError, match=r"within the 0\.5 s .* larger time_limit"):
        normkit.fold_onnx(looped(body), time_limit=0.5)
    assert time.monotonic() - start < 20


def test_a_short_loop_is_not():
    normkit.fold_onnx(looped([("Neg", ["state"], ["negated"])], trips=5))


def test_the_inputs_of_a_run_count_beside_its_results():
    b = wide()
    model = b.model(b.stop(b.norm(b.conv(b.input((2, 4, 64, 64))))))
    one = 2 * 4 * 64 * 64 * 8e-9  # GB in float64: of the input and of three results
    normkit.fold_onnx(model, memory_limit=4.1 * one)
    with pytest.raises(FoldError, match="larger memory_limit"):
        normkit.fold_onnx(model, memory_limit=3.9 * one)


def test_a_product_that_would_take_hours_is_not_begun(monkeypatch):
    b = wide()
    side = 2**14
    shape = b.weight(values=np.array([side, side]))
    big = b.op("ConstantOfShape", shape)
    y = b.op("MatMul", big, big)
    model = b.model(b.op("Shape", y), b.norm(b.conv(b.input())), ranks=[1, 4])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(FoldError, match=r"MatMul .* is not done within"):
        normkit.fold_onnx(model, time_limit=5, memory_limit=10)


@pytest.mark.timeout(60)
def test_a_catastrophic_regular_expression_takes_linear_time():
    b = wide()
    y = b.stop(b.norm(b.conv(b.input())))
    text = helper.make_tensor("text", TensorProto.STRING, [1], [b"a" * 40 + b"b"])
    b.weights.append(text)
    b.opset = 20
    match = b.op("RegexFullMatch", "text", pattern="(a|a)*|(a+)+$")
    model = b.model(y, match, ranks=[4, 1])
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.BOOL
    _, ledger = normkit.fold_onnx(model)
    assert len(ledger.folded) == 1


@pytest.mark.timeout(60)
def test_functions_that_double_forty_times_are_refused():
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = []
    for level in range(40):
        kind = ("Neg", "") if level == 0 else (f"F{level - 1}", "own")
        nodes = [
            helper.make_node(kind[0], ["x"], ["y"], domain=kind[1]),
            helper.make_node(kind[0], ["y"], ["z"], domain=kind[1]),
        ]
        functions.append(
            helper.make_function("own", f"F{level}", ["x"], ["z"], nodes, opsets)
        )
    b = wide()
    y = b.op("F39", b.norm(b.conv(b.input())), domain="own")
    model = b.model(y)
    model.functions.extend(functions)
    model.opset_import.append(opsets[1])
    with pytest.raises(FoldError, match="expand to more than 1000000 nodes"):
        normkit.fold_onnx(model)


def test_a_time_limit_must_be_positive():
    b = wide()
    with pytest.raises(normkit.errors.ArgumentError, match="above 0 seconds, got 0"):
        normkit.fold_onnx(b.model(b.conv(b.input())), time_limit=0)


def open_weights(tmp_path):
    """A file of opset 9 whose weights are listed as inputs as well."""
    path = saved(tmp_path)
    model = onnx.load_model(path)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    onnx.save_model(model, path)
    return path


def test_weights_that_are_inputs_are_named_on_the_first_line(tmp_path):
    path = open_weights(tmp_path)
    _, ledger = normkit.fold_onnx(path)
    assert not ledger.folded
    first = ledger.to_text().splitlines()[0]
    assert "lists weights as inputs" in first
    assert "pass fixed_weights=True (--fixed-weights)" in first
    _, ledger = normkit.fold_onnx(path, fixed_weights=True)
    assert ledger.folded
    assert "fixed_weights" not in ledger.to_text()


def test_a_negative_size_of_an_input_is_an_error_that_says_so():
    b = wide()
    model = b.model(b.stop(b.norm(b.conv(b.input()))))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    with pytest.raises(FoldError, match="'x' has a dimension of size -1"):
        normkit.fold_onnx(model)


def test_a_size_of_0_does_not_hide_one_that_is_too_large():
    b = wide()
    model = b.model(b.stop(b.norm(b.conv(b.input()))))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value, dims[2].dim_value = 0, 2**62
    with pytest.raises(FoldError, match="the inputs"):
        normkit.fold_onnx(model)
