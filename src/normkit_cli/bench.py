"""`normkit bench`: benchmarks against torch.nn, one command per quantity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Protocol

import typer

from normkit_cli.arguments import check_file

app = typer.Typer(
    help="Measure accuracy and speed of normkit against torch.nn.", no_args_is_help=True
)

_Json = Annotated[
    Path | None, typer.Option(help="Also write all numbers to this file.")
]
_Page = Annotated[
    Path | None,
    typer.Option(help="Write the table into this page, between its two marks."),
]
_Threads = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Number of threads; repeatable. By default 1 and 2."),
]


class _Measured(Protocol):
    def to_json(self) -> str: ...


def _give(found: _Measured, text: str, json: Path | None) -> None:
    """Print the text of a measurement, and write its numbers to the file if any."""
    if json is not None:
        json.write_text(found.to_json() + "\n", encoding="utf-8")
    print(text)


@app.command(
    "numerics",
    epilog="Example: `normkit bench numerics --write docs/numerics.md`",
)
def _numerics(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.")
    ] = False,
    write: _Page = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Show the largest error of every layer against float64, by layout and dtype.

    Each column is a mean of so many standard deviations; each cell the error of normkit
    and that of torch.nn, relative where the output is above 1.
    """
    from normkit.bench.marks import around
    from normkit.bench.numerics import COMMAND, numerics

    # Before the measurement, which takes minutes.
    page = None if write is None else around(write, COMMAND)
    found = numerics(seed=seed)
    if write is not None and page is not None:
        write.write_text(found.to_markdown().join(page), encoding="utf-8")
    print(found.to_json() if as_json else found.to_text())


@app.command(
    "speed",
    epilog="Example: `normkit bench speed --quick --json speed.json`",
)
def _speed(
    quick: Annotated[
        bool, typer.Option("--quick", help="A dozen cases, in under a minute.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=0.1, help="Minutes in all: 8, or 0.6 with --quick."),
    ] = None,
    json: _Json = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 1,
    compile: Annotated[  # noqa: A002  the option's name
        bool, typer.Option("--compile", help="Also measure torch.compile in six cases.")
    ] = False,
) -> None:
    """Time layers against torch.nn and a plain copy.

    Contestants take turns; times are process CPU time, the least of many turns. Load on
    the machine changes single numbers, and ratios less. Losses are marked.
    """
    from normkit.bench.cases import CASES, QUICK
    from normkit.bench.speed import speed

    check_file("--json", json)
    minutes = (0.6 if quick else 8.0) if budget is None else budget
    found = speed(
        QUICK if quick else CASES,
        budget=60 * minutes,
        threads=threads,
        with_compile=compile,
    )
    _give(found, found.to_text(), json)


@app.command(
    "steps",
    epilog="Example: `normkit bench steps --threads 1 --json steps.json`",
)
def _steps(
    budget: Annotated[
        float, typer.Option(min=0.1, help="Minutes for each number of threads.")
    ] = 4.0,
    threads: _Threads = None,
    json: _Json = None,
) -> None:
    """Time training steps of ResNets against torch.nn, and count what they keep.

    Forward, loss and backward, with activations and sums fused into the norms and
    without, and under less_memory. Contestants take turns; a ratio is torch's median
    time over ours: process CPU time with one thread, wall time with more.
    """
    from normkit.bench.steps import steps

    check_file("--json", json)
    counts = threads or [1, 2]
    found = steps(threads=counts, budget=60 * budget * len(counts))
    _give(found, found.to_markdown(), json)


@app.command(
    "small",
    epilog="Example: `normkit bench small --json small.json`",
)
def _small(
    budget: Annotated[float, typer.Option(min=0.01, help="Minutes in all.")] = 1.5,
    json: _Json = None,
) -> None:
    """Time layers on small inputs: the difference to torch.nn in microseconds.

    In training, in training with its backward, and in eval, with one thread.
    Contestants take turns; times are process CPU time, the least of many turns and the
    median.
    """
    from normkit.bench.small import small

    check_file("--json", json)
    found = small(budget=60 * budget)
    _give(found, found.to_text(), json)


@app.command(
    "calls",
    epilog="Example: `normkit bench calls --quick --threads 1 --json calls.json`",
)
def _calls(
    quick: Annotated[
        bool, typer.Option("--quick", help="Plain calls at four sizes, in a minute.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Minutes for each number of threads: 8, or 0.5 with --quick."
        ),
    ] = None,
    threads: _Threads = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Also measure oneDNN, ONNX Runtime and JAX, if installed."
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue this record: repeat its disturbed cells, and those whose "
            "passes differ.",
        ),
    ] = None,
    json: _Json = None,
) -> None:
    """Time calls against torch.nn, over 4 thousand to 6.4 million values.

    Each layer in training (forward and backward) and in eval, plain and with epilogues,
    masks and bfloat16, against torch.nn and a clone of the input; then the overhead of
    a call in microseconds. Contestants take turns; a ratio is torch's median time over
    ours: process CPU time with one thread, wall time with more.
    """
    from normkit.bench.call_cases import CALL_CASES, FEW_SIZES
    from normkit.bench.call_grid import calls, resumed
    from normkit.bench.call_tables import to_text
    from normkit.bench.calls import Calls
    from normkit.errors import ArgumentError

    check_file("--json", json)
    minutes = (0.5 if quick else 8.0) if budget is None else budget
    few = [c for c in CALL_CASES if c.form == "plain" and c.size in FEW_SIZES]
    if resume is None:
        counts = threads or [1, 2]
        found = calls(
            few if quick else CALL_CASES,
            threads=counts,
            budget=60 * minutes * len(counts),
            with_peers=peers,
        )
    else:
        if quick or threads or peers:
            raise ArgumentError(
                "--resume measures what its record holds; leave out --quick, --threads "
                "and --peers"
            )
        record = Calls.from_json(resume.read_text(encoding="utf-8"))
        found = resumed(record, budget=60 * minutes * len(record.threads))
    _give(found, to_text(found), json)


@app.command(
    "ranks",
    epilog="Example: `normkit bench ranks --model --write docs/scale.md`",
)
def _ranks(
    modelled: Annotated[
        bool,
        typer.Option("--model", help="Model 1 to 4,096 GPUs; measure nothing."),
    ] = False,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of processes; repeatable. By default 1, 2, 4 and 8."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Time for each number of processes.")
    ] = 5.0,
    write: _Page = None,
) -> None:
    """Show the cost of synchronized batch norm over ranks, ours and torch's.

    One layer on gloo processes, forward and backward: processor time, time on the
    clock, collectives and bytes. With `--model` the network's part of a ResNet-50 step
    on GPUs, from the constants that NCCL chooses its algorithms by.
    """
    from normkit.bench.marks import written
    from normkit.bench.ranks import measure_ranks
    from normkit.bench.ranks_model import model
    from normkit.errors import ArgumentError

    name = "normkit bench ranks --model" if modelled else "normkit bench ranks"
    if modelled and ranks:
        raise ArgumentError("--ranks are measured; leave it out with --model")
    found = (
        model()
        if modelled
        else measure_ranks(tuple(ranks or (1, 2, 4, 8)), seconds=seconds)
    )
    if write is not None:
        text = written(write, name, found.to_markdown())
        write.write_text(text, encoding="utf-8")
    print(found.to_text())


@app.command(
    "page",
    epilog="Example: `normkit bench page benchmarks/README.md`",
)
def _page(
    page: Annotated[Path, typer.Argument(help="A page with the two marks.")] = Path(
        "benchmarks/README.md"
    ),
    record: Annotated[
        Path | None,
        typer.Option(help="A record; by default the newest of each kind in results/."),
    ] = None,
) -> None:
    """Write the tables of the newest records into a page, and its figure."""
    from normkit.bench.page import figure, renew

    text, drawn = renew(page, record), figure(page, record)
    page.write_text(text, encoding="utf-8")
    print(f"{page} is written")
    if drawn is not None:
        path, svg = drawn
        path.write_text(svg, encoding="utf-8")
        print(f"{path} is written")
