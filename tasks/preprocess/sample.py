"""A quick look at a source: finds the wrong file within a second, before anything expensive starts."""

from collections import Counter
from itertools import islice
from typing import NamedTuple

from forge.core.errors import Problems
from forge.core.recipe import DataRecipe
from forge.models.chat_format import ChatFormat, has_scorable_answer
from forge.models.conversation import Renderer
from forge.storage.remote_files import is_remote
from tasks.preprocess import demonstration
from tasks.preprocess.file_formats import read_blocks
from tasks.preprocess.render import reject_control_tokens, render_rows
from tasks.preprocess.row_formats import find_row_format, mixed_row_formats, other_row_format, to_row
from tasks.preprocess.rows import Invalid, Row, digests
from tasks.preprocess.secrets import reject_secret
from tasks.preprocess.sources import DEMONSTRATION, find_files

SAMPLE = 1000  # rows of each file; preprocessing reads them all
SHOWN = 10  # problems printed; all are counted


class Sample(NamedTuple):
    """What the first rows of a source show; for a remote one, which is not read, the format is ""."""

    row_format: str = ""
    scorable: bool = True  # an answer can be scored, or there are rows that were not read


def check_source(recipe: DataRecipe, source: str, form: ChatFormat | None = None) -> Sample:
    """Check the first rows of each file, the first ones of all also with the base's chat template, if `form` has it.

    Raises Problems if a larger share of the rows is invalid than the recipe allows.
    """
    if source == DEMONSTRATION:
        demonstration.check(recipe.demonstration)
        return Sample("chat")
    if is_remote(source):
        return Sample()
    files = find_files(source)
    _, row_format, reason = find_row_format(recipe, (next(read_blocks([file])) for file in files))
    renderer = Renderer(form, "base model") if form and form.templates else None
    rejected: list[str] = []
    count = 0
    scorable = recipe.overlong == "split"  # a part of a row may end with an answer that the whole does not end with
    for file in files:
        blocks = read_blocks([file])
        block = next(blocks)
        values = list(islice(block.values(), SAMPLE))
        for number, value in values:
            where = f"{block.name}:{number}"
            count += 1
            try:
                if other := other_row_format(value, row_format, recipe):
                    raise mixed_row_formats(where, other.name, reason)
                row = to_row(value, row_format, recipe, Counter(), Counter())
                digests(row)
                if recipe.secrets == "reject":
                    reject_secret("\n".join(row.texts()))
                if renderer and count <= SAMPLE:
                    _check_rendering(renderer, row)
                scorable = scorable or has_scorable_answer(row.messages, row.untrained)
            except Invalid as invalid:
                rejected.append(f"{where}: {invalid.message}")
        scorable = scorable or len(values) == SAMPLE or next(blocks, None) is not None
    if len(rejected) > recipe.max_reject_fraction * count:
        more = [f"... and {len(rejected) - SHOWN} more of the {count} rows checked"] if len(rejected) > SHOWN else []
        raise Problems(f"data: {len(rejected)} of {count} rows cannot be used:", [*rejected[:SHOWN], *more])
    return Sample(row_format.name, scorable)


def _check_rendering(renderer: Renderer, row: Row) -> None:
    """Raise Invalid if the chat template rejects a row or hides its answers."""
    reject_control_tokens(renderer, row)
    (rendered,) = render_rows(renderer, [row])
    if isinstance(rendered, Invalid):
        raise rendered
