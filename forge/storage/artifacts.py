"""An artifact as a listing of the store shows it."""

import re
from datetime import datetime
from typing import NamedTuple

ARTIFACT = re.compile(r"(?:.*/)?sha256-[^/]+(?=/|$)")  # the key of an artifact, at the beginning of a file's key


class StoredArtifact(NamedTuple):
    """An artifact in the store. It is not `whole` if its upload was interrupted."""

    uri: str
    size: int  # bytes
    modified: datetime
    whole: bool
