"""The whole life cycle on real digits: train, watch, break, repair, fold.

    result = run_demo(seed=0)
    print(result.to_text())
    result.write("normkit-demo")

Each step is the public library used as anyone would use it, and each returns what it
measured with the checks that follow from it: `training`, `watching`, `repair`,
`folding`. `page` makes the report of them. Nothing shown was written down beforehand.
"""

from normkit.demo.result import Check, DemoResult
from normkit.demo.run import run_demo

__all__ = ["Check", "DemoResult", "run_demo"]
