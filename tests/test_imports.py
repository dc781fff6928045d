"""Imports point strictly down, and the front door is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "normkit"

LEVELS = {
    "errors": 1,
    "results": 1,
    "torch_state": 1,
    "batches": 2,
    "moments": 2,
    "affine": 2,
    "views": 2,
    "kernels": 3,
    "sync": 3,
    "functional": 4,
    "nn": 5,
    "modeling": 5.5,
    "report": 5.7,
    "calibrate": 6,
    "fold": 6,
    "doctor": 6,
    "environment": 7,
    "init": 7,
    "convert": 7,
    # What a user calls; the floors above call it as a user would.
    "normkit": 7.5,
    "demo": 8,
    "studies": 8,
    "bench": 8,
    "cli": 9,
}
FRONT_DOOR = "normkit"
# Affine.standardize takes Moments: the one arrow between two rooms of one floor.
SAME_FLOOR = {("affine", "moments")}

FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import on line {node.lineno}"
            module = node.module or ""
            names = [module]
            if module == "normkit":
                names = [f"normkit.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "normkit":
                is_room = len(parts) > 1 and parts[1] in LEVELS
                rooms.add(parts[1] if is_room else FRONT_DOOR)
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    room = room_of(path)
    assert room in LEVELS, f"{room} has no floor yet: give it one in LEVELS"
    for other in imported_rooms(path) - {room}:
        below = LEVELS[other] < LEVELS[room]
        assert below or (room, other) in SAME_FLOOR, f"{room} must not import {other}"


# Packages whose files form no circle of imports, lazy imports included.
ACYCLIC = ("report", "doctor", "demo")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of normkit that a file imports, lazy imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # `from package import name` imports a module, or a value of `package`.
            for alias in node.names:
                is_module = f"{module}.{alias.name}" in MODULES
                names.add(f"{module}.{alias.name}" if is_module else module)
    return names


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for m in sorted(imports) if (found := visit(m, []))), [])


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_imports_go_in_circles() -> None:
    imports = {
        module_of(path): imported_modules(path)
        for path in FILES
        if room_of(path) in ACYCLIC
    }
    graph = {m: (found & imports.keys()) - {m} for m, found in imports.items()}
    assert not circle_in(graph)


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("onnx", {"fold/onnx.py", "fold/onnx", "bench/peers/onnx_runtime.py"}),
        ("jinja2", {"report/page.py"}),
        ("triton", {"kernels/gpu.py", "kernels/gpu"}),
        ("typer", {"cli"}),
    ],
)
def test_a_heavy_package_has_one_owner(package: str, owners: set[str]) -> None:
    for path in FILES:
        relative = str(path.relative_to(SOURCE))
        if any(
            relative == owner or relative.startswith(owner + "/") for owner in owners
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = [n for n in names if n.split(".")[0] == package]
            assert not found, f"{relative} imports {package}: only {owners} may"


def test_the_front_door_loads_no_heavy_package() -> None:
    code = (
        "import sys, normkit; "
        "heavy = {'triton', 'onnx', 'onnxruntime', 'matplotlib', 'jinja2', 'sklearn', "
        "'typer', 'rich'} & set(sys.modules); "
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_no_drawers() -> None:
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [p for p in FILES if p.name in drawers]
