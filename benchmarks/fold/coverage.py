"""Fold every architecture of the zoo, check it independently, and count.

    python benchmarks/fold/coverage.py run results.jsonl [NAME ...]
    python benchmarks/fold/coverage.py table results.jsonl > docs/fold_coverage.md

`run` appends one line per model and skips models that have one, so it can be stopped
and started again. Each model runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from zoo import case, cases, prepare_torchvision, randomise

_LIMIT_SECONDS = 150

# Forked, so that the libraries load once.
_FORK = multiprocessing.get_context("fork")


def measure(name: str) -> dict[str, Any]:
    """Fold the model `name` and compare it in float64 on an input of our own."""
    from normkit.fold import fold
    from normkit.fold.nest import map_tensors
    from normkit.fold.proof import InFloat64, difference, same_draws, to_float64, widen

    chosen = case(name)
    record: dict[str, Any] = {"name": name}
    torch.manual_seed(0)
    try:
        model = chosen.build().eval()
    except Exception as error:
        return record | {"failed": f"build: {type(error).__name__}: {error}"[:300]}
    randomise(model)
    # Folded in float64 too: rounding the new weights to float32 would hide the rest.
    model = to_float64(model)
    for given in chosen.inputs:
        given = map_tensors(given, widen)
        try:
            with InFloat64():
                _call(copy.deepcopy(model), given)
            break
        except Exception as error:
            why = f"run: {type(error).__name__}: {error}"[:300]
    else:
        return record | {"failed": why}
    started = time.perf_counter()
    try:
        folded, ledger = fold(model, given)
    except Exception as error:
        return record | {"failed": f"fold: {type(error).__name__}: {error}"[:300]}
    record["seconds"] = round(time.perf_counter() - started, 2)
    torch.manual_seed(7)
    fresh = map_tensors(
        given, lambda t: torch.randn_like(t.double()) if t.is_floating_point() else t
    )
    answers = []
    for each in (model, folded):
        with InFloat64(), same_draws(each):
            answers.append(_call(each, map_tensors(fresh, torch.clone)))
    ran = [e for e in ledger.entries if not e.reason.startswith("it did not run")]
    return record | {
        "norms": len(ran),
        "folded": sum(entry.folded for entry in ran),
        "not_run": len(ledger.entries) - len(ran),
        "difference": difference(*answers),
        "own_difference": ledger.max_difference,
        "left": [(e.name, e.kind, e.reason) for e in ran if not e.folded],
        "ways": Counter(_way(e.how) for e in ran if e.folded),
    }


def _way(how: str) -> str:
    parts = [part for part in ("before it", "beside it", "after it") if part in how]
    return " and ".join(part.split()[0] for part in parts) or "nothing to do"


@torch.no_grad()
def _call(model: torch.nn.Module, given: Any) -> Any:
    if isinstance(given, dict):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


def run(path: Path, names: list[str]) -> None:
    """Measure what has no line in `path` yet."""
    prepare_torchvision()
    import timm  # noqa: F401

    import normkit.fold  # noqa: F401

    done = {record["name"] for record in _records(path)}
    if not names:
        names = [each.name for each in cases()]
    for name in names:
        if name in done:
            continue
        record = _apart(name)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done.add(name)


def _apart(name: str) -> dict[str, Any]:
    """`measure` in a process of its own, with a time limit."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    worker = _FORK.Process(target=lambda: theirs.send(measure(name)), daemon=True)
    worker.start()
    theirs.close()
    try:
        if ours.poll(_LIMIT_SECONDS):
            return ours.recv()
        return {"name": name, "failed": f"took over {_LIMIT_SECONDS} s"}
    except EOFError:
        return {"name": name, "failed": "crash"}
    finally:
        worker.kill()
        worker.join()


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


# Their batch norms come before an activation with several readers, or after one.
_HARD = ("densenet", "dpn", "convmixer")

# They normalize a residual stream before an activation: with relu that folds where all
# weights along the stream have one sign, which 3 % of negative ones forbid.
_BEFORE = ("resnetv2", "regnetv", "xception41p", "coatnet")


def page(records: list[dict[str, Any]]) -> str:
    """The table for the docs."""
    ran = [r for r in records if "failed" not in r and r["norms"]]
    easy = [r for r in ran if not any(word in r["name"] for word in _HARD)]
    others = [r for r in easy if not any(word in r["name"] for word in _BEFORE)]
    failed = [r for r in records if "failed" in r]
    lines = [
        "<!-- Written by `python benchmarks/fold/coverage.py table`; do not edit. -->",
        "# How much of real architectures folds",
        "",
        "Random weights, random statistics, 3 % of the weights of batch norms",
        "negative; folded and compared in float64, on an input that the fold did not",
        "see. Counted are batch norms that run.",
        "",
        "| | models | batch norms | gone | share | reduced to a sum |",
        "| --- | --: | --: | --: | --: | --: |",
        _total("all", ran),
        _total(f"without {', '.join(_HARD)}", easy),
        _total(f"and without {', '.join(_BEFORE)}", others),
        "",
        f"Largest difference {max(r['difference'] for r in ran):.0e}. "
        f"Models that lose every batch norm: "
        f"{sum(r['norms'] == r['folded'] for r in ran)} of {len(ran)}.",
        "",
        "densenet, dpn and convmixer normalize what several layers made, or after an",
        "activation. resnetv2, regnetv, xception41p and coatnet normalize a residual",
        "stream before an activation: with relu that folds where all weights along the",
        "stream have one sign, which the negative ones forbid here; with silu, never.",
        "The last row was drawn up after it was seen which models keep some.",
        "",
        "## Where some stay",
        "",
        "| model | gone | the first that stays, and why |",
        "| --- | --: | --- |",
    ]
    for record in sorted(ran, key=lambda r: r["name"]):
        if record["left"]:
            name, _, reason = record["left"][0]
            cells = (record["name"], f"{record['folded']} of {record['norms']}")
            lines.append(f"| {cells[0]} | {cells[1]} | `{name}`: {reason} |")
    lines += ["", "## Not measured", "", "| model | why |", "| --- | --- |"]
    for record in sorted(failed, key=lambda r: r["name"]):
        why = " ".join(record["failed"].replace("|", "/").split())
        lines.append(f"| {record['name']} | {why[:120]} |")
    return "\n".join([*lines, ""])


def _total(name: str, records: list[dict[str, Any]]) -> str:
    norms = sum(r["norms"] for r in records)
    gone = sum(r["folded"] for r in records)
    reduced = sum(
        reason.startswith("a sum per channel")
        for r in records
        for *_, reason in r["left"]
    )
    share = f"{100 * gone / norms:.2f} %"
    return f"| {name} | {len(records)} | {norms:,} | {gone:,} | {share} | {reduced} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *rest = sys.argv[1:]
    if what == "one":
        print(json.dumps(measure(rest[0])))
    elif what == "run":
        run(Path(rest[0]), rest[1:])
    elif what == "table":
        print(page(_records(Path(rest[0]))))
