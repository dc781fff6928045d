"""`normkit env`: the machine, the versions and the kernels, for reports and issues."""

from __future__ import annotations

from typing import Annotated

import typer

from normkit.environment import environment

EXAMPLES = "Example: `normkit env --json > environment.json`"


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of text.")
    ] = False,
) -> None:
    """Show what normkit runs on: versions, processor, kernels, optional packages.

    Paste it into a bug report.
    """
    found = environment()
    print(found.to_json() if as_json else found.to_text())
