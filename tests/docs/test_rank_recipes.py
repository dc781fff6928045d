"""The recipes of the guide run, each by torchrun on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "ranks.md"
_BLOCK = r"```python\n# (\w+)\.py: torchrun [^\n]*\n(.*?)```"
RECIPES: dict[str, str] = dict(re.findall(_BLOCK, PAGE.read_text(), re.DOTALL))


PACKAGES = ("accelerate", "timm", "lightning")


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node 2 …` in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return subprocess.run(
        [*launcher, "--nproc-per-node", "2", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_guide_has_recipes() -> None:
    plain = {"ddp", "fsdp", "tensor_parallel", "nodes", "titan", "pipeline", "ghosts"}
    assert set(RECIPES) == {*plain, *(f"with_{package}" for package in PACKAGES)}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_runs(tmp_path: Path, name: str) -> None:
    kind, _, package = name.partition("_")
    if kind == "with" and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    (tmp_path / f"{name}.py").write_text(RECIPES[name])
    done = torchrun(tmp_path, f"{name}.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ok" in done.stdout
