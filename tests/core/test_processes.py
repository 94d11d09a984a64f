"""Process names are unique across PID namespaces, which containers have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.core.processes import is_alive, start_ticks, this_process

CODE = "from forge.core.processes import this_process; print(this_process(), flush=True); input()"
PROJECT = Path(__file__).parents[2]


def start(*before: str) -> tuple["subprocess.Popen[str]", str]:
    """A waiting process and its name."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", CODE], cwd=PROJECT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_process_is_alive_until_it_exits() -> None:
    assert is_alive(this_process()) is True
    process, named = start()
    assert is_alive(named) is True
    process.communicate("\n")
    assert is_alive(named) is False
    assert is_alive(this_process().replace(f".{start_ticks(os.getpid())}", ".1")) is False, "the PID was reused"


def test_processes_of_another_machine_boot_or_pid_namespace_are_unknown() -> None:
    boot, namespace, pid, ticks = this_process().split(".")
    for other in (f"{boot[::-1]}.{namespace}.{pid}.{ticks}", f"{boot}.1.{pid}.{ticks}", "host/1/1", "host.1.1.1", ""):
        assert is_alive(other) is None


def test_a_process_in_another_container_is_not_considered_dead() -> None:
    process, named = start("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if not named:
        process.communicate("")
        pytest.skip("this machine does not allow PID namespaces")
    try:
        assert named.split(".")[2] == "1"
        assert is_alive(named) is None
    finally:
        process.communicate("\n")
