"""A first look at a source, in a second: enough to find the wrong file before anything costly starts."""

from collections import Counter
from itertools import islice

from forge.core.errors import ForgeError, Problems
from forge.core.recipe import DataRecipe
from forge.storage.remote_files import is_remote
from tasks.preprocess import demonstration
from tasks.preprocess.formats import Block, RawFile, read_blocks
from tasks.preprocess.rows import Invalid, digests
from tasks.preprocess.secrets import refuse_secret
from tasks.preprocess.shapes import detect, find_row_format, to_row, unknown_shape
from tasks.preprocess.sources import DEMONSTRATION, find_files

SAMPLE = 1000  # rows of each file; preprocessing reads them all
SHOWN = 10  # findings printed; all are counted


def check_source(recipe: DataRecipe, source: str) -> str:
    """Check the first rows of each file; returns the name of their shape ("" of a remote source, which is not read).

    Raises Problems with what is wrong if more rows cannot be used than the recipe allows.
    """
    if source == DEMONSTRATION:
        demonstration.check(recipe.demonstration)
        return "chat"
    if is_remote(source):
        return ""
    files = find_files(source)
    _, shape, reason = find_row_format(recipe, (_first_block(file) for file in files))
    refused: list[str] = []
    count = 0
    for block in map(_first_block, files):
        for number, value in islice(block.values(), SAMPLE):
            where = f"{block.name}:{number}"
            count += 1
            try:
                if isinstance(value, Invalid):
                    raise value
                if recipe.row_format == "auto" and (other := detect(value)) is not shape:
                    if other:
                        raise ForgeError(two_shapes(where, other.name, reason))
                    raise unknown_shape(value)
                row = to_row(value, shape, recipe, Counter())
                digests(row)
                if recipe.secrets == "reject":
                    refuse_secret("\n".join(row.texts()))
            except Invalid as why:
                refused.append(f"{where}: {why.message}")
    if len(refused) > recipe.max_reject_fraction * count:
        more = [f"... and {len(refused) - SHOWN} more of the {count} rows looked at"] if len(refused) > SHOWN else []
        raise Problems(f"data: {len(refused)} of {count} rows cannot be used:", [*refused[:SHOWN], *more])
    return shape.name


def _first_block(file: RawFile) -> Block:
    return next(read_blocks([file]))


def two_shapes(where: str, other: str, reason: str) -> str:
    """The message where one source holds rows of two shapes."""
    return (
        f"data: two shapes in one source: {where} is {other}, and {reason}; separate them, or set data.row_format to "
        "have the others rejected"
    )
