"""Read and write model files of unknown origin.

A file says where its weights are and how large they are; both are checked. A path must
stay inside the model's folder, links included, and every tensor must hold exactly the
bytes of its shape, so a small file cannot ask for much memory. Writing replaces no data
file that a model still reads.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper

from normkit.errors import FoldError
from normkit.modeling.atomic_file import atomic_file

__all__ = [
    "FIRST_OPSET",
    "check_functions",
    "check_sizes",
    "graphs_in",
    "read",
    "tensors_of",
    "write",
]

FIRST_OPSET = 7

_TWO_GIGABYTES = 2**31 - 2**20
_MAX_NODES = 10**6


def read(path: Path) -> tuple[onnx.ModelProto, set[Path]]:
    """Return the model in the file `path` with its weights, and its data files."""
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise FoldError(
            f"{path} is not an ONNX model ({error}); export it again"
        ) from error
    folder = path.parent.resolve()
    asked = 0
    held: dict[Path, int] = {}
    for tensor in _all_tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        file, length = _external(tensor, folder)
        asked += length
        held[file] = file.stat().st_size
        if asked > 4 * sum(held.values()) + _TWO_GIGABYTES:
            raise FoldError(
                f"{path} reads its data files more than 4 times over; "
                "save it with each tensor stored once"
            )
    external_data_helper.load_external_data_for_model(model, str(folder))
    return model, set(held)


def check_functions(model: onnx.ModelProto) -> None:
    """Raise `FoldError` if the model's functions expand to too many nodes."""
    bodies = {(f.domain, f.name, f.overload): list(f.node) for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], within: tuple[Any, ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in within:
                raise FoldError(f"function '{node.op_type}' calls itself; inline it")
            if key in bodies and key not in sizes:
                sizes[key] = size(bodies[key], (*within, key))
            total += sizes.get(key, 1)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    total += size(graph.node, within)
        if total > _MAX_NODES:
            raise FoldError(
                f"the functions of the model expand to more than {_MAX_NODES} nodes; "
                "export it without functions that call others many times"
            )
        return total

    size(model.graph.node, ())


def check_sizes(model: onnx.ModelProto) -> None:
    """Raise `FoldError` for a tensor whose bytes do not fit its shape."""
    for tensor in _all_tensors(model):
        bits = _BITS.get(tensor.data_type)
        if bits is None or not tensor.HasField("raw_data"):
            continue
        expected = -(-math.prod(tensor.dims) * bits // 8)
        if len(tensor.raw_data) != expected:
            raise FoldError(
                f"tensor '{tensor.name}' of shape {tuple(tensor.dims)} needs "
                f"{expected} bytes, got {len(tensor.raw_data)}; the file is damaged"
            )


def write(model: onnx.ModelProto, path: Path, sources: set[Path]) -> None:
    """Write `model`; the old file stays until the new one is complete and checked.

    Args:
        model: The model.
        path: Its file; a link stays a link.
        sources: The data files of the model that was read. If there are any, or if
            the model is too large for one file, its weights get a file of their own.

    Raises:
        FoldError: `path` is a data file, of the model that was read or of another one
            beside it.
    """
    target = path.resolve()
    users = _users(target) if target.exists() else []
    if target in sources or users:
        reader = users[0].name if users else "the model given"
        raise FoldError(
            f"{path} holds weights that {reader} reads; write to another file"
        )
    if not sources and model.ByteSize() <= _TWO_GIGABYTES:
        onnx.checker.check_model(model)
        with atomic_file(path) as file:
            file.write(model.SerializeToString())
        return
    data = target.with_name(f"{target.name}.data")
    number = count(2)
    while os.path.lexists(data):
        data = target.with_name(f"{target.name}.{next(number)}.data")
    replaced = _data_files(target) - sources
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        onnx.save_model(
            copy,
            str(made),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=data.name,
        )
        onnx.checker.check_model(str(made))
        if (made.parent / data.name).exists():
            (made.parent / data.name).replace(data)
        with atomic_file(target) as file:
            file.write(made.read_bytes())
    for old in replaced:
        # Weights that this function wrote for the file that it has just replaced.
        is_own = old.parent == target.parent and old.name.startswith(f"{target.name}.")
        if is_own and old.suffix == ".data" and not _users(old):
            old.unlink(missing_ok=True)


def _users(data: Path) -> list[Path]:
    """Return the models in the folder of `data` that read it."""
    models = sorted(data.parent.glob("*.onnx"))
    return [path for path in models if path != data and data in _data_files(path)]


def _data_files(path: Path) -> set[Path]:
    """Return the files that the model in `path` reads; none if there is no model."""
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (OSError, DecodeError, ValueError):
        return set()
    locations = {
        entry.value
        for tensor in _all_tensors(model)
        for entry in tensor.external_data
        if entry.key == "location" and "\0" not in entry.value
    }
    return {(path.parent / location).resolve() for location in locations}


def graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield `graph` and every graph inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner_graphs = [attribute.g] if attribute.HasField("g") else []
            for inner in (*inner_graphs, *attribute.graphs):
                yield from graphs_in(inner)


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Yield every tensor in `graph` and the graphs inside it."""
    for inner in graphs_in(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from tensors_of(model.graph)
    for function in model.functions:
        for node in function.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def _external(tensor: TensorProto, folder: Path) -> tuple[Path, int]:
    """Return the file of an external tensor and the number of bytes it reads there."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    location = told.get("location", "")
    if "\0" in location:
        raise FoldError(
            f"tensor '{tensor.name}' names a data file with a NUL in it, {location!r}; "
            "the file is damaged"
        )
    file = (folder / location).resolve()
    inside = file.is_relative_to(folder) and not os.path.isabs(location)
    if not location or not inside or ".." in Path(location).parts:
        raise FoldError(
            f"tensor '{tensor.name}' is stored in '{location}', outside the model's "
            "folder; a model may only name files beside it"
        )
    if not file.is_file():
        raise FoldError(
            f"tensor '{tensor.name}' is stored in '{location}', which is not a file "
            "beside the model; copy the data file there"
        )
    bits = _BITS.get(tensor.data_type, 8)
    expected = -(-math.prod(tensor.dims) * bits // 8)
    try:
        offset = int(told.get("offset", 0) or 0)
        length = int(told.get("length", expected) or expected)
    except ValueError:
        offset = length = -1
    if length != expected or offset < 0 or offset + length > file.stat().st_size:
        raise FoldError(
            f"tensor '{tensor.name}' of shape {tuple(tensor.dims)} needs {expected} "
            f"bytes; its entry reads {length} at {offset} of '{location}', which "
            f"holds {file.stat().st_size}; the file is damaged"
        )
    return file, length


_BITS: dict[int, int] = {
    TensorProto.DOUBLE: 64,
    TensorProto.INT64: 64,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.FLOAT: 32,
    TensorProto.INT32: 32,
    TensorProto.UINT32: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT16: 16,
    TensorProto.UINT16: 16,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.BOOL: 8,
}
