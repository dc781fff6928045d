"""Every study is complete, covers what it says, and runs at the quick scale."""

import inspect
from pathlib import Path

import pytest

from normkit.studies import CLAIMS, all_studies, find, run
from normkit.studies.claims import CORRECTIONS
from normkit.studies.report import overall, read_records, write_report
from normkit.studies.runner import record_path
from normkit.studies.study import SCALES
from normkit.studies.verdict import WORDS

DOCS = Path(__file__).parents[2] / "docs" / "claims"
STUDIES = {study.id: study for study in all_studies()}
# Under five seconds of one core each.
CHEAP = ("S05", "S17")


def test_there_are_twenty_studies_and_sixty_six_claims() -> None:
    assert sorted(STUDIES) == [f"S{i:02}" for i in range(1, 21)]
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 67)]


def test_every_claim_is_judged_by_a_study_or_says_why_not() -> None:
    judged = {claim for study in STUDIES.values() for claim in study.claims}
    assert judged <= set(CLAIMS)
    left = set(CLAIMS) - judged
    assert left == {claim.id for claim in CLAIMS.values() if claim.note}


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
    for text in (study.question, study.prediction, study.metric, study.criterion):
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
    "S08": {"C60": "partly", "C64": "supported"},
    "S12": {"C13": "supported", "C27": "partly", "C54": "refuted", "C58": "refuted"},
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


def test_every_refuted_claim_is_corrected() -> None:
    refuted = {claim for claim in CLAIMS if overall(claim, RECORDS)[0] == "refuted"}
    assert refuted <= {claim for one in CORRECTIONS for claim in one.claims}


@pytest.mark.skipif(not RECORDS, reason="no records under docs/claims")
def test_the_pages_say_what_the_records_say(tmp_path: Path) -> None:
    for study_id in RECORDS:
        target = record_path(tmp_path, study_id)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(record_path(DOCS, study_id).read_bytes())
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
        assert (word or "not run") in front


def test_a_study_is_found_by_id_and_by_title() -> None:
    assert find("s01") is find("figure one") is STUDIES["S01"]
