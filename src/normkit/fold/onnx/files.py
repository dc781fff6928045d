"""Reading and writing model files that may come from anywhere.

A file says where its weights lie and how large they are; neither is believed. A path
must stay inside the model's folder, links included, and every tensor must hold exactly
the bytes that its shape asks for, so a small file cannot ask for much memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper

from normkit.errors import FoldError

__all__ = ["FIRST_OPSET", "check_sizes", "graphs_in", "read", "tensors_of", "write"]

FIRST_OPSET = 7

_TWO_GIGABYTES = 2**31 - 2**20


def read(path: Path) -> onnx.ModelProto:
    """The model in the file `path`, its external weights included."""
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
    return model


def check_sizes(model: onnx.ModelProto) -> None:
    """Refuse tensors that hold other than their shape says."""
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


def write(model: onnx.ModelProto, path: Path, *, beside: bool) -> None:
    """Write `model`; its weights into a file `beside` it if asked or if they must."""
    beside = beside or model.ByteSize() > _TWO_GIGABYTES
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = path.with_name(path.name + ".data")
    if beside:
        data.unlink(missing_ok=True)  # onnx would append to it.
    onnx.save_model(
        copy,
        str(path),
        save_as_external_data=beside,
        all_tensors_to_one_file=True,
        location=data.name,
    )


def graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and every graph inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner_graphs = [attribute.g] if attribute.HasField("g") else []
            for inner in (*inner_graphs, *attribute.graphs):
                yield from graphs_in(inner)


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor in `graph` and the graphs inside it."""
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
    """The file of an external tensor and how many bytes it takes from there."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    location = told.get("location", "")
    file = (folder / location).resolve()
    inside = file.is_relative_to(folder) and not os.path.isabs(location)
    if not location or not inside or ".." in Path(location).parts:
        raise FoldError(
            f"tensor '{tensor.name}' lies at '{location}', outside the model's folder; "
            "a model may only point to files beside it"
        )
    if not file.is_file():
        raise FoldError(
            f"tensor '{tensor.name}' lies in '{location}', which is not a file beside "
            "the model; copy the data file there"
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
            f"bytes and is told to read {length} at {offset} of '{location}', which "
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
