"""`python -m fuzz`: see `fuzz.campaign`."""

import argparse
import os
import random
import sys

import torch

from fuzz.campaign import HUNTS, hunt, run_case

# Layers have the most to go wrong; an ONNX file takes the longest.
SHARES = {
    "layers": 4,
    "others": 1,
    "fold": 1.5,
    "convert": 2,
    "onnx": 1.5,
    "checkpoints": 1,
}


def main() -> int:
    """Hunt; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("name", nargs="?", choices=[*HUNTS, "all"], default="all")
    parser.add_argument("case", nargs="?", help="a case that a failure printed")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="random by default")
    parser.add_argument("--failures", type=int, default=5, help="stop after so many")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.case:
        run_case(given.name, given.case)
        print("the case passes")
        return 0
    first = random.randrange(10**6) if given.seed is None else given.seed
    names = list(HUNTS) if given.name == "all" else [given.name]
    whole = sum(SHARES[name] for name in names)
    found = 0
    for name in names:
        seconds = given.seconds * SHARES[name] / whole
        print(f"{name}: {seconds:.0f} s from seed {first}", flush=True)
        outcome = hunt(
            name, seconds=seconds, first_seed=first, most_failures=given.failures
        )
        print(outcome.to_text(), flush=True)
        found += len(outcome.failures)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
