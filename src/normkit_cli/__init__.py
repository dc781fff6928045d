"""The command line: `normkit COMMAND`, one file per command.

A command imports normkit, and so torch, when it runs: help and shell completion wait
for neither.

Exit code 0: done. 1: the command ran and the outcome is not what it should be (a demo
step that did not hold, an error that the doctor found, models that differ). 2: it
could not run; one line on stderr says why.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from normkit_cli import (
    bench,
    calibrate,
    demo,
    doctor,
    env,
    fold,
    init,
    study,
    verify,
)

__all__ = ["app", "main"]

# 128 + SIGINT, as shells count.
INTERRUPTED = 130

app = typer.Typer(
    name="normkit",
    help=(
        "Normalization for PyTorch: exact while training, explained when it fails, "
        "gone at inference.\n\n"
        "Start with `normkit demo`: it trains small networks on handwritten digits, "
        "breaks one, finds out why, repairs it and folds it, in about a minute."
    ),
    epilog="`normkit COMMAND --help` explains a command and shows how it is used.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog=demo.EXAMPLES)(demo.command)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.command)
app.command("calibrate", epilog=calibrate.EXAMPLES)(calibrate.command)
app.command("fold", epilog=fold.EXAMPLES)(fold.command)
app.command("verify", epilog=verify.EXAMPLES)(verify.command)
app.command("init", epilog=init.EXAMPLES)(init.command)
app.command("env", epilog=env.EXAMPLES)(env.command)
app.add_typer(bench.app, name="bench")
app.add_typer(study.app, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        import normkit

        print(f"normkit {normkit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and stop.",
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            help="On an error, show where in the code it arose; goes with any command.",
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: The words after `normkit`; those of this process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        code = app(args=words or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; flushing must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        print(f"normkit: {_in_one_line(error)}", file=sys.stderr)
        return 2
    # An interrupt is this code in some versions of typer, an exception in others.
    if code == INTERRUPTED:
        print("normkit: stopped", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _in_one_line(error: Exception) -> str:
    # Newer versions of typer bundle click, so its errors are recognized by a method.
    tell = getattr(error, "format_message", None)
    if tell is not None:
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "") or "normkit"
        text = f"{tell().rstrip('.')}; see `{path} --help`"
    elif _is_expected(error):
        text = str(error)
    else:
        text = (
            f"unexpected {type(error).__name__}: {error}; "
            "run again with --traceback to see where"
        )
    return " ".join(text.split())


def _is_expected(error: Exception) -> bool:
    from normkit.errors import NormkitError

    return isinstance(error, NormkitError | OSError)
