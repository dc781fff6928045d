"""Environment report: versions, processor, kernels, optional packages.

Measurements depend on the machine, so the demo, the benchmarks and the studies store an
`Environment` with their results.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from normkit.kernels import explain
from normkit.version import __version__

__all__ = ["Environment", "environment"]

# Optional packages, and their purpose.
OPTIONAL = {
    "scikit-learn": "the demo's digits",
    "jinja2": "report pages",
    "matplotlib": "charts in report pages",
    "triton": "GPU kernels",
    "onnx": "folding ONNX models",
    "onnxruntime": "checking folded ONNX models",
}


@dataclass(frozen=True)
class Environment:
    """The machine and the versions, as plain values.

    Attributes:
        normkit: Version of normkit.
        python: Version of Python.
        torch: Version of torch.
        system: Operating system and machine type.
        cpu: The processor's name and the instruction set torch uses of it.
        cores: Logical processors that this process may use.
        threads: Number of torch's threads.
        devices: Names of the accelerators; empty when there are none.
        backends: Kernel backends in order of preference, each with its reasons
            against a batch norm of float32 images on the CPU; empty when it can.
        packages: Optional packages and their versions, None where not installed.
    """

    normkit: str
    python: str
    torch: str
    system: str
    cpu: str
    cores: int
    threads: int
    devices: tuple[str, ...]
    backends: dict[str, list[str]]
    packages: dict[str, str | None]

    def to_json(self) -> str:
        """Return plain data for JSON."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """Return one line per fact."""
        facts = {
            "normkit": self.normkit,
            "python": self.python,
            "torch": self.torch,
            "system": self.system,
            "processor": f"{self.cpu}, cores: {self.cores}, threads: {self.threads}",
            "accelerators": ", ".join(self.devices) or "none",
        }
        facts |= self.abilities()
        for name, reasons in self.backends.items():
            # A case on the CPU was asked about: what speaks against the GPU's kernels
            # there says nothing of this machine.
            if name != "gpu":
                facts[f"kernels: {name}"] = "; ".join(reasons) or "can run"
        for name, version in self.packages.items():
            facts[name] = version or f"not installed ({OPTIONAL[name]})"
        width = max(map(len, facts))
        return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())

    def abilities(self) -> dict[str, str]:
        """Return in words what can run here, and what a missing part needs."""
        against = self.backends.get("cpu", ["no such backend"])
        if against:
            on_cpu = f"torch operations; no compiled kernels: {'; '.join(against)}"
        else:
            on_cpu = "compiled kernels"
        if not any("MPS" not in name for name in self.devices):
            on_gpu = "nothing to run on: torch sees no CUDA or ROCm device"
        elif self.packages.get("triton") is None:
            on_gpu = "torch operations; pip install triton for kernels"
        else:
            on_gpu = "Triton kernels"
        return {
            "layers on a CPU": on_cpu,
            "layers on a GPU": on_gpu,
            "report pages": self._ability("report", "jinja2", "matplotlib"),
            "normkit demo": self._ability(
                "demo", "scikit-learn", "jinja2", "matplotlib"
            ),
            "ONNX files": self._ability("onnx", "onnx", "onnxruntime"),
        }

    def _ability(self, extra: str, *packages: str) -> str:
        missing = [name for name in packages if self.packages.get(name) is None]
        if not missing:
            return "yes"
        return f"no, without {', '.join(missing)}: pip install 'normkit[{extra}]'"


def environment() -> Environment:
    """Describe the machine that this process runs on.

    Example:
        >>> here = environment()
        >>> here.torch == torch.__version__, here.cores >= 1
        (True, True)
    """
    images = torch.empty(8, 4, 8, 8)
    return Environment(
        normkit=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        system=f"{platform.system()} {platform.machine()}",
        cpu=f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        devices=_accelerators(),
        backends=dict(explain(images).reasons),
        packages={name: _version(name) for name in OPTIONAL},
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerators() -> tuple[str, ...]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return tuple(torch.cuda.get_device_name(i) for i in range(count))
    if torch.backends.mps.is_available():
        return ("Apple GPU (MPS)",)
    return ()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
