"""Imports point strictly down and in no circle, and the front door is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "normkit"
# A package of its own, so that help does not wait for torch.
COMMANDS = SOURCE.with_name("normkit_cli")

LEVELS = {
    "errors": 1,
    "version": 1,
    "progress": 1,
    "results": 1,
    "torch_state": 1,
    "masks": 1.5,
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
    "audit": 6.5,
    "environment": 7,
    "init": 7,
    "convert": 7,
    # What a user calls; the floors above call it as a user would.
    "normkit": 7.5,
    "demo": 8,
    "studies": 8,
    "bench": 8,
    "integrations": 8,
    "normkit_cli": 9,
    "cli": 10,  # its older name
    "__main__": 10,  # python -m normkit
}
FRONT_DOOR = "normkit"
# Affine.standardize takes Moments: the one arrow between two rooms of one floor.
SAME_FLOOR = {("affine", "moments")}

FILES = [
    *sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"),
    *sorted(COMMANDS.rglob("*.py")),
]


def room_of(path: Path) -> str:
    if path.is_relative_to(COMMANDS):
        return COMMANDS.name
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE.parent)).removeprefix("normkit/")


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
            if parts[0] == COMMANDS.name:
                rooms.add(COMMANDS.name)
            elif parts[0] == "normkit":
                is_room = len(parts) > 1 and parts[1] in LEVELS
                rooms.add(parts[1] if is_room else FRONT_DOOR)
    return rooms


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    room = room_of(path)
    assert room in LEVELS, f"{room} has no floor yet: give it one in LEVELS"
    for other in imported_rooms(path) - {room}:
        below = LEVELS[other] < LEVELS[room]
        assert below or (room, other) in SAME_FLOOR, f"{room} must not import {other}"


def imported_files(path: Path, source: Path) -> set[Path]:
    """The files that `path` names, in functions and under TYPE_CHECKING too."""

    def file_of(module: str) -> Path | None:
        base = source.parent.joinpath(*module.split("."))
        found = [
            f for f in (base.with_suffix(".py"), base / "__init__.py") if f.exists()
        ]
        return found[0] if found else None

    files: set[Path | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            files |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            parts = {a.name: file_of(f"{module}.{a.name}") for a in node.names}
            files |= {file or file_of(module) for file in parts.values()}
    found = {file for file in files if file is not None and file != path}
    return {file for file in found if file.is_relative_to(source)}


def circles(source: Path) -> list[list[str]]:
    """The groups of files that import each other, by paths under `source`."""
    imports = {path: imported_files(path, source) for path in source.rglob("*.py")}
    reached: dict[Path, set[Path]] = {}
    for start in imports:
        seen, todo = set(), [start]
        while todo:
            for file in imports[todo.pop()] - seen:
                seen.add(file)
                todo.append(file)
        reached[start] = seen
    groups = {
        tuple(sorted(str(o.relative_to(source)) for o in seen if file in reached[o]))
        for file, seen in reached.items()
        if file in seen
    }
    return [list(group) for group in sorted(groups)]


def test_no_files_import_each_other() -> None:
    found = circles(SOURCE) + circles(COMMANDS)
    assert not found, f"these files import each other: {found}"


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    source = tmp_path / "planted"
    source.mkdir()
    for name, text in {
        "__init__": "from planted import a\n",
        "a": "import planted.b\n",
        "b": "def late():\n    from planted.c import x\n",
        "c": "if TYPE_CHECKING:\n    from planted import a\n",
        "d": "from planted.a import y\n",
    }.items():
        (source / f"{name}.py").write_text(text)
    assert circles(source) == [["a.py", "b.py", "c.py"]]


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("onnx", {"fold/onnx.py", "fold/onnx", "bench/peers/onnx_runtime.py"}),
        ("jinja2", {"report/page.py"}),
        ("triton", {"kernels/gpu.py", "kernels/gpu"}),
        ("typer", {"normkit_cli"}),
        ("lightning", {"integrations/lightning.py", "integrations/lightning_sync.py"}),
        ("transformers", {"integrations/transformers.py"}),
        ("ultralytics", {"integrations/ultralytics.py"}),
        ("wandb", {"integrations/wandb.py"}),
        ("mlflow", {"integrations/mlflow.py"}),
    ],
)
def test_a_heavy_package_has_one_owner(package: str, owners: set[str]) -> None:
    for path in FILES:
        relative = name_of(path)
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
        "'typer', 'rich', 'lightning', 'transformers'} & set(sys.modules); "
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_no_drawers() -> None:
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [p for p in FILES if p.name in drawers]


# Private names of torch outside `torch_state.py`: a new version may move each of them.
PRIVATE = {
    "torch._ops.OpOverload",
    "torch.distributed._functional_collectives",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._LazyNormBase",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.instancenorm._InstanceNorm",
    "torch.ops.aten._unsafe_view",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
}


def private_names(source: str) -> set[str]:
    """Return the private names of torch that a program reads, with their modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module
            is_private = any(is_own(part) for part in module.split("."))
            names = [module if is_private else f"{module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            root, *rest = name.split(".")
            is_path = all(part.isidentifier() for part in rest)
            if root == "torch" and is_path and any(is_own(part) for part in rest):
                found.add(name)
    # `torch._ops` is a part of `torch._ops.OpOverload`.
    return {n for n in found if not any(m.startswith(n + ".") for m in found)}


def is_own(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def test_private_names_of_torch_stand_in_one_file_but_for_these() -> None:
    assert private_names("import torch\nx = torch._C._tracer()\ntorch.nn.__name__") == {
        "torch._C._tracer"
    }
    found = {
        name
        for path in FILES
        if path.name != "torch_state.py"
        for name in private_names(path.read_text())
    }
    assert found == PRIVATE
