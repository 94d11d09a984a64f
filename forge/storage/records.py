"""JSON records in the store: validated against their class when they are read."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from forge.core.errors import ForgeError

Record = TypeVar("Record", bound=BaseModel)


def parse_record(kind: type[Record], data: bytes | None, *, where: str, fix: str) -> Record:
    """A record of this class; raises ForgeError if the data is missing or is something else."""
    record = parse_or_none(kind, data)
    if record is None:
        raise ForgeError(f"is not a valid {kind.__name__.lower()} record", where=where, fix=fix)
    return record


def parse_or_none(kind: type[Record], data: bytes | None) -> Record | None:
    """A record of this class, or None if the data is missing or is something else, such as another release's."""
    try:
        return kind.model_validate_json(data or b"")
    except ValidationError:
        return None
