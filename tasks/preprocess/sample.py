"""A quick look at a source: finds the wrong file within a second, before anything expensive starts."""

from collections import Counter
from itertools import islice

from forge.core.errors import Problems
from forge.core.recipe import DataRecipe
from forge.storage.remote_files import is_remote
from tasks.preprocess import demonstration
from tasks.preprocess.file_formats import Block, RawFile, read_blocks
from tasks.preprocess.row_formats import find_row_format, mixed_row_formats, other_row_format, to_row
from tasks.preprocess.rows import Invalid, digests
from tasks.preprocess.secrets import reject_secret
from tasks.preprocess.sources import DEMONSTRATION, find_files

SAMPLE = 1000  # rows of each file; preprocessing reads them all
SHOWN = 10  # problems printed; all are counted


def check_source(recipe: DataRecipe, source: str) -> str:
    """Check the first rows of each file; returns the name of their format ("" for a remote source, which is not read).

    Raises Problems if a larger share of the rows is invalid than the recipe allows.
    """
    if source == DEMONSTRATION:
        demonstration.check(recipe.demonstration)
        return "chat"
    if is_remote(source):
        return ""
    files = find_files(source)
    _, row_format, reason = find_row_format(recipe, (_first_block(file) for file in files))
    rejected: list[str] = []
    count = 0
    for block in map(_first_block, files):
        for number, value in islice(block.values(), SAMPLE):
            where = f"{block.name}:{number}"
            count += 1
            try:
                if other := other_row_format(value, row_format, recipe):
                    raise mixed_row_formats(where, other.name, reason)
                row = to_row(value, row_format, recipe, Counter(), Counter())
                digests(row)
                if recipe.secrets == "reject":
                    reject_secret("\n".join(row.texts()))
            except Invalid as invalid:
                rejected.append(f"{where}: {invalid.message}")
    if len(rejected) > recipe.max_reject_fraction * count:
        more = [f"... and {len(rejected) - SHOWN} more of the {count} rows checked"] if len(rejected) > SHOWN else []
        raise Problems(f"data: {len(rejected)} of {count} rows cannot be used:", [*rejected[:SHOWN], *more])
    return row_format.name


def _first_block(file: RawFile) -> Block:
    return next(read_blocks([file]))
