"""Tables of benchmarks/README.md, each from the newest record in its folder `results`.

The text between two marks is generated, and so is the figure of a record of calls;
explanations are written by hand outside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from normkit.bench.call_figure import draw
from normkit.bench.call_tables import sentence, to_markdown
from normkit.bench.calls import Calls
from normkit.bench.small import Small
from normkit.bench.speed import Speed
from normkit.bench.steps import Steps
from normkit.errors import ArgumentError

__all__ = ["CALLS", "SMALL", "SPEED", "STEPS", "Block", "figure", "renew"]

FIGURE = "calls.svg"


@dataclass(frozen=True)
class Block:
    """Tables of one kind of record.

    Attributes:
        name: Name in the marks, after `normkit bench`.
        records: Pattern of the record files in `results`.
        writer: Command that writes one.
        kind: Class that reads it and makes the tables.
    """

    name: str
    records: str
    writer: str
    kind: type[Speed] | type[Small] | type[Calls] | type[Steps]

    @property
    def begin(self) -> str:
        """The opening mark."""
        return f"<!-- begin: normkit bench {self.name} -->"

    @property
    def end(self) -> str:
        """The closing mark."""
        return f"<!-- end: normkit bench {self.name} -->"

    def newest(self, results: Path) -> Path:
        """Return the newest record: names begin with a date.

        Raises:
            ArgumentError: There is none.
        """
        records = sorted(results.glob(self.records))
        if not records:
            raise ArgumentError(
                f"{results} holds no record {self.records}; write one by "
                f"`{self.writer} {results}/DATE-{self.records.replace('*', '')[1:]}`"
            )
        return records[-1]

    def generated(self, record: Path) -> str:
        """Return the generated block, marks included."""
        found = self.kind.from_json(record.read_text(encoding="utf-8"))
        facts, threads = found.environment, [found.environment["threads"]]
        if isinstance(found, Calls | Steps):
            threads = list(found.threads)
        if isinstance(found, Calls):
            tables = f"{_image(found)}\n\n{to_markdown(found)}"
        else:
            tables = found.to_markdown()
        counted = " and ".join(map(str, threads))
        machine = (
            f"{facts['cpu']}, {counted} thread{'s' * (threads != [1])}, torch "
            f"{facts['torch']}, Python {facts['python']}. All numbers: "
            f"[{record.name}](results/{record.name})."
        )
        return f"{self.begin}\n\n{machine}\n\n{tables}\n\n{self.end}"


SPEED = Block("page", "*-cpu*.json", "normkit bench speed --json", Speed)
STEPS = Block("steps", "*-steps.json", "normkit bench steps --json", Steps)
SMALL = Block("small", "*-small.json", "normkit bench small --json", Small)
CALLS = Block("calls", "*-calls.json", "normkit bench calls --json", Calls)


def renew(page: Path, record: Path | None = None) -> str:
    """Return the page with its tables generated anew.

    Args:
        page: A Markdown page with the marks of one kind of table or more.
        record: A file of `normkit bench speed --json`, `steps`, `small` or `calls`;
            only its tables are generated. By default the newest of each kind in the
            folder `results` next to the page.

    Raises:
        ArgumentError: No marks, or no record.
    """
    text = page.read_text(encoding="utf-8")
    blocks = (SPEED, STEPS, SMALL, CALLS) if record is None else (_block_of(record),)
    there = [b for b in blocks if b.begin in text and b.end in text]
    if not there:
        wanted = " nor ".join(f"'{b.begin}' with '{b.end}' after it" for b in blocks)
        raise ArgumentError(
            f"{page} has no line {wanted}; add both where the tables belong"
        )
    for block in there:
        path = block.newest(page.parent / "results") if record is None else record
        before, after = text.split(block.begin)[0], text.split(block.end)[1]
        text = before + block.generated(path) + after
    return text


def figure(page: Path, record: Path | None = None) -> tuple[Path, str] | None:
    """Return the path of the figure and the contents it should have.

    None if the record is not one of calls, or the page has no marks for one.
    """
    if record is None:
        if CALLS.begin not in page.read_text(encoding="utf-8"):
            return None
        record = CALLS.newest(page.parent / "results")
    elif _block_of(record) is not CALLS:
        return None
    found = Calls.from_json(record.read_text(encoding="utf-8"))
    return page.parent / FIGURE, draw(found)


def _image(found: Calls) -> str:
    told = sentence(found).replace('"', "&quot;")
    return (
        f'<img src="{FIGURE}" width="560" alt="Time of torch over that of normkit, by '
        f'number of values, one line for each layer. {told}">'
    )


def _block_of(record: Path) -> Block:
    data = json.loads(record.read_text("utf-8"))
    for key, block in (("small", SMALL), ("calls", CALLS), ("steps", STEPS)):
        if key in data:
            return block
    return SPEED
