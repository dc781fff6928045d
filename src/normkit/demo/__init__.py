"""The whole life cycle on real digits: train, watch, break, repair, fold.

    result = run_demo(seed=0)
    print(result.to_text())
    result.write("normkit-demo")

Each step uses the public library and returns its measurements and checks: `training`,
`watching`, `repair`, `folding`. `page` makes the report. No shown number is fixed in
advance.
"""

from normkit.demo.check import Check
from normkit.demo.result import DemoResult
from normkit.demo.run import run_demo

__all__ = ["Check", "DemoResult", "run_demo"]
