"""What a listing of the store tells of each artifact."""

import re
from datetime import datetime
from typing import NamedTuple

ARTIFACT = re.compile(r"(?:.*/)?sha256-[^/]+(?=/|$)")


class StoredArtifact(NamedTuple):
    """An artifact in the store, or what there is of one that is not whole."""

    uri: str
    size: int  # bytes
    modified: datetime
    whole: bool
