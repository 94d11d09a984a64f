"""Environments that lack something: characters of the terminal, a home, a place for temporary files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.core.errors import Problems
from forge.core.settings import load_settings
from tests.conftest import chat, write_jsonl
from tests.storage.disks import without_privileges

PROJECT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
TEXT = "Größe → ☃"
TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108 (where tempfile looks)
SHOW = (
    "import os, tempfile, getpass\nfrom forge.core.settings import load_settings\nload_settings()\n"
    "print(os.environ.get('HOME'), os.environ.get('HF_HOME'), tempfile.gettempdir(), getpass.getuser(), sep='\\n')"
)


def run_python(code: str, *before: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run code in a process with these variables and PATH alone, in a folder that takes no files."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), **environment}
    return subprocess.run([*before, sys.executable, "-c", code], cwd="/proc", env=variables, capture_output=True)


def shown(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    """HOME, HF_HOME, the place of temporary files, and the user's name, after the settings have been read."""
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (ASCII, b"Gr??e ? ?"),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}, "Größe ? ?".encode("latin-1")),
        ({"LC_ALL": "C.UTF-8"}, TEXT.encode()),
        ({"LC_ALL": "C"}, TEXT.encode()),
    ],
    ids=["ascii", "latin-1", "utf-8", "no locale"],
)
@pytest.mark.parametrize("pod", [False, True])
def test_characters_that_a_terminal_lacks_are_replaced(environment: dict[str, str], expected: bytes, pod: bool) -> None:
    code = (
        "import logging\nfrom forge.core.logs import start_logging\nstart_logging('train')\n"
        f"logging.getLogger('tasks.finetune').info({TEXT!a})\nprint({TEXT!a})\n"
        "from rich.console import Console\n"
        f"Console().print({TEXT!a})\n"
    )
    done = run_python(code, **environment, **({"FLYTE_INTERNAL_EXECUTION_ID": "f01"} if pod else {}))
    assert (done.returncode, done.stderr) == (0, b"")
    log, *printed = done.stdout.splitlines()
    assert printed == [expected, expected]
    assert pod or log.endswith(b"train: " + expected)


def test_a_log_on_a_full_disk_is_not_an_error() -> None:
    code = (
        "import logging, os, sys\nfrom forge.core.logs import start_logging\nstart_logging('train')\n"
        "logging.getLogger('tasks.finetune').info('step 1')\n"
        "os._exit(7)"  # else Python itself complains about the lines that it still has
    )
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (7, b"")


def test_without_a_home_libraries_keep_their_files_in_ours(tmp_path: Path) -> None:
    home = {"FORGE_HOME": str(tmp_path / "forge"), "HOME": "/nowhere/home"}
    found = shown(run_python(SHOW, **home))
    assert found[:2] == [str(tmp_path / "forge" / "user"), "None"]
    assert not (tmp_path / "forge").exists(), "reading the settings writes nothing"


def test_a_home_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    drop = without_privileges()
    models = tmp_path / "home" / ".cache" / "huggingface"
    models.mkdir(parents=True)
    (tmp_path / "home").chmod(0o500)
    home = {"FORGE_HOME": str(tmp_path / "forge"), "HOME": str(tmp_path / "home")}
    assert shown(run_python(SHOW, *drop, **home))[:2] == [str(tmp_path / "forge" / "user"), str(models)]
    mine = shown(run_python(SHOW, *drop, **home, HF_HOME="/mine"))
    assert mine[1] == "/mine"
    (tmp_path / "home").chmod(0o700)
    assert shown(run_python(SHOW, *drop, **home))[:2] == [str(tmp_path / "home"), "None"]


def test_a_user_whom_the_system_does_not_know_has_a_name_and_a_home(tmp_path: Path) -> None:
    unknown = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*unknown, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to unshare the user namespace")
    found = shown(run_python(SHOW, *unknown, FORGE_HOME=str(tmp_path / "forge")))
    assert (found[0], found[3]) == (str(tmp_path / "forge" / "user"), "54321")


def test_temporary_files_are_in_our_home_where_nothing_else_can_be_written(tmp_path: Path) -> None:
    # In a mount namespace of its own, where /tmp and the like cannot be written and tmp_path is /mnt.
    folders = "; ".join(f"[ ! -d {one} ] || mount -t tmpfs -o ro tmpfs {one}" for one in TEMPORARY)
    read_only = ["unshare", "--mount", "sh", "-c", f'mount --bind "$0" /mnt && {folders} && exec "$@"', tmp_path]
    drop = without_privileges()
    if subprocess.run([*read_only, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    found = shown(run_python(SHOW, *read_only, *drop, FORGE_HOME="/mnt/forge", HOME="/nowhere", PYTHONPATH=_outside()))
    assert found[2] == "/mnt/forge/user/tmp"


def _outside() -> str:
    if PROJECT.is_relative_to(TEMPORARY[0]):
        pytest.skip("needs the project outside /tmp")
    return str(PROJECT)


@pytest.mark.parametrize("wrong", ["a file", "in a file", "a broken link"])
def test_a_home_that_is_no_directory_is_one_message(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "Home"
    if wrong == "a broken link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_text("", encoding="utf-8")
    monkeypatch.setenv("FORGE_HOME", str(place / "more" if wrong == "in a file" else place))
    with pytest.raises(Problems, match=rf"FORGE_HOME={tmp_path}/Home.*: must be a directory, which {place} is not"):
        load_settings()


def test_too_long_a_name_for_temporary_files_is_one_message(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"{number}?", f"{number}!") for number in range(100)])
    code = (
        "import tasks.preprocess.read as read\nfrom pathlib import Path\n"
        "from forge.storage import DirectoryStore\nfrom tests.preprocess.datasets import prepare_file\n"
        "read.POOL_FROM = 0\n"  # even a small file is read by several processes
        f"prepare_file(Path({str(rows)!r}), DirectoryStore(Path({str(tmp_path / 'store')!r})))\n"
    )
    done = run_python(code, TMPDIR=str(long))
    error = done.stderr.decode().splitlines()[-1]
    assert f"ForgeError: TMPDIR {long}: its name is too long for the sockets of worker processes" in error
