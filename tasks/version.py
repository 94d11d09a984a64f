"""The cache version of a stage: what its code is, so that changed code runs again and unchanged code does not."""

from pathlib import Path

from tasks.storage.digest import digest_directory, digest_json

TASKS = Path(__file__).parent


def code_version(stage: str) -> str:
    """Digest (16 hexadecimal digits) of the files of a stage's room."""
    _, files = digest_directory(TASKS / stage)
    return digest_json({name: digest for name, digest in files.items() if "__pycache__" not in name})[:16]
