"""The cache version of a stage: what its code is, so that changed code runs again and unchanged code does not."""

from pathlib import Path

from tasks.storage.digest import digest_file, digest_json

TASKS = Path(__file__).parent
SHARED = ("contracts.py", "storage", "weights.py")  # what decides how any stage's results are made and kept


def code_version(stage: str) -> str:
    """Digest (16 hexadecimal digits) of the code of a stage's room, and of what all rooms share."""
    parts = [TASKS / part for part in (stage, *SHARED)]
    files = [path for part in parts for path in (part.iterdir() if part.is_dir() else [part]) if path.is_file()]
    return digest_json({path.relative_to(TASKS).as_posix(): digest_file(path) for path in files})[:16]
