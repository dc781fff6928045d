"""Modules that need an optional package are not collected where it is missing."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob += [
        "src/normkit/kernels/gpu/*.py",
        "tests/kernels/compiled.py",
        "tests/kernels/interpreted.py",
    ]
