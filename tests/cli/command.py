"""Runs `forge` as a user does, in a home of its own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("forge")


def environment(home: Path, **settings: str) -> dict[str, str]:
    """The variables of a process with this home and these settings, such as serving_port."""
    return os.environ | {"FORGE_HOME": str(home)} | {f"FORGE_{name.upper()}": text for name, text in settings.items()}


def forge(*arguments: str, home: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, outside the project's folder."""
    return subprocess.run(
        [PROGRAM, *arguments], cwd=home.parent, env=environment(home, **settings), capture_output=True, text=True
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that failed as it should: status 1, and no traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr
