"""Tables of a record of `normkit bench calls`.

One row for each layer, mode and number of threads, one column for each size. A ratio
below 0.95 is a loss and is marked ▼, in the tables as in a terminal. ~ marks a cell
that was only measured while other processes held a processor: its times are those of
the scheduler, and totals leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp, log

from normkit.bench.call_cases import FEW_SIZES, SIZES
from normkit.bench.call_cost import CallCost
from normkit.bench.calls import MODES, CallCell, Calls, threads_in_words

__all__ = ["LOSS", "Totals", "sentence", "to_markdown", "to_text", "totals"]

LOSS, GAIN = 0.95, 1.05
_SIZES_FROM_200K = tuple(SIZES)[tuple(SIZES).index("200k") :]


@dataclass(frozen=True)
class Totals:
    """A group of cells in numbers.

    Attributes:
        cells: Number of cells measured undisturbed.
        losses: Number below 0.95 of torch.
        gains: Number above 1.05.
        least: The cell with the least ratio; None without any.
        training: Geometric mean of the training cells from 200k values up; None
            without any.
        evaluation: The same of the eval cells.
    """

    cells: int
    losses: int
    gains: int
    least: CallCell | None
    training: float | None
    evaluation: float | None


def totals(cells: Sequence[CallCell]) -> Totals:
    """Count and average the undisturbed cells."""
    cells = [cell for cell in cells if not cell.is_disturbed]
    large = [cell for cell in cells if cell.case.size in _SIZES_FROM_200K]
    training, evaluation = (
        _mean([cell.ratio for cell in large if cell.mode == mode]) for mode in MODES
    )
    return Totals(
        len(cells),
        sum(cell.ratio < LOSS for cell in cells),
        sum(cell.ratio > GAIN for cell in cells),
        min(cells, key=lambda cell: cell.ratio, default=None),
        training,
        evaluation,
    )


def sentence(found: Calls) -> str:
    """Summarize all cells in one sentence."""
    whole = totals(found.cells)
    disturbed = len(found.cells) - whole.cells
    told = f" {disturbed} more (~) were only measured disturbed." if disturbed else ""
    if whole.least is None:
        return f"No cell was measured undisturbed.{told}"
    return (
        f"{whole.losses} of {whole.cells} cells are below {LOSS:g} of torch's speed, "
        f"{whole.gains} are above {GAIN:g}. The least ratio is "
        f"{whole.least.ratio:.2f}: {whole.least}. Geometric mean from 200k values up: "
        f"{_number(whole.training)} in training, {_number(whole.evaluation)} in eval."
        f"{told}"
    )


def to_markdown(found: Calls) -> str:
    """Return all tables: totals, ratios, microseconds, the cost of a call."""
    tables = (
        (
            f"torch ÷ ours, by number of values; ▼ is below {LOSS:g}:",
            _table(found, "plain", SIZES, _ratio),
        ),
        (
            "The same for calls that do more, and in other dtypes:",
            _table(found, "", FEW_SIZES, _ratio),
        ),
        (
            "µs that ours takes more than torch.nn / more than a clone of the input:",
            _table(found, "plain", SIZES, _micros),
        ),
        (
            "Cost of a call in µs, with nothing for a kernel to do and our own forced:",
            _cost_table(found.cost),
        ),
        (
            "Time of other libraries ÷ ours; ▼ is below "
            f"{LOSS:g}, where the other one is faster:",
            _peers_table(found),
        ),
    )
    told = [f"{head}\n\n{table}" for head, table in tables if table]
    if found.absent:
        told.append(f"Not installed, so not measured: {', '.join(found.absent)}.")
    return "\n\n".join([sentence(found), _totals_table(found), *told])


def to_text(found: Calls) -> str:
    """Return one line for each cell, then the cost of a call and the totals."""
    head = f"{'torch ÷ ours':56} {'ratio':>7} {'µs − torch':>11} {'− clone':>9}  passes"
    cells = [
        f"{cell!s:56} {_ratio(cell):>7} {cell.over('torch'):+11,.0f} "
        f"{cell.over('clone'):+9,.0f}  "
        + " ".join(f"{ratio:.2f}" for ratio in cell.ratios)
        for cell in found.cells
    ]
    cost = [
        f"{f'call cost, {entry.layer} {_shape(entry)}':56} µs beyond torch.nn: "
        f"forward {entry.over_forward:+.1f}, with backward {entry.over_step:+.1f}"
        for entry in found.cost
    ]
    peers = [
        f"{f'{name}: {cell}':70} ÷ ours {_told(cell, name)}"
        for cell in found.peers
        for name in _peers_of(cell)
    ]
    peers += [f"{name} is not installed" for name in found.absent]
    return "\n".join([head, *cells, *cost, *peers, "", sentence(found)])


def _totals_table(found: Calls) -> str:
    rows = [
        f"| | cells | below {LOSS:g} | above {GAIN:g} | least | training, from 200k | "
        "eval, from 200k |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    groups: dict[tuple[int, str], list[CallCell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.threads, cell.case.form), []).append(cell)
    for (threads, form), cells in groups.items():
        part = totals(cells)
        least = part.least
        worst = "" if least is None else f"{least.ratio:.2f}: {_short(least)}"
        rows.append(
            f"| {form}, {threads_in_words(threads)} | {part.cells} | {part.losses} | "
            f"{part.gains} | {worst} | {_number(part.training)} | "
            f"{_number(part.evaluation)} |"
        )
    return "\n".join(rows)


def _table(
    found: Calls, form: str, sizes: Iterable[str], told: Callable[[CallCell], str]
) -> str:
    """Return the table of plain calls, or of all others when `form` is empty."""
    kept = {
        (cell.case.row, cell.mode, cell.threads, cell.case.size): cell
        for cell in found.cells
        if (cell.case.form == "plain") == (form == "plain")
    }
    if not kept:
        return ""
    there = [size for size in sizes if any(key[3] == size for key in kept)]
    rows = [
        "| values | " + " | ".join(there) + " |",
        "| --- |" + " ---: |" * len(there),
    ]
    for name, mode, threads in dict.fromkeys(key[:3] for key in kept):
        cells = (kept.get((name, mode, threads, size)) for size in there)
        told_cells = " | ".join("" if cell is None else told(cell) for cell in cells)
        rows.append(f"| {name}, {mode}, {threads_in_words(threads)} | {told_cells} |")
    return "\n".join(rows)


def _cost_table(cost: Sequence[CallCost]) -> str:
    if not cost:
        return ""
    rows = [
        "| | torch.nn forward | ours − torch.nn | torch.nn forward and backward | "
        "ours − torch.nn |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows += [
        f"| {entry.layer} {_shape(entry)} | {entry.torch_forward:.1f} | "
        f"{entry.over_forward:+.1f} | {entry.torch_step:.1f} | "
        f"{entry.over_step:+.1f} |"
        for entry in cost
    ]
    return "\n".join(rows)


def _peers_table(found: Calls) -> str:
    sizes = list(dict.fromkeys(cell.case.size for cell in found.peers))
    told: dict[str, dict[str, str]] = {}
    for cell in found.peers:
        of = f"{cell.case.row}, {cell.mode}, {threads_in_words(cell.threads)}"
        for name in ("torch", *_peers_of(cell)):
            row = told.setdefault(f"{of}: {name}", {})
            row[cell.case.size] = _told(cell, name)
    if not told:
        return ""
    rows = [
        "| values | " + " | ".join(sizes) + " |",
        "| --- |" + " ---: |" * len(sizes),
    ]
    rows += [
        f"| {name} | " + " | ".join(row.get(size, "") for size in sizes) + " |"
        for name, row in told.items()
    ]
    return "\n".join(rows)


def _peers_of(cell: CallCell) -> list[str]:
    return [n for n in cell.passes[0] if n not in ("ours", "torch", "clone")]


def _mean(ratios: Sequence[float]) -> float | None:
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else None


def _number(mean: float | None) -> str:
    return "not measured" if mean is None else f"{mean:.2f}"


def _ratio(cell: CallCell) -> str:
    return _told(cell, "torch")


def _told(cell: CallCell, name: str) -> str:
    if cell.is_unknown(name):
        return "~"
    ratio = cell.time_of(name)
    return f"{ratio:.2f}" + ("▼" if ratio < LOSS else "")


def _short(cell: CallCell) -> str:
    return f"{cell.case.row}, {cell.case.size}, {cell.mode}"


def _micros(cell: CallCell) -> str:
    if cell.is_disturbed:
        return "~"
    return f"{cell.over('torch'):+,.0f} / {cell.over('clone'):+,.0f}"


def _shape(entry: CallCost) -> str:
    return "×".join(map(str, entry.shape))
