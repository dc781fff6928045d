"""`normkit env`: machine, versions and kernels, for bug reports."""

from __future__ import annotations

from normkit_cli.arguments import AsJson

EXAMPLES = "Example: `normkit env --json > environment.json`"


def command(
    as_json: AsJson = False,
) -> None:
    """Show versions, processor, kernels and optional packages.

    Paste it into a bug report.
    """
    from normkit.environment import environment

    found = environment()
    print(found.to_json() if as_json else found.to_text())
