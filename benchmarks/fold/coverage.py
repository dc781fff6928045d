"""Fold every architecture of the zoo, check it independently, and count.

    python benchmarks/fold/coverage.py run results.jsonl [NAME ...]
    python benchmarks/fold/coverage.py positive results.jsonl [NAME ...]
    python benchmarks/fold/coverage.py table RESULTS FAMILIES COST > PAGE

`run` measures each model whose line was not made by the present code (`code`:
`fold_digest.py`), those that keep a batch norm first, and writes a line as soon as it
is measured, so it can be stopped and started again.
`positive` measures once more, without negative weights, those that keep a batch norm.
Each model runs on one thread in a process of its own, with a limit of processor time.
`families.py` and `cost.py` make the other two records; PAGE is docs/fold_coverage.md.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fold_digest import digest
from zoo import case, cases, prepare_torchvision, randomise

# Of processor time; the wall clock, which other work stretches, gets ten times that.
_LIMIT_SECONDS = 900

# Forked, so that the libraries load once.
_FORK = multiprocessing.get_context("fork")


def measure(name: str, negative: float = 0.03) -> dict[str, Any]:
    """Fold the model `name` and compare it in float64 on an input of our own."""
    from normkit.fold import fold
    from normkit.fold.equivalence import difference
    from normkit.fold.torch.float64 import InFloat64, to_float64, widen
    from normkit.modeling.pytree import map_tensors
    from normkit.modeling.snapshot import preserved_random

    chosen = case(name)
    record: dict[str, Any] = {"name": name, "code": digest()}
    torch.manual_seed(0)
    try:
        model = chosen.build().eval()
    except Exception as error:
        return record | {"failed": f"build: {type(error).__name__}: {error}"[:300]}
    randomise(model, negative=negative)
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
    started = time.process_time()
    try:
        folded, ledger = fold(model, given)
    except Exception as error:
        return record | {"failed": f"fold: {type(error).__name__}: {error}"[:300]}
    record["cpu_seconds"] = round(time.process_time() - started, 2)
    torch.manual_seed(7)
    fresh = map_tensors(
        given, lambda t: torch.randn_like(t.double()) if t.is_floating_point() else t
    )
    answers = []
    for each in (model, folded):
        with InFloat64(), preserved_random(each, seed=0):
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
    """Measure the models that the present code has not measured, or those named."""
    _prepare()
    known = {record["name"]: record for record in _records(path)}
    if not names:
        stale = [
            each.name
            for each in cases()
            if known.get(each.name, {}).get("code") != digest()
        ]
        names = sorted(stale, key=lambda name: not known.get(name, {}).get("left"))
    for name in names:
        _write(path, _apart(name))


def run_positive(path: Path, names: list[str]) -> None:
    """Add to each record with a batch norm left what goes without negative weights."""
    _prepare()
    for record in _records(path):
        wanted = (
            record["name"] in names if names else "folded_if_positive" not in record
        )
        if not wanted or not record.get("left"):
            continue
        found = _apart(record["name"], 0.0)
        count = found.get("folded") if found.get("difference", 1.0) < 1e-6 else None
        _write(path, record | {"folded_if_positive": count})


def _prepare() -> None:
    """Import what each child process needs, once."""
    prepare_torchvision()
    import timm  # noqa: F401

    import normkit.fold  # noqa: F401

    torch.set_num_threads(1)
    digest()


def _write(path: Path, record: dict[str, Any]) -> None:
    """Put `record` in the place of the line of the same model."""
    records = {each["name"]: each for each in _records(path)}
    records[record["name"]] = record
    lines = [json.dumps(each) + "\n" for each in records.values()]
    beside = path.with_suffix(".new")
    beside.write_text("".join(lines))
    beside.replace(path)
    shown = {key: record.get(key) for key in ("folded", "norms", "difference")}
    print(record["name"], record.get("failed", shown), flush=True)


def _apart(name: str, negative: float = 0.03) -> dict[str, Any]:
    """Run `measure` in a process of its own, with a limit of processor time."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_SECONDS, _LIMIT_SECONDS + 9))
        theirs.send(measure(name, negative))

    worker = _FORK.Process(target=work, daemon=True)
    worker.start()
    theirs.close()
    failed = {"name": name, "code": digest()}
    late = failed | {"failed": f"took over {_LIMIT_SECONDS} s of processor time"}
    try:
        return ours.recv() if ours.poll(10 * _LIMIT_SECONDS) else late
    except EOFError:
        worker.join()
        was_late = worker.exitcode == -signal.SIGXCPU
        return late if was_late else failed | {"failed": "crash"}
    finally:
        worker.kill()
        worker.join()


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return list({record["name"]: record for record in records}.values())


# Their batch norms come before an activation with several readers, or after one.
_HARD = ("densenet", "dpn", "convmixer")

# They normalize a residual stream, or what a gate made, before an activation.
_BEFORE = ("resnetv2", "regnetv", "xception41p", "coatnet")


_PROOFS = """\
## What no exact fold can remove

Counted are the batch norms left outside densenet, dpn and convmixer, and each group
has its proof. f is the activation behind, s and t are the scale and shift of the
batch norm.

- **Before silu, upon a stream** (regnetv, coatnet): silu(s·x + t) is c·silu(x + a)
  for no constants unless s = 1, so the stored tensor must be s·x + t itself. An
  identity shortcut hands on the same tensor, which has one scale: one batch norm per
  stream goes, the next has another s. In regnetv the shortcut starts behind the silu,
  where no weight can give it even one.
- **Before silu, behind squeeze-and-excitation** (regnetv): the gate makes g·u, where
  s moves into u, and t would have to be g·(t/g): no weight knows g. A sum stays.
- **Before relu, upon a stream, with signs that differ** (resnetv2, xception41p): two
  batch norms of one channel need relu(x + a) and relu(−x + b), and no stored α·x + β
  gives both. Without negative weights they go. Before max pooling the same: −x is not
  carried by it. A channel stored twice, as x and as −x, or relu(−z) = relu(z) − z
  would be exact, but takes wider tensors or more operations than the norm has: a fold
  keeps both.
- **After local attention** (halonet): the windows are padded with zeros that the
  softmax counts, so its weights on real values do not sum to 1 at the border. A sum
  stays.
- **After a lambda layer**: its output is Σₖ qₖ·λₖᵥ per head and value channel; scales
  of q and λ reach products a(head)·b(channel) alone, and s has no such form.
- **Along dimensions that a weight shares or mixes** (patchtsmixer, clap): the map
  changes from row to row, and one weight serves, or sums over, all rows.
- **Between a layer norm and a padded convolution** (hubert): the layer norm measures
  the sum that the batch norm reads, the padding takes no shift. A sum stays.

In densenet and dpn a channel is concatenated once and normalized by every later layer
with another t/s before a relu: relu(x + a) and relu(x + b) of one stored tensor, a ≠
b. In convmixer the batch norm stands between an activation and zero padding."""


def page(records: list[dict[str, Any]]) -> str:
    """Return the table for the docs."""
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
        f"Without negative weights {_positive(easy)} of the {_left(easy)} left in the",
        "second row go, too: those that normalize a residual stream before a relu. The",
        "others stay for the reasons below, so that no more can go from these models",
        f"{_bound(easy)}.",
        "The last row was drawn up after it was seen which models keep some.",
        "",
        _states(records),
        "",
        *_PROOFS.splitlines(),
        "",
        "## Where some stay",
        "",
        "| model | gone | without negative weights | the first that stays, and why |",
        "| --- | --: | --: | --- |",
    ]
    for record in sorted(ran, key=lambda r: r["name"]):
        if record["left"]:
            name, _, reason = record["left"][0]
            positive = record.get("folded_if_positive")
            cells = (
                record["name"],
                f"{record['folded']} of {record['norms']}",
                "not measured" if positive is None else str(positive),
                f"`{name}`: {reason}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Not measured", "", "| model | why |", "| --- | --- |"]
    for record in sorted(failed, key=lambda r: r["name"]):
        why = " ".join(record["failed"].replace("|", "/").split())
        lines.append(f"| {record['name']} | {why[:120]} |")
    return "\n".join([*lines, ""])


def _states(records: list[dict[str, Any]]) -> str:
    """Return which code measured how many of the models."""
    counts = Counter(record.get("code", "older code") for record in records)
    parts = [f"{count} by {code}" for code, count in counts.most_common()]
    return (
        f"Measured: {', '.join(parts)}. The code is a\n"
        "digest of the syntax trees, without docstrings and comments, of all modules\n"
        "that a fold of a torch model runs; `python benchmarks/fold/fold_digest.py`\n"
        "prints that of the present code."
    )


def _left(records: list[dict[str, Any]]) -> int:
    return sum(record["norms"] - record["folded"] for record in records)


def _positive(records: list[dict[str, Any]]) -> int:
    """How many more go without negative weights, where that was measured."""
    return sum(
        record["folded_if_positive"] - record["folded"]
        for record in records
        if record.get("folded_if_positive") is not None
    )


def _bound(records: list[dict[str, Any]]) -> str:
    """Return the share that goes if all that signs keep goes, too."""
    norms = sum(record["norms"] for record in records)
    gone = sum(record["folded"] for record in records) + _positive(records)
    unknown = [
        record["name"]
        for record in records
        if record["left"] and record.get("folded_if_positive") is None
    ]
    if unknown:
        return f"(not measured: {', '.join(sorted(unknown))})"
    return f"than {100 * gone / norms:.2f} %, whatever the signs"


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
    elif what == "positive":
        run_positive(Path(rest[0]), rest[1:])
    elif what == "table":
        import cost
        import families

        parts = [
            page(_records(Path(rest[0]))),
            families.section(_records(Path(rest[1]))),
            cost.section(Path(rest[2])),
        ]
        print("\n".join(parts))
