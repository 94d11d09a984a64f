"""What this process's environment may lack: a terminal that shows every character, and a home that can be written."""

import contextlib
import getpass
import io
import os
import sys
import tempfile
from pathlib import Path

# What libraries only read from the user's home: the variable that names it, and its place there.
READ = {
    "HF_HOME": ".cache/huggingface",
    "KUBECONFIG": ".kube/config",
    "AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials",
    "AWS_CONFIG_FILE": ".aws/config",
    "FLYTECTL_CONFIG": ".flyte/config.yaml",
    "NETRC": ".netrc",
}


def replace_unencodable() -> None:
    """Replace the characters that the terminal's encoding lacks, instead of failing to print them."""
    for stream in (sys.stdout, sys.stderr):  # a notebook's, or a progress bar's, are of another class
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def complete_environment(directory: Path) -> None:
    """Let libraries keep their files in `directory` if the user's home is missing or cannot be written.

    The caches of Flyte, Hugging Face, Triton and others are in the home. What is there already is still read. The same
    goes for temporary files. A user whom the system does not know, as in a container, gets a name: torch asks for it.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # neither TMPDIR nor /tmp can be written
        with contextlib.suppress(OSError):
            (directory / "tmp").mkdir(parents=True, exist_ok=True)
            os.environ["TMPDIR"] = str(directory / "tmp")
    home = _home()
    if home is not None:
        if os.access(home, os.W_OK | os.X_OK):
            return
        for name, place in READ.items():
            if os.path.exists(home / place):
                os.environ.setdefault(name, str(home / place))
    os.environ["HOME"] = str(directory)


def _home() -> Path | None:
    """The user's home, or None if there is none."""
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None
    return home if os.path.isdir(home) else None
