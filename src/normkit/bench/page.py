"""The tables of benchmarks/README.md, each from the newest record beside the page.

What stands between two marks is generated; reasons are written by hand outside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from normkit.bench.small import Small
from normkit.bench.speed import Speed
from normkit.errors import ArgumentError

__all__ = ["SMALL", "SPEED", "Block", "renew"]


@dataclass(frozen=True)
class Block:
    """Tables of one kind of record.

    Attributes:
        name: Of the marks, after `normkit bench`.
        records: Which files in `results` are such records.
        writer: The command that writes one.
        kind: What reads it and makes the tables.
    """

    name: str
    records: str
    writer: str
    kind: type[Speed] | type[Small]

    @property
    def begin(self) -> str:
        """The mark above."""
        return f"<!-- begin: normkit bench {self.name} -->"

    @property
    def end(self) -> str:
        """The mark below."""
        return f"<!-- end: normkit bench {self.name} -->"

    def newest(self, results: Path) -> Path:
        """The record whose name, which begins with a date, is the last.

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
        """What belongs between the marks, marks included."""
        found = self.kind.from_json(record.read_text(encoding="utf-8"))
        facts = found.environment
        threads = facts["threads"]
        machine = (
            f"{facts['cpu']}, {threads} thread{'s' * (threads != 1)}, torch "
            f"{facts['torch']}, Python {facts['python']}. All numbers: "
            f"[{record.name}](results/{record.name})."
        )
        return f"{self.begin}\n\n{machine}\n\n{found.to_markdown()}\n\n{self.end}"


SPEED = Block("page", "*-cpu*.json", "normkit bench speed --json", Speed)
SMALL = Block("small", "*-small.json", "normkit bench small --json", Small)


def renew(page: Path, record: Path | None = None) -> str:
    """The page with its tables made again.

    Args:
        page: A Markdown page with the marks of one kind of table or more.
        record: A file that `normkit bench speed --json` or `small --json` wrote, and
            only its tables are made again; by default the newest of each kind in the
            folder `results` beside the page.

    Raises:
        ArgumentError: No marks, or no record.
    """
    text = page.read_text(encoding="utf-8")
    blocks = (SPEED, SMALL) if record is None else (_block_of(record),)
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


def _block_of(record: Path) -> Block:
    return SMALL if "small" in json.loads(record.read_text("utf-8")) else SPEED
