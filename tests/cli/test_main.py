"""The command line: what it prints, where, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit
import normkit_cli as cli
from normkit.errors import ArgumentError

COMMANDS = ("demo", "doctor", "calibrate", "fold", "init", "env")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_version_is_that_of_the_package(capsys) -> None:
    assert run(capsys, "--version") == (0, f"normkit {normkit.__version__}\n", "")


def test_python_runs_the_package_as_the_command() -> None:
    words = [sys.executable, "-m", "normkit", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"normkit {normkit.__version__}\n"


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands_and_says_where_to_start(capsys, words) -> None:
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert all(f" {command} " in out for command in COMMANDS)
    assert "Start with normkit demo" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_that_is_itself_a_command(
    capsys, command: str
) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"normkit {command}" in out[out.index("Example") :]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nope",), "nope"),
        (("demo", "--seed", "many"), "--seed"),
        (("demo", "--nope"), "--nope"),
        (("demo", "--seed", "-1"), "seed=-1 must not be negative"),
        (("env", "surplus"), "surplus"),
    ],
)
def test_a_wrong_call_is_one_line_on_stderr_and_exit_code_2(
    capsys, tmp_path: Path, monkeypatch, words, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    *progress, line = err.splitlines()
    assert not progress
    assert line.startswith("normkit: ")
    assert told in line


def failing(error: BaseException):
    def environment():
        raise error

    return environment


def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(
    capsys, monkeypatch
) -> None:
    monkeypatch.setattr(
        "normkit.environment.environment", failing(ZeroDivisionError("a\nb"))
    )
    code, out, err = run(capsys, "env")
    assert (code, out) == (2, "")
    assert err == (
        "normkit: unexpected ZeroDivisionError: a b; "
        "run again with --traceback to see where\n"
    )


@pytest.mark.parametrize("words", [("--traceback", "env"), ("env", "--traceback")])
def test_a_traceback_is_shown_only_when_asked_for(capsys, monkeypatch, words) -> None:
    monkeypatch.setattr(
        "normkit.environment.environment", failing(ArgumentError("wrong"))
    )
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("normkit: wrong\n")
    assert "Traceback" not in run(capsys, "env")[2]


def test_an_interrupt_ends_it_with_the_shells_code(capsys, monkeypatch) -> None:
    monkeypatch.setattr("normkit.environment.environment", failing(KeyboardInterrupt()))
    assert run(capsys, "env") == (130, "", "normkit: stopped\n")


def test_env_names_the_versions_and_the_kernels(capsys) -> None:
    code, out, _ = run(capsys, "env")
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    facts = {name.strip(): fact.strip() for name, fact in facts.items()}
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["normkit"] == normkit.__version__
    assert facts["kernels: reference"] == "can run"


def test_env_as_json_is_json(capsys) -> None:
    code, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["torch"] == torch.__version__
    assert found["backends"]["reference"] == []


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "normkit_cli"], ["normkit"]], ids=len
)
def test_the_command_is_installed_and_gives_the_exit_code(command) -> None:
    if command == ["normkit"]:
        command = [str(Path(sys.executable).with_name("normkit"))]
    done = subprocess.run([*command, "nope"], capture_output=True, check=False)
    assert done.returncode == 2
