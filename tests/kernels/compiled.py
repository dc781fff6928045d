"""Compile the GPU kernels ahead of time, for the launches that real shapes make.

Run in a process of its own, without a GPU: the host code runs on meta tensors, every
launch is caught before it starts and compiled for the architectures asked for. What
`ptxas` and the machine code say about it is printed as JSON.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normkit.kernels.gpu import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Caught(list):
    """The launches of the host code that runs within the block."""

    def __enter__(self):
        self._submit = launch.submit
        launch.submit = lambda kernel, grid, num_warps, **arguments: self.append(
            (kernel, grid, num_warps, arguments)
        )
        return self

    def __exit__(self, *error) -> None:
        launch.submit = self._submit


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


def figures(kernel, grid, num_warps, arguments, architecture: int) -> dict:
    """Registers, spills, and the widths of global loads and stores of one launch."""
    compiled = triton.compile(
        source(kernel, arguments),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
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
        "warps": num_warps,
        "tile": [arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]],
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "local_bytes": int(re.search(r"LOCAL:(\d+)", usage).group(1))
        + int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": widths(code, "LDG"),
        "stores": widths(code, "STG"),
    }


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
