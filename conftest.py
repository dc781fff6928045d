"""What pytest must not import while it looks for doctests."""

import importlib.util

# Before pytest imports a module by its path: it would then put the module `fold` where
# the package has its function of that name.
import normkit  # noqa: F401

# Importing `interpreted` turns the whole process over to Triton's interpreter, and
# `compiled` holds programs for a process without it: each is for a process of its own.
collect_ignore_glob = ["tests/kernels/interpreted.py", "tests/kernels/compiled.py"]
collect_ignore_glob += [
    f"src/normkit/integrations/{package}*.py"
    for package in ("lightning", "transformers", "ultralytics", "wandb", "mlflow")
    if importlib.util.find_spec(package) is None
]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("src/normkit/kernels/gpu/*.py")
