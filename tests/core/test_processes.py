"""Processes are told apart across PID namespaces, as containers have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.core.processes import is_alive, start_ticks, this_process

SAY = "from forge.core.processes import this_process; print(this_process(), flush=True); input()"
PROJECT = Path(__file__).parents[2]


def start(*before: str) -> tuple["subprocess.Popen[str]", str]:
    """A process that waits, and what it calls itself."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SAY], cwd=PROJECT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_process_is_known_until_it_ends() -> None:
    assert is_alive(this_process()) is True
    process, named = start()
    assert is_alive(named) is True
    process.communicate("\n")
    assert is_alive(named) is False
    assert is_alive(this_process().replace(f".{start_ticks(os.getpid())}", ".1")) is False, "its number was used again"


def test_nothing_is_said_of_another_machine_boot_or_pid_namespace() -> None:
    boot, namespace, pid, ticks = this_process().split(".")
    for other in (f"{boot[::-1]}.{namespace}.{pid}.{ticks}", f"{boot}.1.{pid}.{ticks}", "host/1/1", "host.1.1.1", ""):
        assert is_alive(other) is None


def test_a_process_of_another_container_with_this_hostname_is_not_taken_for_dead() -> None:
    process, named = start("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if not named:
        process.communicate("")
        pytest.skip("this machine lets nobody make a PID namespace")
    try:
        assert named.split(".")[2] == "1"
        assert is_alive(named) is None
    finally:
        process.communicate("\n")
