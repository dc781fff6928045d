"""Record of a run: one JSON file with the results, the verdicts and the machine.

Finished seeds are written one by one, so an interrupted run can be resumed.
Infinite and undefined numbers are the strings "inf", "-inf" and "nan", because JSON
has no others.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from normkit.modeling.atomic_file import atomic_file
from normkit.results import Result
from normkit.studies.interval import Interval
from normkit.studies.study import Study
from normkit.studies.verdict import Part, Verdict

__all__ = [
    "Record",
    "code_key",
    "environment",
    "is_current",
    "read_json",
    "run_key",
    "write_json",
]


@dataclass(frozen=True, repr=False)
class Record(Result):
    """One finished run of a study.

    Attributes:
        study: Id of the study.
        scale: `quick`, `cpu` or `gpu`.
        key: Digest of the inputs of the run; see `run_key`.
        code: Digest of the settings and the code alone; see `code_key`.
        settings: Settings of the scale.
        data: SHA-256 by name of data set.
        environment: Versions, processor, threads.
        seconds: Wall time of all seeds together.
        cpu_seconds: Processor time of them, the cost on a quiet core.
        verdicts: One per claim.
        results: Results of each seed.
    """

    study: str
    scale: str
    key: str
    code: str
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    environment: Mapping[str, Any]
    seconds: float
    cpu_seconds: float
    verdicts: tuple[Verdict, ...]
    results: list[dict[str, Any]]

    def to_text(self) -> str:
        """Return the verdict on each claim, with the numbers that it rests on."""
        lines = [
            f"{self.study}, scale {self.scale}: {len(self.verdicts)} claim"
            f"{'s' * (len(self.verdicts) != 1)}, "
            f"{len(self.results)} seeds, {self.seconds:.0f} s"
        ]
        for verdict in self.verdicts:
            lines.append(f"{verdict.claim}: {verdict.word}")
            lines += [f"    {_in_words(part)}" for part in verdict.parts]
        return "\n".join(lines)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row for each number of each verdict."""
        return [
            {
                "claim": verdict.claim,
                "verdict": verdict.word,
                "number": part.text,
                "measured": str(part.interval),
                "predicted": part.wanted,
                "alone": part.word,
            }
            for verdict in self.verdicts
            for part in verdict.parts
        ]

    def write(self, path: Path) -> None:
        """Write the record to `path` atomically."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record of `write`."""
        raw = read_json(path)
        raw["verdicts"] = tuple(
            Verdict(
                v["claim"],
                v["word"],
                tuple(
                    Part(**{**p, "interval": Interval(**p["interval"])})
                    for p in v["parts"]
                ),
                v["note"],
            )
            for v in raw["verdicts"]
        )
        return cls(**raw)


def _in_words(part: Part) -> str:
    predicted = f", predicted {part.wanted}: {part.word}" if part.wanted else ""
    return f"{part.text}: {part.interval}{predicted}"


# Incremented when the format of a record changes: old ones are not read.
_FORMAT = 3

# What every trial uses without measuring, and changes in which move no number.
_SILENT = ("figure", "verdict", "selection", "interval")


def is_current(path: Path, study: Study) -> bool:
    """Return whether the record at `path` comes from the present code of `study`."""
    raw = read_json(path)
    return "code" in raw and raw["code"] == code_key(study, raw["scale"])


def run_key(study: Study, scale: str, data: Path | None) -> str:
    """Return a digest of the inputs of a run: settings, code and data.

    A finished seed is only reused under the same key, so a changed study starts again.
    """
    files = sorted(path.name for path in data.iterdir()) if data else []
    return _digest([code_key(study, scale), files])


def code_key(study: Study, scale: str) -> str:
    """Return a digest of the settings and of the code that measures.

    That is the file of the study and those of this package that it imports. The rule
    and the figure do not count: they are applied to stored results. Nor do comments
    and docstrings.
    """
    settings = dict(study.scales[scale].settings)
    module = inspect.getmodule(study.measure)
    source = inspect.getsource(module or study.measure)
    found = {"": _measuring(source)}
    waiting = [source]
    while waiting:
        for name in _of_this_package(waiting.pop()):
            if name not in found:
                text = (Path(__file__).parent / f"{name}.py").read_text("utf-8")
                found[name] = _measuring(text)
                waiting.append(text)
    return _digest([_FORMAT, study.id, scale, settings, found])


def _of_this_package(source: str) -> list[str]:
    found = []
    for node in ast.parse(source).body:
        found += [name for name in _imported(node) if name not in _SILENT]
    return found


def _imported(node: ast.stmt) -> list[str]:
    """Return the files of this package that an import reads."""
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.module == "normkit.studies":  # its files, by `import …` from the package
        return [alias.name for alias in node.names]
    package, _, name = (node.module or "").rpartition(".")
    return [name] if package == "normkit.studies" else []


def _measuring(source: str) -> list[str]:
    body = _without_docstrings(source).body
    return [ast.unparse(node) for node in body if not is_afterwards(node)]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        is_worded = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if is_worded and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def is_afterwards(node: ast.stmt) -> bool:
    """Return whether this part of a study's file serves only its rule or its figure."""
    if isinstance(node, ast.FunctionDef):
        return node.name.lstrip("_").startswith(("evaluate", "draw"))
    imported = _imported(node)
    if imported:
        return set(imported) <= set(_SILENT)
    return isinstance(node, ast.Assign) and ast.unparse(node).startswith("STUDY")


def environment(device: str) -> dict[str, Any]:
    """Return the versions and hardware that a reader needs to repeat a run."""
    import normkit

    found: dict[str, Any] = {
        "normkit": normkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_per_trial": 1,
        "device": device,
    }
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_encode(value), allow_nan=False, indent=None)
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """Read a file of `write_json`."""
    return _decode(json.loads(path.read_text()))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, float):
        # Six digits: finer than any seed-to-seed spread, at a third of the size.
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
