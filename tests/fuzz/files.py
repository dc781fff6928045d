"""Files of unknown origin: damaged bytes, and contents that no tool should write.

An ONNX file either raises `FoldError` or folds into the same function; a checkpoint
either raises `TargetError` or loads. The files themselves, and the model, are as they
were after an error.
"""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

import normkit
from fuzz.cases import Short
from fuzz.tensors import seeds
from normkit.errors import FoldError, TargetError
from normkit_cli.checkpoint import Checkpoint


@dataclass(frozen=True, repr=False)
class FileCase(Short):
    """A file, and what happens to it, in order."""

    source: str
    damages: tuple[str, ...]
    seed: int = 0


# --- bytes ---------------------------------------------------------------------------


def _flip(data: bytearray, draw: np.random.Generator) -> None:
    for _ in range(int(draw.integers(1, 4))):
        data[int(draw.integers(len(data)))] = int(draw.integers(256))


def _cut(data: bytearray, draw: np.random.Generator) -> None:
    del data[int(draw.integers(len(data))) :]


def _repeat(data: bytearray, draw: np.random.Generator) -> None:
    a, b = sorted(int(i) for i in draw.integers(len(data) + 1, size=2))
    data[b:b] = data[a : min(b, a + 64)]


def _remove(data: bytearray, draw: np.random.Generator) -> None:
    a = int(draw.integers(len(data)))
    del data[a : a + int(draw.integers(1, 9))]


BYTES: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "flip": _flip,
    "cut": _cut,
    "repeat": _repeat,
    "remove": _remove,
}


# --- checkpoints ---------------------------------------------------------------------


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)
    )


def _pick(content: Any, draw: np.random.Generator) -> tuple[dict[Any, Any], Any]:
    weights = content.get("state_dict", content)
    names = list(weights)
    return weights, names[int(draw.integers(len(names)))] if names else None


def _replaced(make: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def damage(content: Any, draw: np.random.Generator) -> Any:
        weights, name = _pick(content, draw)
        if isinstance(weights.get(name), torch.Tensor):
            # A second damage that torch itself cannot do to the first leaves it.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                weights[name] = make(weights[name])
        return content

    return damage


def _renamed(content: Any, draw: np.random.Generator) -> Any:
    weights, name = _pick(content, draw)
    if name is not None:
        new = [0, ("a", 1), "", "module.0.weight", None, "1.running_var"]
        weights[new[int(draw.integers(len(new)))]] = weights.pop(name)
    return content


def _dropped(content: Any, draw: np.random.Generator) -> Any:
    weights, name = _pick(content, draw)
    if name is not None:
        del weights[name]
    return content


def _prefixed(content: Any, draw: np.random.Generator) -> Any:
    weights, _ = _pick(content, draw)
    moved = {f"module.{name}": weights.pop(name) for name in list(weights)}
    weights.update(moved)
    return content


CONTENTS: dict[str, Callable[[Any, np.random.Generator], Any]] = {
    "bfloat16": _replaced(lambda t: t.bfloat16()),
    "int64": _replaced(lambda t: t.long()),
    "complex": _replaced(lambda t: t.to(torch.complex64)),
    "bool": _replaced(lambda t: t.bool()),
    "sparse": _replaced(lambda t: t.to_sparse()),
    "meta": _replaced(lambda t: t.to("meta")),
    "quantized": _replaced(
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    ),
    "transposed": _replaced(lambda t: t.t() if t.dim() == 2 else t.unsqueeze(0)),
    "a view": _replaced(lambda t: torch.stack([t, t])[0]),
    "expanded": _replaced(lambda t: t.flatten()[0].expand(t.shape)),
    "nan": _replaced(lambda t: t.float() * float("nan")),
    "a parameter": _replaced(
        lambda t: nn.Parameter(t.clone(), requires_grad=t.is_floating_point())
    ),
    "a number": _replaced(lambda t: 3.0),
    "nothing": _replaced(lambda t: None),
    "renamed": _renamed,
    "dropped": _dropped,
    "prefixed": _prefixed,
    "nested": lambda content, draw: {"state_dict": content, "epoch": 3},
    "a list": lambda content, draw: list(content.values()),
}


def check_checkpoint(case: FileCase) -> None:
    """Read, load and save a damaged checkpoint.

    Raises:
        Exception: Any but `TargetError`.
        AssertionError: The model changed although loading failed, or a tensor that is
            as it was in the file is saved as another.
    """
    draw = np.random.default_rng(case.seed)
    content: Any = dict(_network().state_dict())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized and sparse tensors announce changes
        path = Path(folder) / "in.pt"
        for damage in case.damages:
            if damage in CONTENTS and isinstance(content, dict):
                content = CONTENTS[damage](content, draw)
        torch.save(content, path)
        data = bytearray(path.read_bytes())
        for damage in case.damages:
            if damage in BYTES and data:
                BYTES[damage](data, draw)
        path.write_bytes(bytes(data))
        model = _network()
        before = copy.deepcopy(model.state_dict())
        try:
            file = Checkpoint.read(path)
        except TargetError:
            return
        held = dict(file.weights)
        try:
            file.load_into(model)
        except TargetError:
            after = model.state_dict().values()
            assert all(map(torch.equal, before.values(), after)), "half loaded"
            return
        file.save(model, Path(folder) / "out.pt")
        assert path.read_bytes() == bytes(data), "the input was written to"
        again = Checkpoint.read(Path(folder) / "out.pt")
        for name, tensor in held.items():
            found = again.weights[name]
            assert found.dtype == tensor.dtype, f"{name}: {found.dtype}"
            assert _same_bytes(found, tensor), f"{name} is saved with other values"


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


# --- ONNX ----------------------------------------------------------------------------


@cache
def _models() -> dict[str, Any]:
    """Small valid models; each has a batch norm that folds."""
    from fold.test_onnx import PATTERNS, built

    return {name: built(name).SerializeToString() for name in PATTERNS}


def _node(model: Any, draw: np.random.Generator) -> Any:
    nodes = model.graph.node
    return nodes[int(draw.integers(len(nodes)))] if len(nodes) else None


def _rewired(model: Any, draw: np.random.Generator) -> None:
    node, other = _node(model, draw), _node(model, draw)
    if node is not None and node.input and other.output:
        node.input[int(draw.integers(len(node.input)))] = other.output[0]


def _swapped_inputs(model: Any, draw: np.random.Generator) -> None:
    node = _node(model, draw)
    if node is not None and len(node.input) > 1:
        a, b = draw.integers(len(node.input), size=2)
        first, second = node.input[int(a)], node.input[int(b)]
        node.input[int(a)], node.input[int(b)] = second, first


def _fewer_inputs(model: Any, draw: np.random.Generator) -> None:
    node = _node(model, draw)
    if node is not None and node.input:
        del node.input[-1]


def _deleted_node(model: Any, draw: np.random.Generator) -> None:
    if model.graph.node:
        del model.graph.node[int(draw.integers(len(model.graph.node)))]


def _another_operator(model: Any, draw: np.random.Generator) -> None:
    node = _node(model, draw)
    kinds = ["Relu", "Identity", "Conv", "BatchNormalization", "Add", "Mul", "Flatten"]
    kinds += ["MaxPool", "Transpose", "Concat", "Softmax", "Nonsense", ""]
    if node is not None:
        node.op_type = kinds[int(draw.integers(len(kinds)))]


def _attribute(model: Any, draw: np.random.Generator) -> None:
    node = _node(model, draw)
    if node is None or not node.attribute:
        return
    found = node.attribute[int(draw.integers(len(node.attribute)))]
    number = int(draw.choice([-1, 0, 1, 2, 7, 2**40, -(2**62)]))
    if found.ints:
        found.ints[int(draw.integers(len(found.ints)))] = number
    elif found.HasField("f"):
        found.f = float(draw.choice([0.0, -1.0, np.nan, np.inf, 1e-30]))
    else:
        found.i = number


def _shape_of_weight(model: Any, draw: np.random.Generator) -> None:
    weights = model.graph.initializer
    if not weights:
        return
    dims = weights[int(draw.integers(len(weights)))].dims
    if dims:
        number = int(draw.choice([0, 1, 2, 5, -1, 2**33]))
        dims[int(draw.integers(len(dims)))] = number


def _weight_values(model: Any, draw: np.random.Generator) -> None:
    from onnx import numpy_helper

    weights = model.graph.initializer
    if not weights:
        return
    tensor = weights[int(draw.integers(len(weights)))]
    try:
        values = numpy_helper.to_array(tensor).copy()
    except Exception:  # an earlier damage
        return
    if values.size and values.dtype.kind == "f":
        values.flat[int(draw.integers(values.size))] = float(
            draw.choice([np.nan, np.inf, -1.0, 0.0, 1e30])
        )
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _weight_type(model: Any, draw: np.random.Generator) -> None:
    weights = model.graph.initializer
    if weights:
        tensor = weights[int(draw.integers(len(weights)))]
        tensor.data_type = int(draw.integers(0, 24))


def _input_shape(model: Any, draw: np.random.Generator) -> None:
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims:
            dim = dims[int(draw.integers(len(dims)))]
            dim.dim_value = int(draw.choice([0, 1, 3, -1, 2**40]))


def _opset(model: Any, draw: np.random.Generator) -> None:
    model.opset_import[0].version = int(draw.choice([0, 6, 9, 13, 22, 99, -1]))


def _external(model: Any, draw: np.random.Generator) -> None:
    weights = model.graph.initializer
    if weights:
        tensor = weights[int(draw.integers(len(weights)))]
        tensor.data_location = 1
        places = ["gone.data", "../up.data", "/etc/passwd", "", "a\0b", "."]
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", str(draw.choice(places))
        more = tensor.external_data.add()
        more.key, more.value = "offset", str(draw.choice(["0", "-4", "x", "99999"]))


PROTO: dict[str, Callable[[Any, np.random.Generator], None]] = {
    "rewired": _rewired,
    "swapped inputs": _swapped_inputs,
    "fewer inputs": _fewer_inputs,
    "deleted node": _deleted_node,
    "another operator": _another_operator,
    "attribute": _attribute,
    "shape of a weight": _shape_of_weight,
    "values of a weight": _weight_values,
    "type of a weight": _weight_type,
    "shape of an input": _input_shape,
    "opset": _opset,
    "external data": _external,
}


def check_onnx(case: FileCase) -> None:
    """Fold a damaged file.

    Raises:
        Exception: Any but `FoldError`.
        AssertionError: The folded model differs where the original runs, or a file
            was left behind by an error.
    """
    import onnx

    draw = np.random.default_rng(case.seed)
    model = onnx.ModelProto.FromString(_models()[case.source])
    for damage in case.damages:
        if damage in PROTO:
            PROTO[damage](model, draw)
    data = bytearray(model.SerializeToString())
    for damage in case.damages:
        if damage in BYTES and data:
            BYTES[damage](data, draw)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        path.write_bytes(bytes(data))
        try:
            folded, ledger = normkit.fold_onnx(path, out, time_limit=10)
        except FoldError:
            left = {p.name for p in Path(folder).iterdir()}
            assert left == {"in.onnx"}, f"an error leaves {left}"
            folded = None
        assert path.read_bytes() == bytes(data), "the input was written to"
        if folded is not None:
            written = onnx.load_model(out)
            assert written.SerializeToString() == folded.SerializeToString()
            _assert_same_in_runtime(bytes(data), folded, str(ledger))


def _assert_same_in_runtime(data: bytes, folded: Any, about: str) -> None:
    import onnx

    from fold.test_onnx import feeds, in_runtime

    model = onnx.ModelProto.FromString(data)
    try:
        feed = feeds(model)
        wanted = in_runtime(model, feed)
    except Exception:  # what onnxruntime does not run has no answer to compare
        return
    found = in_runtime(folded, feed)
    for one, other in zip(wanted, found, strict=True):
        assert np.array_equal(np.isnan(one), np.isnan(other)), about
        if not np.isfinite(one).all():
            continue
        gap = np.abs(one - other).max(initial=0) / max(1, np.abs(one).max(initial=0))
        # float32 weights of up to 1e4 of their result: 1e4 roundings of 6e-8 each.
        assert gap <= 1e-3, f"the folded file differs by {gap:.1e}\n{about}"


damages = st.sampled_from([*BYTES, *PROTO])
onnx_cases = st.builds(
    FileCase,
    source=st.deferred(lambda: st.sampled_from(list(_models()))),
    damages=st.lists(damages, min_size=1, max_size=3).map(tuple),
    seed=seeds,
)
checkpoint_cases = st.builds(
    FileCase,
    source=st.just("checkpoint"),
    damages=st.lists(st.sampled_from([*BYTES, *CONTENTS]), min_size=1, max_size=3).map(
        tuple
    ),
    seed=seeds,
)
