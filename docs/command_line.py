"""Write docs/guide/command-line.md from the commands themselves.

python docs/command_line.py            writes the page
python docs/command_line.py --check    exit code 1 if it is not up to date
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from normkit_cli import app

PAGE = Path(__file__).parent / "guide" / "command-line.md"

HEAD = """\
<!-- Written by `python docs/command_line.py`; do not edit. -->
# The command line

`normkit COMMAND --help` shows the same in a terminal;
`normkit --install-completion` lets the shell complete commands and options.
Neither waits for torch.

Exit code 0: done. 1: the command ran, and the outcome is not what it should be. 2: it
could not run, and one line on stderr says why. 130: stopped by an interrupt.
`--traceback`, with any command, shows where in the code an error arose.
"""


def page() -> str:
    """Return the page as it should be."""
    parts = [HEAD]
    for path, command in _commands("normkit", typer.main.get_command(app)):
        parts.append(f"## {path}\n\n{inspect.cleandoc(command.help or '')}\n")
        options = [p for p in command.params if "--help" not in p.opts]
        if options:
            parts.append("| | | default |\n| --- | --- | --- |")
            parts += [_row(option) for option in options]
            parts.append("")
        if command.epilog:
            parts.append(f"{command.epilog}\n")
    return "\n".join(parts)


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name in inner:
        yield from _commands(f"{path} {name}", inner[name])


def _row(option: Any) -> str:
    name = ", ".join(f"`{opt}`" for opt in option.opts)
    if not option.opts[0].startswith("-"):
        name = f"`{option.opts[0].upper()}`"
    told = " ".join((getattr(option, "help", "") or "").split())
    is_given = option.default is not None and option.default is not False
    shown = f"`{option.default}`" if is_given else ""
    return f"| {name} | {told} | {shown} |"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not up to date; run python docs/command_line.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
