"""Compile the GPU kernels ahead of time, for the launches that real shapes make.

    python -m kernels.compiled 90 batch-norm rows-4096

Run without a GPU and without the interpreter: the host code runs on meta tensors, every
launch is caught before it starts and compiled for the architecture. What the machine
code says about it is printed as JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launches import Caught
from normkit.kernels.gpu import launchers, layers
from normkit.kernels.gpu.geometry import Matrix, Runs
from normkit.kernels.spec import Running
from normkit.views import view_of

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def source(kernel, arguments) -> ASTSource:
    """The kernel as Triton's own launcher would specialize it on these arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


POINTERS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def figures(kernel, grid, options, arguments, architecture: int) -> dict:
    """Registers, spills, and the widths of global loads and stores of one launch."""
    compiled = triton.compile(
        source(kernel, arguments),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("nvdisasm", file.name)
    return {
        "kernel": kernel.__name__,
        "architecture": architecture,
        "grid": grid,
        "warps": options["num_warps"],
        "tile": [arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]],
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "local_bytes": int(re.search(r"LOCAL:(\d+)", usage).group(1))
        + int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "tickets": tickets(compiled.asm["ptx"]),
        "loads": widths(code, "LDG"),
        "stores": widths(code, "STG"),
    }


def tickets(ptx: str) -> list[str]:
    """What happens around each ticket, in order: stores, barriers, atomics, loads."""
    steps = re.findall(
        r"(st\.global|bar\.sync|atom\.global\S+|ld\.global)", ptx.replace(",", " ")
    )
    merged = [s for i, s in enumerate(steps) if i == 0 or steps[i - 1] != s]
    return [
        " ".join(merged[max(i - 2, 0) : i + 2])
        for i, step in enumerate(merged)
        if step.startswith("atom")
    ]


def widths(code: str, operation: str) -> dict[str, int]:
    """How many instructions there are of each width in bits."""
    found: dict[str, int] = {}
    for modifiers in re.findall(rf"\b{operation}\.(\S+)", code):
        parts = modifiers.split(".")
        width = next((p for p in ("128", "64") if p in parts), None)
        if width is None:
            width = next((p[1:] for p in parts if p in ("U8", "U16", "S16")), "32")
        found[width] = found.get(width, 0) + 1
    return found


def run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def batch_norm(
    channels: int,
    size: int,
    dtype=torch.bfloat16,
    last=True,
    activation="relu",
    add=True,
) -> None:
    """All four launches of a batch norm at batch 64, running statistics included."""
    x = meta(64, channels, size, size, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    geometry = layers.channels_of(view_of(x, (0, 2, 3)))
    vector, tracked = meta(channels), meta(dtype=torch.int64)
    y, found, bits = layers.channels_forward(
        *(x, geometry, vector, vector, x if add else None, 1e-5, activation, 0.01),
        running=Running(vector, vector, 0.1, tracked, tracked),
    )
    gate = launchers.Gate(activation, bits=bits, shift=vector)
    layers.channels_backward(
        *(y, x, geometry, vector, vector, found.mean, found.inv_std, found.scale),
        *(gate, (True, True, True, add)),
    )


def rows(
    width: int, dtype=torch.bfloat16, centered=True, runs: Runs | None = None
) -> None:
    """Both launches of a layer norm (or RMS norm) over 16384 rows."""
    x, matrix = meta(16384, width, dtype=dtype), Matrix(16384, width)
    weight = meta(width if runs is None else runs.groups * (width // runs.length))
    bias = weight if centered else None
    y, found = launchers.rows_forward(
        x, matrix, eps=1e-5, weight=weight, bias=bias, runs=runs, centered=centered
    )
    assert y is not None
    wanted = (True, True, centered)
    layers.rows_backward(
        *(y, x, matrix, weight, bias, found.mean, found.inv_std, runs, wanted),
        centered=centered,
    )


PLANS = {
    "batch-norm": lambda: batch_norm(256, 56),
    "batch-norm-plain": lambda: batch_norm(256, 56, activation="none", add=False),
    "batch-norm-gelu": lambda: batch_norm(256, 56, activation="gelu"),
    "batch-norm-few": lambda: batch_norm(64, 112, add=False),
    "batch-norm-many": lambda: batch_norm(2048, 7),
    "batch-norm-half": lambda: batch_norm(512, 28, torch.float16),
    "batch-norm-float": lambda: batch_norm(256, 56, torch.float32),
    "batch-norm-nchw": lambda: batch_norm(256, 56, last=False),
    "batch-norm-nchw-float": lambda: batch_norm(256, 28, torch.float32, last=False),
    "batch-norm-nchw-odd": lambda: batch_norm(512, 7, last=False),
    "rows-64": lambda: rows(64),
    "rows-1024": lambda: rows(1024),
    "rows-4096": lambda: rows(4096),
    "rows-4096-float": lambda: rows(4096, torch.float32),
    "rows-8192": lambda: rows(8192),
    "rows-8192-float": lambda: rows(8192, torch.float32),
    "rows-16384": lambda: rows(16384),
    "rms-4096": lambda: rows(4096, centered=False),
    "rms-16384": lambda: rows(16384, centered=False),
    "groups": lambda: rows(8 * 784, runs=Runs(784, 32)),
}


def main(architecture: str, *names: str) -> None:
    found = []
    for name in names or PLANS:
        with Caught() as launches:
            PLANS[name]()
        found += [{"plan": name, **figures(*c, int(architecture))} for c in launches]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
