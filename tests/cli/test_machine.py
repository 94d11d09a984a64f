"""`forge` on machines whose terminal, home or disk is in its way."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.command import PROGRAM, environment, error_of, forge
from tests.integration.harness import PROJECT
from tests.storage.disks import without_privileges

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
ODD = "größe 100% a?b #1 it's +&="


def start(*command: str | Path, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with further variables to its end."""
    return subprocess.run(
        command, cwd=home.parent, env=environment(home) | variables, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["status"], ["check-recipe", "tiny-cpu"], ["doctor"]])
def test_output_to_a_full_disk_is_one_message(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [PROGRAM, *arguments], env=environment(tmp_path / "home"), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "Error: standard output: goes to a file whose disk is full; free space there\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_recipe_is_shown_on_a_terminal_that_lacks_its_characters(encoding: str, tmp_path: Path) -> None:
    recipe = tmp_path / "→ größe.yaml"
    shipped = (PROJECT / "recipes" / "tiny-cpu.yaml").read_text(encoding="utf-8")
    recipe.write_text(shipped, encoding="utf-8")
    done = start(PROGRAM, "check-recipe", recipe.name, home=tmp_path / "home", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "? gr" in done.stdout
    assert "e.yaml is valid" in done.stdout


def test_an_argument_that_the_locale_cannot_read_is_one_message(tmp_path: Path) -> None:
    done = start(PROGRAM, "run", "--data-path", "größe.jsonl", home=tmp_path / "home", **ASCII)
    message = error_of(done)
    assert message.startswith("Error: --data-path gr")
    assert "set LC_ALL=C.UTF-8" in message


def test_commands_work_in_a_home_with_an_odd_name(tmp_path: Path) -> None:
    home = tmp_path / ODD
    assert forge("doctor", home=home).stdout.count(f"{home}/store, which the first run creates") == 1
    assert json.loads(forge("status", "--json", home=home).stdout)["actual"] is None
    assert forge("stop", home=home).stdout == "Nothing is serving.\n"
    assert [path.name for path in tmp_path.iterdir()] == [ODD], "nothing is written elsewhere"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["stop"], "serving"),
        pytest.param(["history", "dates"], "MLflow", marks=pytest.mark.long),
        pytest.param(["run"], "store", marks=pytest.mark.long),
    ],
)
def test_a_home_that_cannot_be_written_is_one_message(arguments: list[str], named: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    done = start(*without_privileges(), PROGRAM, *arguments, home=home)
    message = error_of(done)
    assert named in message
    assert "Permission denied" in message
    assert "FORGE_" in message, "the fix names a setting"
    assert list(home.iterdir()) == []


def test_a_home_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    done = start(*without_privileges(), PROGRAM, "status", home=home)
    assert (done.returncode, done.stdout) == (0, "Nothing is serving. Train a model with: forge run\n")


@pytest.mark.long
def test_run_needs_no_home_of_the_user(tmp_path: Path) -> None:
    # Flyte looks for its files in the user's home as soon as it is imported.
    unknown = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*unknown, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to unshare the user namespace")
    variables = {name: text for name, text in environment(tmp_path / "home").items() if name not in ("HOME", "USER")}
    done = subprocess.run(
        [*unknown, PROGRAM, "run", "--data-path", "missing.jsonl"],
        cwd=tmp_path, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert "missing.jsonl" in error_of(done)
