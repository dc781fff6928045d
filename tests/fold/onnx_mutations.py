"""Damaged ONNX files, and a process that folds them one after the other.

    python onnx_mutations.py START STOP FOLDER

prints one JSON line per mutation: what came of it, its time, its peak of memory. The
parent (test_onnx_mutations.py) sees a crash as a process that ends early.
"""

import contextlib
import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fold.test_onnx import Build

OPERATORS = ("Conv", "Relu", "Add", "Reshape", "Concat", "Loop", "If", "MatMul", "Tile")
HUGE = (2**31 - 1, 2**40, 10**9, 10**6)
MEMORY_LIMIT = 1.0  # GB
MOST_SECONDS = 40  # of the processor, for one file; then the process is killed
ODD = (0, -1, -(2**31), 3, 7, *HUGE)


def convolutions() -> onnx.ModelProto:
    b = Build(seed=1)
    x = b.norm(b.conv(b.input(), kernel=3, pads=[1, 1, 1, 1]))
    y = b.op("Add", b.op("Relu", x), b.norm(b.conv(x)))
    return b.model(b.stop(b.op("MaxPool", y, kernel_shape=[2, 2], strides=[1, 1])))


def matrices() -> onnx.ModelProto:
    b = Build(seed=2)
    flat = b.op("Reshape", b.input(), b.weight(values=np.array([-1, 4])))
    y = b.op("Gemm", flat, b.weight(5, 4), b.weight(5), transB=1)
    return b.model(b.op("Softmax", b.norm(y, 5)), ranks=[2])


def old() -> onnx.ModelProto:
    b = Build(seed=3, opset=8)
    return b.model(b.stop(b.norm(b.conv(b.input(), kernel=3))))


def moves() -> onnx.ModelProto:
    b = Build(seed=4)
    x = b.op("Transpose", b.norm(b.conv(b.input())), perm=[0, 2, 3, 1])
    left, right = b.op("Split", x, outputs=2, axis=3)
    y = b.op("Concat", right, left, axis=3)
    y = b.op("Tile", y, b.weight(values=np.array([1, 2, 1, 1])))
    return b.model(b.stop(y))


def loops() -> onnx.ModelProto:
    body = Build(seed=5)
    y = body.norm(body.conv("carried"))
    body.op("Identity", "going")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        body.nodes,
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("going", TensorProto.BOOL, []),
            info("carried", TensorProto.FLOAT, [None] * 4),
        ],
        [
            info(body.nodes[-1].output[0], TensorProto.BOOL, []),
            info(y, TensorProto.FLOAT, [None] * 4),
        ],
        body.weights,
    )
    b = Build(seed=6)
    trips = b.weight(values=np.array(3))
    go = b.weight(values=np.array(True))
    return b.model(b.stop(b.op("Loop", trips, go, b.input(), body=graph)))


BASES = (convolutions, matrices, old, moves, loops)


def mutation(number: int) -> bytes:
    """Return the bytes of the damaged file `number`, always the same."""
    draw = random.Random(number)
    model = BASES[number % len(BASES)]()
    for _ in range(draw.choice((1, 1, 2, 3))):
        # One damage may leave nothing that another can read or remove.
        with contextlib.suppress(Exception):
            draw.choice(STRUCTURAL)(model, draw)
    data = bytearray(model.SerializeToString())
    if draw.random() < 0.4:
        draw.choice(RAW)(data, draw)
    return bytes(data)


def _node(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    graphs = [model.graph]
    graphs += [a.g for n in model.graph.node for a in n.attribute if a.HasField("g")]
    return draw.choice([node for graph in graphs for node in graph.node])


def _tensor(model: onnx.ModelProto, draw: random.Random) -> TensorProto:
    return draw.choice(list(model.graph.initializer))


def dims(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _tensor(model, draw)
    if tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(ODD)
    else:
        tensor.dims.append(draw.choice(ODD))


def values(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _tensor(model, draw)
    array = np.array(numpy_helper.to_array(tensor))
    worst = (np.nan, np.inf, -1.0, 1e38, 0.0)
    wrong = draw.choice(worst if array.dtype.kind == "f" else ODD)
    if array.dtype.kind == "b" or not array.size:
        return
    with np.errstate(all="ignore"):
        array.reshape(-1)[draw.randrange(array.size)] = np.array(wrong).astype(
            array.dtype
        )
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def tensor_type(model: onnx.ModelProto, draw: random.Random) -> None:
    _tensor(model, draw).data_type = draw.randrange(0, 24)


def input_shape(model: onnx.ModelProto, draw: random.Random) -> None:
    dim = draw.choice(list(model.graph.input[0].type.tensor_type.shape.dim))
    dim.dim_value = draw.choice((1, 5, *ODD))


def input_type(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.input[0].type.tensor_type.elem_type = draw.randrange(0, 24)


def operator(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).op_type = draw.choice((*OPERATORS, "Nothing", ""))


def domain(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).domain = draw.choice(("com.microsoft", "ai.onnx.ml", "x"))


def attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if not node.attribute:
        node.attribute.append(helper.make_attribute("axis", draw.choice(ODD)))
        return
    changed = draw.choice(list(node.attribute))
    if changed.ints:
        changed.ints[draw.randrange(len(changed.ints))] = draw.choice(ODD)
    elif changed.HasField("i"):
        changed.i = draw.choice(ODD)
    elif changed.HasField("f"):
        changed.f = draw.choice((float("nan"), -1.0, 1e30))
    else:
        changed.name = "renamed"


def wiring(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    names = [o for n in model.graph.node for o in n.output] + ["x", "", "missing"]
    if node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(names)


def outputs(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if draw.random() < 0.5:
        node.output.append(draw.choice(("x", "extra", node.output[0])))
    else:
        node.output[0] = draw.choice(("x", "other", ""))


def removed(model: onnx.ModelProto, draw: random.Random) -> None:
    del model.graph.node[draw.randrange(len(model.graph.node))]


def repeated(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.node.insert(0, _node(model, draw))


def lost_weight(model: onnx.ModelProto, draw: random.Random) -> None:
    del model.graph.initializer[draw.randrange(len(model.graph.initializer))]


def versions(model: onnx.ModelProto, draw: random.Random) -> None:
    if draw.random() < 0.5:
        model.ir_version = draw.choice((0, 1, 2, 3, 99, 2**40))
    else:
        model.opset_import[0].version = draw.choice((0, 1, 6, 7, 9, 13, 99, 2**40))


def outside(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _tensor(model, draw)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    where = draw.choice(("/etc/passwd", "../x", "none.data", "model.onnx", "a\0b", ""))
    for key, value in (("location", where), ("length", str(draw.choice(ODD)))):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))


def much_memory(model: onnx.ModelProto, draw: random.Random) -> None:
    """Let the file ask for a tensor of up to 4 TB."""
    shape = [draw.choice((10**4, 10**5, 10**6)) for _ in range(2)]
    held = numpy_helper.from_array(np.array(shape, np.int64), "much_shape")
    model.graph.initializer.append(held)
    model.graph.node.insert(
        0, helper.make_node("ConstantOfShape", ["much_shape"], ["much"], name="much")
    )
    sums = helper.make_node("ReduceSum", ["much"], ["sum"], name="sum", keepdims=0)
    model.graph.node.insert(1, sums)
    last = model.graph.output[0]
    model.graph.node.append(helper.make_node("Mul", [last.name, "sum"], ["most"]))
    last.name = "most"


STRUCTURAL = (
    *(dims, values, tensor_type, input_shape, input_type, operator, domain, attribute),
    *(wiring, outputs, removed, repeated, lost_weight, versions, outside, much_memory),
)


def flipped(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 4, 32))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def inserted(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data)) :] = draw.randbytes(16)


def zeroed(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))


RAW = (flipped, cut, inserted, zeroed)


def peak() -> int:
    """Return the largest resident size of this process since the last reset, in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(row for row in status.splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    start, stop, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    import normkit
    from normkit.errors import NormkitError

    path = folder / "model.onnx"
    for number in range(start, stop):
        path.write_bytes(mutation(number))
        Path("/proc/self/clear_refs").write_text("5")
        # Of the processor: others may use it, too. One thread.
        began = time.process_time()
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(began) + MOST_SECONDS, most))
        try:
            normkit.fold_onnx(
                path, folder / "out.onnx", time_limit=4, memory_limit=MEMORY_LIMIT
            )
            told = "folded"
        except NormkitError as error:
            told = f"{type(error).__name__}: {error}"
        except Exception as error:
            told = f"UNCLEAR {type(error).__name__}: {error}"
        spent = time.process_time() - began
        print(json.dumps([number, told, round(spent, 2), peak()]), flush=True)


if __name__ == "__main__":
    main()
