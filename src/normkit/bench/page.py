"""The tables of benchmarks/README.md, from the newest record beside it.

What stands between the two marks is generated; reasons are written by hand outside.
"""

from __future__ import annotations

from pathlib import Path

from normkit.bench.speed import Speed
from normkit.errors import ArgumentError

__all__ = ["BEGIN", "END", "generated", "newest", "renew"]

BEGIN = "<!-- begin: normkit bench page -->"
END = "<!-- end: normkit bench page -->"


def newest(results: Path) -> Path:
    """The record of a CPU whose name, which begins with a date, is the last.

    Raises:
        ArgumentError: There is none.
    """
    records = sorted(results.glob("*-cpu*.json"))
    if not records:
        raise ArgumentError(
            f"{results} holds no record *-cpu*.json; write one by `normkit bench speed "
            f"--json {results}/DATE-cpu.json`"
        )
    return records[-1]


def generated(record: Path) -> str:
    """What belongs between the marks."""
    found = Speed.from_json(record.read_text(encoding="utf-8"))
    facts = found.environment
    threads = facts["threads"]
    machine = (
        f"{facts['cpu']}, {threads} thread{'s' * (threads != 1)}, torch "
        f"{facts['torch']}, Python {facts['python']}. All numbers: "
        f"[{record.name}](results/{record.name})."
    )
    return f"{BEGIN}\n\n{machine}\n\n{found.to_markdown()}\n\n{END}"


def renew(page: Path, record: Path | None = None) -> str:
    """The page with its tables from the record.

    Args:
        page: A Markdown page with the two marks.
        record: What `normkit bench speed --json` wrote; by default the newest in the
            folder `results` beside the page.

    Raises:
        ArgumentError: No marks, or no record.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ArgumentError(
            f"{page} has no line '{BEGIN}' with '{END}' after it; add both where the "
            "tables belong"
        )
    record = newest(page.parent / "results") if record is None else record
    return text.split(BEGIN)[0] + generated(record) + text.split(END)[1]
