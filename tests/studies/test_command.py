"""`normkit study`: what a user types and sees."""

from pathlib import Path

from normkit_cli import main


def test_the_list_names_every_study(capsys) -> None:
    assert main(["study", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"S{i:02}" in printed for i in range(1, 25))


def test_a_run_prints_verdicts_and_a_report_follows(tmp_path: Path, capsys) -> None:
    out = str(tmp_path)
    options = ["--quick", "--seeds", "1", "--jobs", "1", "--out", out]
    assert main(["study", "run", "S17", *options]) == 0
    printed = capsys.readouterr().out
    assert "C22" in printed
    assert "≥ 1.05" in printed
    assert main(["study", "report", "--no-figures", "--out", out]) == 0
    front = (tmp_path / "README.md").read_text()
    assert "| C22 |" in front
    assert "not tested" in front
    page = (tmp_path / "S17.md").read_text()
    assert "normkit study run S17 --quick" in page
    assert (tmp_path / "corrections.md").read_text().startswith("<!-- Written by")


def test_mistakes_are_one_line_that_says_what_to_do(tmp_path: Path, capsys) -> None:
    wrong = (
        (["study", "run"], "no study was named"),
        (["study", "run", "S77"], "there is no study 'S77'"),
        (["study", "run", "S05", "--quick", "--cpu"], "exclude one another"),
        (["study", "report", "--out", str(tmp_path)], "no records"),
        (["study", "run", "S05", "--data", str(tmp_path / "x")], "does not exist"),
    )
    for words, said in wrong:
        assert main(words) == 2
        assert said in capsys.readouterr().err
