"""The pages of the studies, made from the records: claims, studies, corrections.

    README.md        every claim with its verdict, and how each was reached
    Sxx.md           one study: question, what is seen, what it means, rule, numbers
    corrections.md   what the sources state wrongly, with the evidence
    reproduce.md     the commands, and what they cost

All of it is generated. The rules are applied to the stored results, so the pages agree
with the code. A record of other code than the present counts for nothing: its study is
shown as stale.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from normkit.errors import ArgumentError
from normkit.studies import summary
from normkit.studies import verdict as rules
from normkit.studies.before import BEFORE
from normkit.studies.claims import (
    ALGEBRA,
    ARTICLES,
    CITED,
    CLAIMS,
    CORRECTIONS,
    RUN,
    Claim,
)
from normkit.studies.interval import coverage_of
from normkit.studies.literature import REFERENCES, of
from normkit.studies.record import Record
from normkit.studies.registry import all_studies
from normkit.studies.runner import draw_record, record_path
from normkit.studies.study import Study

__all__ = ["write_report"]

_NOTICE = "<!-- Written by `normkit study report`; do not edit. -->\n"


def _stale(out: Path, records: dict[str, Record]) -> list[str]:
    return [
        study.id
        for study in all_studies()
        if study.id not in records and record_path(out, study.id).exists()
    ]


def write_report(out: Path, *, figures: bool = True) -> list[Path]:
    """Write the pages and figures of the records under `out`.

    Args:
        out: The folder that `run` filled.
        figures: Draw the figures again, too.

    Raises:
        ArgumentError: There is no record.
    """
    records = summary.read_records(out)
    stale = _stale(out, records)
    if not records and not stale:
        raise ArgumentError(
            f"there are no records under {str(out)!r}; "
            "make some with: normkit study run --all"
        )
    studies = {study.id: study for study in all_studies()}
    pages = {
        "README.md": _front(records, studies, stale),
        "corrections.md": _wrong(records),
        "reproduce.md": _reproduce(records, studies),
    }
    for study_id, record in records.items():
        pages[f"{study_id}.md"] = _page(studies[study_id], record)
        record.write(record_path(out, study_id))
        if figures:
            draw_record(studies[study_id], record, out)
    for study_id in stale:
        pages[f"{study_id}.md"] = _stale_page(studies[study_id])
    written = []
    for name, text in pages.items():
        path = out / name
        path.write_text(_NOTICE + text, encoding="utf-8")
        written.append(path)
    return written


def _front(
    records: dict[str, Record], studies: dict[str, Study], stale: list[str]
) -> str:
    judged = {claim: summary.overall(claim, records)[0] for claim in CLAIMS}
    lines = [
        "# What is said about batch normalization, tested\n",
        _changes(records),
        f"{len(CLAIMS)} claims: 82 of five introductory articles (A0 to A4) and 5 of "
        "papers that came later (P1 to P5), each held against a rule written before "
        "the run of its record; pilots of a seed or two had set rates, steps and "
        "sizes. [Corrections](corrections.md) lists what the articles state wrongly, "
        "[reproduce](reproduce.md) how to run all of it.\n",
        _tally(records),
        *_method(records),
    ]
    if stale:
        names = ", ".join(f"[{s}]({s}.md)" for s in stale)
        lines.append(
            f"**Stale**: the code of {names} is newer than their records, which count "
            "for nothing until they are run again.\n"
        )
    titles = {
        RUN: "Experiments",
        ALGEBRA: "Identities: definitions and algebra, whose numbers are checked",
        CITED: "Cited",
    }
    for kind, title in titles.items():
        lines += [
            f"## {title}\n",
            "| | claim | source | literature | verdict here | deciding numbers | "
            "why they differ | studies |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            _claim_row(claim, records, judged[claim.id])
            for claim in CLAIMS.values()
            if claim.kind == kind
        ]
        lines.append("")
    lines += [
        "## Studies\n",
        "| | study | question | seeds | minutes | data |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for study_id, record in records.items():
        study = studies[study_id]
        data = ", ".join(sorted(record.data)) or "none"
        lines.append(
            f"| [{study_id}]({study_id}.md) | {study.title} | {study.question} | "
            f"{len(record.results)} | {record.cpu_seconds / 60:.1f} | {data} |"
        )
    lines += ["\n## Sources\n"]
    lines += [f"- {key}: {about}" for key, about in ARTICLES.items()]
    lines += [
        "\nThe claims are paraphrases. The articles' own wording, titles and authors "
        "are not quoted: their text is not part of this repository.\n",
        "## Literature\n",
    ]
    lines += [f"- {key}: {text}" for key, text in REFERENCES.items()]
    return "\n".join(lines) + "\n"


def _changes(records: dict[str, Record]) -> str:
    found = summary.changed(records)
    named = "; ".join(f"{c} {old} → {new}" for c, (old, new) in found.items())
    split = Counter(
        summary.overall(claim, records)[0]
        for claim, old in BEFORE.items()
        if old == "partly" and claim not in found
    )
    rest = " and ".join(
        f"{split[w]} {w}" for w in (rules.MIXED, rules.SMALLER) if split[w]
    )
    return (
        f"The studies were refereed. **{len(found)} of {len(BEFORE)} claims changed "
        f"their verdict**: {named}. Of those that stay, {sum(split.values())} that "
        f"were “partly” now say how: {rest}.\n"
    )


def _tally(records: dict[str, Record]) -> str:
    resting = summary.shared(records)
    sentences = []
    for kind, name in ((RUN, "experiments"), (ALGEBRA, "identities")):
        words = Counter(
            summary.overall(claim.id, records)[0]
            for claim in CLAIMS.values()
            if claim.kind == kind and claim.id not in resting
        )
        count = ", ".join(f"{words[w]} {w}" for w in rules.WORDS if words[w])
        sentences.append(f"{words.total()} {name}: {count}.")
    if resting:
        named = ", ".join(f"{c} on {by}" for c, by in resting.items())
        sentences.append(
            f"Not counted, because their numbers are those of another claim: {named}."
        )
    return " ".join(sentences) + "\n"


def _method(records: dict[str, Record]) -> list[str]:
    parts = {
        (record.study, part.text): part
        for record in records.values()
        for verdict in record.verdicts
        if CLAIMS[verdict.claim].kind == RUN
        for part in verdict.parts
        if part.word and part.word != rules.UNTESTED
    }
    unjudged = {
        (record.study, part.text)
        for record in records.values()
        for verdict in record.verdicts
        for part in verdict.parts
        if part.word == rules.UNTESTED
    }
    chance = sum(1 - part.interval.coverage for part in parts.values())
    coverage = coverage_of(10)[1]
    return [
        "A number is the median over paired seeds, with an interval of order "
        f"statistics: of 10 seeds from the second smallest to the second largest, "
        f"which holds the true median with {100 * coverage:.1f} % whatever the "
        "distribution. The interval that is shown is the one that is judged. “≥” and "
        "“bounds” mean that a run ended, or a grid, before the number was reached. "
        "Learning rates are "
        "chosen on validation images, one per arm; where the best is at the edge of "
        "its grid the number is shown and not judged.\n",
        "*Smaller than stated*: the effect is there, below the bound. *Mixed*: some "
        "parts of the claim hold and others do not; the verdict says which. *Not seen "
        "here*: these small networks cannot tell. *Not tested*: no run judges it.\n",
        f"**Many tests at once.** {len(parts)} parts of experiments are judged, each "
        "number once. Were every true value exactly at the border of no effect, about "
        f"{chance:.1f} of them would fall on one side by chance. {len(unjudged)} more "
        "parts are shown and not judged.\n",
    ]


def _claim_row(claim: Claim, records: dict[str, Record], word: str) -> str:
    _, said = summary.overall(claim.id, records)
    by = [r.study for r in records.values() for v in r.verdicts if v.claim == claim.id]
    links = " ".join(f"[{study}]({study}.md)" for study in dict.fromkeys(by))
    literature, differs = of(claim.id)
    text = summary.spelled(word, said)
    head, _, rest = text.partition(": ")
    verdict = f"**{head}**" + (f": {rest}" if rest else "")
    numbers = summary.deciding_numbers(word, said)
    return (
        f"| {claim.id} | {claim.text} | {claim.sources} | {literature} | "
        f"{_cell(verdict)} | {_cell(numbers)} | {differs} | "
        f"{links} |"
    )


def _page(study: Study, record: Record) -> str:
    ran = record.environment
    data = ", ".join(f"{k} (SHA-256 {v[:12]}…)" for k, v in record.data.items())
    coverage = coverage_of(len(record.results))[1]
    lines = [
        f"# {study.id}: {study.title}\n",
        f"{study.question}\n",
        f"![{study.title}](figures/{study.id}.png)\n",
        f"**What you see.** {study.seen}\n",
        f"**What it means.** {study.meaning}\n",
        f"**Predicted.** {study.prediction}\n",
        f"**Arms.** {'; '.join(study.arms)}.\n",
        f"**Measured.** {study.metric}\n",
        f"**Rule.** {study.criterion}\n",
        f"[The figure as SVG](figures/{study.id}.svg), "
        f"[the record](records/{study.id}.json); "
        f"again: `normkit study run {study.id} --{record.scale}`\n",
        f"| claim | verdict | measured | median [{100 * coverage:.1f} % interval] | "
        "predicted | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for said in record.verdicts:
        head = f"{said.claim}. {CLAIMS[said.claim].text}"
        for i, part in enumerate(said.parts):
            start = f"| {head} | **{said.word}** |" if i == 0 else "| | |"
            lines.append(start + _part_cells(part))
    lines.append("")
    lines += [f"- {v.claim}: {v.note}" for v in record.verdicts if v.note]
    lines.append("\n**Literature.**\n")
    for said in record.verdicts:
        found, differs = of(said.claim)
        word = summary.spelled(said.word, [said])
        lines.append(f"- {said.claim}: {found} Here: {word}. {differs}".rstrip())
    lines.append(
        f"\n{len(record.results)} seeds, {record.cpu_seconds:.0f} s of one thread of "
        f"{ran['processor'] if ran['device'] == 'cpu' else ran['device']}; "
        f"normkit {ran['normkit']}, torch {ran['torch']}, Python {ran['python']}. "
        f"Data: {data or 'none, random numbers'}."
    )
    return "\n".join(lines) + "\n"


def _stale_page(study: Study) -> str:
    return (
        f"# {study.id}: {study.title}\n\n{study.question}\n\n"
        f"**Stale.** The code that measures is newer than "
        f"[the record](records/{study.id}.json), which counts for nothing until it is "
        f"run again: `normkit study run {study.id}`\n\n"
        f"**Predicted.** {study.prediction}\n\n**Rule.** {study.criterion}\n"
    )


def _part_cells(part: rules.Part) -> str:
    return (
        f" {_cell(part.text)} | {part.interval} | {part.wanted} | "
        f"{part.word or 'reported'} |"
    )


def _wrong(records: dict[str, Record]) -> str:
    lines = [
        "# Corrections\n",
        "What the articles state and what is so. Each rests on a part of a verdict "
        "that is refuted, or is a slip of wording.\n",
        "| source | stated | found | evidence |",
        "| --- | --- | --- | --- |",
    ]
    for one in CORRECTIONS:
        said = [v for claim in one.claims for v in summary.overall(claim, records)[1]]
        refuted = any(p.word == rules.REFUTED for v in said for p in v.parts)
        if one.is_measured and not refuted:
            continue
        evidence = []
        for claim in one.claims:
            word, _ = summary.overall(claim, records)
            by = [
                r.study
                for r in records.values()
                for v in r.verdicts
                if v.claim == claim
            ]
            links = " ".join(f"[{study}]({study}.md)" for study in by)
            evidence.append(f"{claim} {word} {links}".strip())
        basis = "; ".join(evidence) if one.is_measured else "a slip"
        lines.append(f"| {one.source} | {one.stated} | {one.found} | {basis} |")
    return "\n".join(lines) + "\n"


def _reproduce(records: dict[str, Record], studies: dict[str, Study]) -> str:
    minutes = sum(record.cpu_seconds for record in records.values()) / 60
    lines = [
        "# Reproduce\n",
        "```console",
        "$ pip install 'normkit[demo]'",
        "$ export NORMKIT_DATA=DATA",
        "$ normkit study run --all --cpu --out claims",
        "$ normkit study report --out claims",
        "```\n",
        "The first command runs every study, one seed to a core; interrupted, it goes"
        " on with the seeds that are missing. The second writes these pages. DATA "
        "is a folder with `mnist.npz`, `cifar10*.npz` (`x_train`, `y_train`, `x_test`, "
        "`y_test`) and a text of more than 100,000 letters, `.txt`. Without it the "
        "digits of scikit-learn take their place, the record says so, and the bounds "
        "that 500 test digits cannot carry are wider.\n",
        f"Here all studies took {minutes:.0f} minutes of processor time: "
        f"{minutes / 2:.0f} minutes on two cores, of a budget of 60.\n",
        "| study | seeds | minutes of one core | settings at `--cpu` |",
        "| --- | --- | --- | --- |",
    ]
    for study_id, record in records.items():
        settings = ", ".join(f"{k} {v}" for k, v in record.settings.items())
        lines.append(
            f"| [{study_id}]({study_id}.md) | {len(record.results)} | "
            f"{record.cpu_seconds / 60:.1f} | {settings} |"
        )
    lines += [
        "\n## On a CUDA device\n",
        "`normkit study run S01 S02 S03 S19 S21 S23 --gpu` runs the headline claims "
        "at a larger scale. These settings have not been run: the records here are of "
        "`--cpu`.\n",
        "| study | seeds | settings at `--gpu` |",
        "| --- | --- | --- |",
    ]
    for study_id in ("S01", "S02", "S03", "S19", "S21", "S23"):
        scale = studies[study_id].scales["gpu"]
        settings = ", ".join(f"{k} {v}" for k, v in scale.settings.items())
        lines.append(f"| {study_id} | {scale.seeds} | {settings} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
