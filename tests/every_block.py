"""A page with every block and every chart, all of its text from an enemy."""

import numpy as np

from normkit.report import (
    Bands,
    Bar,
    Bars,
    Card,
    Cards,
    Code,
    Details,
    Figure,
    Heading,
    Heat,
    Histograms,
    Lines,
    Mark,
    Number,
    Numbers,
    Page,
    Row,
    Table,
    Text,
)

SEVERITIES = ("error", "warning", "info", "ok", "not judged")

# A module's name may hold anything but a dot.
ENEMY = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
    "\"'><b>&amp;</b> $x_{1}$ {{ 7*7 }} </svg></style>]]> \x07\u202e"
)
LONG = "encoder_" + "blockwithaverylongname" * 8


def page_of_every_block() -> Page:
    steps = np.arange(0, 3000, 3)
    wave = np.sin(steps / 100)
    blocks = [
        Numbers([Number(ENEMY, ENEMY, ENEMY, severity) for severity in SEVERITIES]),
        Numbers([Number(LONG, LONG, LONG)]),
        Heading(ENEMY),
        Heading(ENEMY, level=3),
        Heading("Twice"),
        Heading("Twice"),
        Text(ENEMY + " `" + ENEMY + "` " + LONG),
        Code(ENEMY + "\n" + LONG),
        Table(
            [ENEMY, "number", LONG],
            [[ENEMY, 1.5, LONG], [LONG, None, Mark("error", ENEMY)]],
            ENEMY,
        ),
        Bars(
            [Bar(ENEMY, 0.2), Bar(LONG, 0.9, "error"), Bar("none", None)],
            ENEMY,
            ENEMY,
            limit=0.5,
        ),
        Heat(
            [ENEMY, *map(str, range(40))],
            [(ENEMY, [i / 40 for i in range(41)]), (LONG, [None] * 41)],
            ENEMY,
            ENEMY,
        ),
        Cards(
            [
                Card(ENEMY, ENEMY, severity, ENEMY, [(ENEMY, ENEMY)], ENEMY)
                for severity in SEVERITIES
            ]
        ),
        Cards([Card(LONG, LONG, "error", LONG, [(LONG, LONG)], LONG)]),
        Row(
            [
                Figure(
                    ENEMY,
                    Bands(
                        *(steps, wave - 1, wave, wave + 1, ENEMY, ENEMY),
                        names=(ENEMY, LONG),
                    ),
                    alt=ENEMY,
                    caption=ENEMY,
                ),
                Figure(LONG, Lines({ENEMY: (steps, wave), LONG: (steps, -wave)}), LONG),
            ]
        ),
        Figure(
            "Layers",
            Lines(
                {f"layer{i}": (steps, np.exp(-i + wave)) for i in range(20)},
                log_y=True,
                in_order=True,
                marks={ENEMY: 1e-3},
            ),
            alt="twenty lines",
        ),
        Figure(
            "Histograms",
            Histograms(
                {
                    ENEMY: (np.linspace(-3, 3, 61), np.arange(60)),
                    LONG: (np.linspace(-3, 3, 61), np.arange(60)[::-1]),
                },
                ENEMY,
            ),
            alt="two histograms",
        ),
        Figure("Nothing", Lines({"nan": ([0, 1], [np.nan, np.inf])}), alt="nothing"),
        Details(ENEMY, [Text(LONG), Table(["a"], [[ENEMY]])]),
        Details("Open", [Text(ENEMY)], is_open=True),
    ]
    return Page(ENEMY, ENEMY + LONG, blocks, ENEMY)
