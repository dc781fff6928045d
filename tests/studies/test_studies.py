"""Every study is complete, covers what it says, and runs at the quick scale."""

import inspect
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from normkit.studies import CLAIMS, all_studies, find, run
from normkit.studies.before import BEFORE
from normkit.studies.claims import ALGEBRA, CITED, CORRECTIONS
from normkit.studies.interval import coverage_of
from normkit.studies.literature import LITERATURE
from normkit.studies.report import write_report
from normkit.studies.runner import record_path
from normkit.studies.study import SCALES
from normkit.studies.summary import changed, overall, read_records, shared
from normkit.studies.verdict import WORDS

DOCS = Path(__file__).parents[2] / "docs" / "claims"
STUDIES = {study.id: study for study in all_studies()}
# Under five seconds of one core each.
CHEAP = ("S05", "S17")


def test_there_are_so_many_studies_and_claims_as_the_pages_say() -> None:
    assert sorted(STUDIES) == [f"S{i:02}" for i in range(1, 25)]
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 88)]
    assert list(BEFORE) == sorted(BEFORE, key=lambda c: list(BEFORE).index(c))
    assert set(BEFORE) == {f"C{i}" for i in range(1, 67)}


def test_every_claim_is_judged_by_a_study_or_cited() -> None:
    judged = {claim for study in STUDIES.values() for claim in study.claims}
    assert set(CLAIMS) - judged == {c.id for c in CLAIMS.values() if c.kind == CITED}
    assert judged <= set(CLAIMS)


def test_every_claim_but_algebra_has_its_literature() -> None:
    left = {c.id for c in CLAIMS.values() if c.kind != ALGEBRA} - set(LITERATURE)
    assert not left


def test_every_comparison_has_ten_seeds() -> None:
    for study in STUDIES.values():
        assert study.scales["cpu"].seeds >= 10, study.id
    assert coverage_of(10)[1] > 0.95


def test_every_correction_names_a_claim_with_a_study() -> None:
    judged = {claim for study in STUDIES.values() for claim in study.claims}
    assert {c for one in CORRECTIONS for c in one.claims} <= judged


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda s: s.id)
def test_a_study_says_all_that_is_needed_to_judge_it(study) -> None:
    assert set(study.scales) == set(SCALES)
    assert study.scales["cpu"].seeds >= 5
    wanted = set(inspect.signature(study.measure).parameters) - {"trial"}
    for scale in study.scales.values():
        assert set(scale.settings) == wanted
    for text in (
        *(study.question, study.prediction, study.metric, study.criterion),
        *(study.seen, study.meaning),
    ):
        assert text.endswith((".", "?"))


def check_quick(study_id: str, out: Path) -> None:
    (record,) = run([study_id], scale="quick", out=out)
    assert sorted(v.claim for v in record.verdicts) == sorted(STUDIES[study_id].claims)
    assert {v.word for v in record.verdicts} <= set(WORDS)
    assert (out / "figures" / f"{study_id}.png").stat().st_size > 5000


@pytest.mark.parametrize("study_id", CHEAP)
def test_a_cheap_study_runs_at_the_quick_scale(study_id: str, tmp_path: Path) -> None:
    check_quick(study_id, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("study_id", sorted(set(STUDIES) - set(CHEAP)))
def test_a_study_runs_at_the_quick_scale(study_id: str, tmp_path: Path) -> None:
    check_quick(study_id, tmp_path)


@pytest.mark.slow
def test_trials_in_other_processes_give_the_same_results(tmp_path: Path) -> None:
    (here,) = run(["S17"], scale="quick", out=tmp_path / "here")
    (there,) = run(["S17"], scale="quick", out=tmp_path / "there", jobs=2)
    assert here.results == there.results


# What is arithmetic or a definition must come out so at any scale.
SURE = {
    "S05": {"C6": "refuted", "C8": "supported", "C9": "supported", "C36": "refuted"},
    "S08": {"C60": "mixed", "C64": "supported"},
    "S12": {
        "C13": "supported",
        "C27": "mixed",
        "C54": "refuted",
        "C58": "refuted",
        "C70": "refuted",
        "C75": "refuted",
        "C77": "refuted",
        "C78": "refuted",
    },
}


@pytest.mark.parametrize("study_id", ["S05"])
def test_identities_have_the_same_verdict_at_any_scale(
    study_id: str, tmp_path: Path
) -> None:
    (record,) = run([study_id], scale="quick", out=tmp_path)
    words = {v.claim: v.word for v in record.verdicts}
    assert SURE[study_id].items() <= words.items()


RECORDS = read_records(DOCS) if DOCS.exists() else {}


@pytest.mark.skipif(not RECORDS, reason="no records under docs/claims")
@pytest.mark.parametrize("study_id", sorted(RECORDS))
def test_a_recorded_verdict_follows_from_the_recorded_numbers(study_id: str) -> None:
    from normkit.studies.record import Record

    stored = Record.read(record_path(DOCS, study_id))
    again = STUDIES[study_id].evaluate(stored.results)
    assert [(v.claim, v.word) for v in again] == [
        (v.claim, v.word) for v in stored.verdicts
    ]
    assert sorted(v.claim for v in again) == sorted(STUDIES[study_id].claims)
    sure = SURE.get(study_id, {})
    assert sure.items() <= {v.claim: v.word for v in again}.items()


def test_all_studies_together_fit_an_hour_of_two_cores() -> None:
    assert sum(record.cpu_seconds for record in RECORDS.values()) / 2 < 3600


def test_every_refuted_identity_is_corrected() -> None:
    refuted = {
        claim.id
        for claim in CLAIMS.values()
        if claim.kind == ALGEBRA and overall(claim.id, RECORDS)[0] == "refuted"
    }
    assert refuted <= {claim for one in CORRECTIONS for claim in one.claims}


def test_corrections_are_of_what_is_refuted() -> None:
    page = (DOCS / "corrections.md").read_text()
    for one in CORRECTIONS:
        words = {
            part.word
            for claim in one.claims
            for verdict in overall(claim, RECORDS)[1]
            for part in verdict.parts
        }
        shown = not one.is_measured or "refuted" in words
        assert (one.stated in page) is shown, one


def test_a_number_that_backs_two_claims_counts_once() -> None:
    resting = shared(RECORDS)
    assert resting["C59"] == "C11"
    assert "C20" not in resting
    assert "C35" not in resting


def test_the_front_page_begins_with_what_changed() -> None:
    lines = (DOCS / "README.md").read_text().splitlines()
    found = changed(RECORDS)
    assert f"**{len(found)} of 66 claims changed their verdict**" in lines[3]
    assert all(claim in lines[3] for claim in found)


def test_a_record_of_other_code_counts_for_nothing(tmp_path: Path) -> None:
    (record,) = run(["S17"], scale="quick", seeds=1, out=tmp_path)
    assert set(read_records(tmp_path)) == {"S17"}
    replace(record, code="0" * 16).write(record_path(tmp_path, "S17"))
    assert read_records(tmp_path) == {}
    write_report(tmp_path, figures=False)
    assert "**Stale.**" in (tmp_path / "S17.md").read_text()
    assert "**Stale**: the code of [S17]" in (tmp_path / "README.md").read_text()


@pytest.mark.skipif(not RECORDS, reason="no records under docs/claims")
def test_the_pages_say_what_the_records_say(tmp_path: Path) -> None:
    # Stale ones, too: their pages say so.
    shutil.copytree(DOCS / "records", tmp_path / "records")
    for page in write_report(tmp_path, figures=False):
        assert page.read_text() == (DOCS / page.name).read_text(), (
            f"{page.name} is stale: normkit study report --out docs/claims"
        )


@pytest.mark.skipif(not RECORDS, reason="no records under docs/claims")
def test_the_front_page_has_a_row_for_every_claim() -> None:
    front = (DOCS / "README.md").read_text()
    for claim in CLAIMS.values():
        assert f"| {claim.id} | {claim.text} |" in front
        word, _ = overall(claim.id, RECORDS)
        assert word in front


def test_a_study_is_found_by_id_and_by_title() -> None:
    assert find("s01") is find("figure one") is STUDIES["S01"]
