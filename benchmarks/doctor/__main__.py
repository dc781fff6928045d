"""Score the doctor on bugs from public threads, and on healthy programs.

`python benchmarks/doctor` runs the bugs, and with the name of a part that part: `third`
to `eighteenth` are later sets of bugs; `healthy` are healthy programs (20 minutes;
those on MNIST and CIFAR-10 need NORMKIT_DATA), and so are `quiet`, `calm`, `still`,
`mild`, `fair`, `plain`, `steady`, `level`, `sober`, `gentle`, `frank`, `honest` and
`candid`, those of quiet_runs.py to candid_runs.py; `architectures` are fresh networks
of the libraries that are installed; `overhead` measures the time, and `shrinking` what
signals that shrink cost.
Each writes its part of record.json, and docs/doctor-score.md from the whole; with names
behind a part only those are run, and take the place of their earlier runs.

Detected: the program with the bug raises an alarm. Named: the first alarm, of the
diagnosis or of the watched training, is one that was expected. Silent twin: the same
program without the bug raises none. Mended: `Diagnosis.repair()` did something, and
then eval mode has at least 90 % of the twin's accuracy.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import architectures
import eighteenth_bugs
import eighth_bugs
import eleventh_bugs
import fifteenth_bugs
import fifth_bugs
import fourteenth_bugs
import fourth_bugs
import healthy
import more_bugs  # noqa: F401 - enters its programs in BUGS
import ninth_bugs
import other_bugs
import overhead
import seventeenth_bugs
import seventh_bugs
import shrinking
import sixteenth_bugs
import sixth_bugs
import tenth_bugs
import third_bugs
import thirteenth_bugs
import torch
import twelfth_bugs
from bugs import BUGS, Bug, Run
from calm_runs import CALM
from candid_runs import CANDID
from fair_runs import FAIR
from frank_runs import FRANK
from gentle_runs import GENTLE
from honest_runs import HONEST
from level_runs import LEVEL
from mild_runs import MILD
from plain_runs import PLAIN
from quiet_runs import QUIET
from sober_runs import SOBER
from steady_runs import STEADY
from still_runs import STILL

from normkit.doctor import Diagnosis, diagnose
from normkit.doctor.finding import Finding, ranked
from normkit.modeling.batch import call_on

PAGE = Path(__file__).parents[2] / "docs" / "doctor-score.md"
RECORD = Path(__file__).parent / "record.json"
SEED = 0


@dataclass(frozen=True)
class Later:
    """A set that was committed before the doctor saw it, on its own part of the page.

    `first` has the alarms of the first meeting, on each program and on its twin;
    `after` begins a second score, where they led to changes of the doctor.
    """

    module: str
    title: str
    about: str
    first: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    after: str | None = None


LATER = {
    "third": Later(
        "third_bugs",
        "A third set",
        "programs of layers and losses that the others lack",
        third_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "fourth": Later(
        "fourth_bugs",
        "A fourth set",
        "programs, most on batch norm, whose author had not read the doctor's code",
        fourth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "fifth": Later(
        "fifth_bugs",
        "A fifth set",
        "programs on more varied networks, whose author knew the titles of the checks",
        fifth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "sixth": Later(
        "sixth_bugs",
        "A sixth set",
        "programs of kinds that the others lack, whose author knew the checks' names",
        sixth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "seventh": Later(
        "seventh_bugs",
        "A seventh set",
        "programs on norms and on training whose bugs cost something",
        seventh_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "eighth": Later(
        "eighth_bugs",
        "An eighth set",
        "programs of mistakes that many make",
        eighth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "ninth": Later(
        "ninth_bugs",
        "A ninth set",
        "programs of mistakes that many make, once more",
        ninth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "tenth": Later(
        "tenth_bugs",
        "A tenth set",
        "programs of mistakes that many make, by one more hand",
        tenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "eleventh": Later(
        "eleventh_bugs",
        "An eleventh set",
        "programs of what readers of articles on batch norm get wrong",
        eleventh_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "twelfth": Later(
        "twelfth_bugs",
        "A twelfth set",
        "programs of what people report in public threads",
        twelfth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "thirteenth": Later(
        "thirteenth_bugs",
        "A thirteenth set",
        "programs of mistakes in projects of one's own",
        thirteenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "fourteenth": Later(
        "fourteenth_bugs",
        "A fourteenth set",
        "programs of mistakes as people write them, from agents to graphs",
        fourteenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "fifteenth": Later(
        "fifteenth_bugs",
        "A fifteenth set",
        "programs whose bugs cost something, most on norms",
        fifteenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "sixteenth": Later(
        "sixteenth_bugs",
        "A sixteenth set",
        "programs of frequent mistakes, by one who chose as threads would",
        sixteenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "seventeenth": Later(
        "seventeenth_bugs",
        "A seventeenth set",
        "programs of frequent mistakes, chosen from threads by another hand",
        seventeenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
    "eighteenth": Later(
        "eighteenth_bugs",
        "An eighteenth set",
        "programs of frequent mistakes, chosen from threads by another hand",
        eighteenth_bugs.FIRST_SIGHT,
        "After changes of the doctor that these programs led to",
    ),
}

HEALTHY_SETS = {
    "quiet": QUIET,
    "calm": CALM,
    "still": STILL,
    "mild": MILD,
    "fair": FAIR,
    "plain": PLAIN,
    "steady": STEADY,
    "level": LEVEL,
    "sober": SOBER,
    "gentle": GENTLE,
    "frank": FRANK,
    "honest": HONEST,
    "candid": CANDID,
}


def part_of(bug: Bug) -> str:
    """Return the part of the record in which a bug is; a set may have several files."""
    name = bug.program.__module__.partition("_")[0]
    return name if name in LATER else "bugs"


@dataclass(frozen=True)
class Score:
    """How the doctor did on one bug."""

    name: str
    threads: str
    expected: list[str]
    alarms: list[str]
    twin_alarms: list[str]
    applied: list[str]
    left: list[str]
    accuracy: float
    repaired: float
    twin: float

    @property
    def is_detected(self) -> bool:
        """The doctor said something."""
        return bool(self.alarms)

    @property
    def is_named(self) -> bool:
        """What it said first was right."""
        return bool(self.alarms) and self.alarms[0] in self.expected

    @property
    def is_repaired(self) -> bool:
        """It did something about it, and eval mode is as good as the twin's."""
        return bool(self.applied) and self.repaired >= 0.9 * self.twin


def scored(bug: Bug) -> Score:
    """Run a bug and its twin."""
    bad, twin = _run(bug, is_bad=True), _run(bug, is_bad=False)
    found = _diagnosed(bad)
    before, best = _accuracy(bad), _accuracy(twin)
    applied = list(found.repair())
    return Score(
        name=bug.name,
        threads=bug.threads,
        expected=list(bug.expected),
        alarms=_alarms([*found.readings, *bad.watched]),
        twin_alarms=_alarms([*_diagnosed(twin).readings, *twin.watched]),
        applied=applied,
        left=_diagnosed(bad).named,
        accuracy=before,
        repaired=_accuracy(bad),
        twin=best,
    )


def _diagnosed(run: Run) -> Diagnosis:
    return diagnose(run.model, run.loader, run.loss_fn, forward=run.forward)


def _run(bug: Bug, *, is_bad: bool) -> Run:
    torch.manual_seed(SEED)
    return bug.program(is_bad)


def _alarms(findings: list[Finding]) -> list[str]:
    return list(dict.fromkeys(f.id for f in ranked(findings) if f.is_alarm))


def _accuracy(run: Run) -> float:
    """Return the accuracy in eval mode; nan where the targets are no classes."""
    run.model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in run.loader:
            if not isinstance(y, torch.Tensor) or y.is_floating_point():
                return math.nan
            scores = call_on(run.model, x)
            if (
                not isinstance(scores, torch.Tensor)
                or scores.dim() != 2
                or scores.shape[1] < 2
            ):
                return math.nan
            right += int((scores.argmax(1) == y).sum())
            total += len(y)
    return right / total


def page(record: dict[str, Any]) -> str:
    """Return the record in Markdown."""
    parts = ["<!-- Written by `python benchmarks/doctor`; do not edit. -->"]
    if "bugs" in record:
        parts += _bugs([Score(**score) for score in record["bugs"]], record["machine"])
    for name, later in LATER.items():
        if name in record:
            parts += ["", *_later(later, [Score(**score) for score in record[name]])]
    if "healthy" in record:
        parts += ["", *healthy.lines(record["healthy"])]
    for name, healthy_set in HEALTHY_SETS.items():
        parts += ["", *healthy_set.lines(record.get(name))]
    if "overhead" in record:
        parts += ["", *overhead.lines(record["overhead"])]
    if "shrinking" in record:
        parts += ["", *shrinking.lines(record["shrinking"])]
    if "architectures" in record:
        parts += ["", *architectures.lines(record["architectures"])]
    return "\n".join(parts) + "\n"


def _bugs(scores: list[Score], machine: str) -> list[str]:
    def share(values: list[bool]) -> str:
        return f"{sum(values)} of {len(values)} ({sum(values) / len(values):.0%})"

    silent = [not s.twin_alarms for s in scores]
    harmed = [s for s in scores if s.accuracy < 0.9 * s.twin]
    lines = [
        "# The doctor on bugs of real programs",
        "",
        "Each program was written after a public thread; which check should name it",
        "was written down before the doctor saw it; no threshold was chosen to suit.",
        f"The last {len(other_bugs.FIRST_SIGHT)} led to changes of the doctor;",
        f"at first sight it saw {_seen(other_bugs.FIRST_SIGHT)}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| an alarm is raised | {share([s.is_detected for s in scores])} |",
        f"| the first alarm is right | {share([s.is_named for s in scores])} |",
        f"| no alarm on the clean twin | {share(silent)} |",
        f"| `repair()` acts | {share([bool(s.applied) for s in scores])} |",
        "| it acts, and eval mode reaches 90 % of the twin's accuracy "
        f"| {share([s.is_repaired for s in scores])} |",
        "| the same of those whose eval mode was below it "
        f"| {share([s.is_repaired for s in harmed])} |",
        "",
        f"Digits, seed {SEED}, {machine}.",
        "Accuracy is that of eval mode: with the bug, after `repair()`, of",
        "the twin. Left are the alarms of a diagnosis after the repair. Where nothing",
        "was applied the fix takes training: other weights, other layers, masks.",
        "",
    ]
    return lines + _table(scores)


def _later(later: Later, scores: list[Score]) -> list[str]:
    first = [(s, *later.first[s.name]) for s in scores if s.name in later.first]
    n, met = len(scores), len(first)
    named = sum(bool(bad) and bad[0] in s.expected for s, bad, _ in first)
    lines = [
        f"## {later.title}",
        "",
        f"{n} {later.about}, written and",
        "committed before the doctor saw one of them. First meeting: an alarm on "
        f"{sum(bool(bad) for _, bad, _ in first)} of {met}, the right check first on "
        f"{named} of {met}, twins silent {sum(not twin for *_, twin in first)} of "
        f"{met}.",
    ]
    now = {s.name: (tuple(s.alarms), tuple(s.twin_alarms)) for s in scores}
    if later.after and now != later.first:
        lines += [
            f"{later.after}: an alarm on "
            f"{sum(s.is_detected for s in scores)} of {n}, the right check first on "
            f"{sum(s.is_named for s in scores)} of {n}, twins silent "
            f"{sum(not s.twin_alarms for s in scores)} of {n}; this is no score on",
            "unseen programs any more.",
        ]
    return [*lines, "", *_table(scores)]


def _table(scores: list[Score]) -> list[str]:
    lines = [
        "| program | threads | expected | alarms, in order | on the twin | repaired "
        "| left | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in scores:
        mark = "" if s.is_named else " **missed**"
        after = f"{s.repaired:.0%}" if s.applied else "–"
        gain = f"{s.accuracy:.0%} → {after}, {s.twin:.0%}"
        lines.append(
            f"| {s.name.replace('_', ' ')} | {s.threads} "
            f"| {', '.join(s.expected)} | {', '.join(s.alarms) or '–'}{mark} "
            f"| {', '.join(s.twin_alarms) or '–'} | {', '.join(s.applied) or '–'} "
            f"| {', '.join(s.left) or '–'} "
            f"| {'–' if math.isnan(s.twin) else gain} |"
        )
    return lines


def main() -> None:
    """Run one part, and write the record and the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["healthy"]:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        for found in healthy.measured(sys.argv[2:], record.get("healthy")):
            _write(healthy=found)
    elif sys.argv[1:2] and sys.argv[1] in HEALTHY_SETS:
        name = sys.argv[1]
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        for found in HEALTHY_SETS[name].measured(sys.argv[2:], record.get(name)):
            _write(**{name: found})
    elif sys.argv[1:2] == ["overhead"]:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        _write(overhead=overhead.measured(sys.argv[2:], record.get("overhead")))
    elif sys.argv[1:] == ["shrinking"]:
        _write(shrinking=shrinking.measured())
    elif sys.argv[1:2] == ["architectures"]:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        before = record.get("architectures")
        for found in architectures.measured(sys.argv[2:], before):
            _write(architectures=found)
    else:
        part = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in LATER else "bugs"
        wanted = sys.argv[2:]
        record = json.loads(RECORD.read_text()) if wanted else {}
        done = {score["name"]: score for score in record.get(part, [])}
        for each in BUGS:
            is_wanted = not wanted or any(w in each.name for w in wanted)
            if part_of(each) == part and is_wanted:
                score = scored(each)
                done[each.name] = asdict(score)
                print(each.name, score.alarms, score.twin_alarms, flush=True)
        machine = f"torch {torch.__version__}, Python {platform.python_version()}, CPU"
        _write(**{part: [*done.values()]})
        if part == "bugs":
            _write(machine=machine)
    print(PAGE)


def _seen(first: dict[str, tuple[str, ...]]) -> str:
    """Return how many programs had an alarm, and how many the right one first."""
    wanted = {bug.name: bug.expected for bug in BUGS}
    right = sum(bool(a) and a[0] in wanted[name] for name, a in first.items())
    return f"{sum(map(bool, first.values()))} of them, {right} by the right check first"


def _write(**parts: Any) -> None:
    """Write parts of the record, and the page of the whole."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record |= parts
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
