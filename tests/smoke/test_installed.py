"""What an installed package must do before anything else, with no extra installed.

Part of the suite; `make wheel` runs it against a wheel in an environment of its own,
with the kernels and without.
"""

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normkit
import oracles
from normkit.kernels.cpu.loading import library, why_absent

# What the extras bring; nothing else may be missing.
OF_EXTRAS = {
    *("jinja2", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    *("sklearn", "tensorboard", "triton"),
}
OF_INTEGRATIONS = {"lightning", "transformers", "ultralytics", "wandb", "mlflow"}


def kernels_expected() -> bool:
    """NORMKIT_EXPECT says it; a checkout has kernels where it has a compiler."""
    said = os.environ.get("NORMKIT_EXPECT")
    if said:
        return said == "kernels"
    return any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.mark.skipif(
    "NORMKIT_CPU_LIBRARY" in os.environ, reason="another library was asked for"
)
def test_the_kernels_are_there_where_a_compiler_was() -> None:
    assert (library() is not None) == kernels_expected(), why_absent()


def test_every_module_needs_an_extra_at_most() -> None:
    missing = {}
    for module in pkgutil.walk_packages(normkit.__path__, "normkit."):
        if module.name.endswith(("__main__", "._native")):
            continue
        package = module.name.removeprefix("normkit.integrations.").partition("_")[0]
        if package in OF_INTEGRATIONS:
            continue  # what these packages import is not ours; tests/integrations does
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            missing[module.name] = (error.name or str(error)).partition(".")[0]
    assert set(missing.values()) <= OF_EXTRAS, missing


def test_type_checkers_are_told_that_it_has_types() -> None:
    # An editable install has a second folder, for what was built.
    for name in ("py.typed", "report/page.html"):
        assert any((Path(where) / name).exists() for where in normkit.__path__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "nchw", "nhwc"])
def test_batch_norm_is_that_of_float64(layout: str, dtype: torch.dtype) -> None:
    shape = (33, 19) if layout == "rows" else (5, 19, 7, 9)
    x = (torch.randn(shape) + 100).to(dtype)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    layer = normkit.nn.BatchNorm1d(19) if layout == "rows" else None
    layer = layer or normkit.nn.BatchNorm2d(19, activation="relu")
    y = layer(x.requires_grad_())
    y64 = oracles.batch_norm(x.detach())
    if layout != "rows":
        y64 = y64.relu()
    rounding = torch.finfo(dtype).eps
    assert ((y - y64).abs() <= 2e-6 + rounding * y64.abs()).all()
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.isfinite().all()
    assert dx.stride() == x.stride()


def test_a_model_lives_from_its_first_weights_to_its_folded_form() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 36, 4)),
    )
    images, labels = torch.randn(64, 3, 8, 8) * 5 + 2, torch.randint(4, (64,))
    normkit.initialize(model, example_inputs=images)
    assert normkit.convert(model, to="normkit", example_inputs=images[:8]).to_text()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with normkit.watch(model, every=1) as watched:
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    assert {reading.id for reading in watched.readings()} >= {"D01", "D02", "D08"}
    normkit.calibrate(model, [images])
    model.eval()
    folded, ledger = normkit.fold(model, images)
    assert ledger.max_difference < 1e-12
    assert "BatchNorm" not in repr(folded)
    torch.testing.assert_close(folded(images), model(images), atol=1e-5, rtol=1e-5)


def test_the_command_runs() -> None:
    command = Path(sys.executable).with_name("normkit")
    for words in (["--version"], ["env"], ["fold", "--help"]):
        done = subprocess.run(
            [str(command), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_import_of_normkit_is_enough() -> None:
    names = ", ".join(f"normkit.{name}" for name in normkit.__all__)
    program = f"import normkit; {names}; normkit.batches.mixing"
    assert "normkit.batches" in names
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_absence_of_kernels_is_said_once() -> None:
    program = """if True:
        import torch, normkit
        layer = normkit.nn.BatchNorm1d(3)
        for _ in range(3):
            layer(torch.randn(5, 3))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NORMKIT_CPU_LIBRARY": ""}
        if not kernels_expected()
        else os.environ | {"NORMKIT_CPU_LIBRARY": "nowhere.so"},
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("no native CPU kernels: ")
    assert "the reference backend runs" in line
