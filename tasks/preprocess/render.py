"""Rows rendered with a model's chat template; a row that cannot be rendered is rejected, alone."""

from collections.abc import Sequence

from forge.models.chat_format import TemplateError
from forge.models.conversation import Rendered, Renderer
from tasks.preprocess.rows import Invalid, Row


def render_rows(renderer: Renderer, rows: Sequence[Row]) -> list[Rendered | Invalid]:
    """Each row's text with its trained turns, or why it is rejected."""
    return [_render(renderer, row) for row in rows]


def reject_control_tokens(renderer: Renderer, row: Row) -> None:
    """Raise Invalid if one of a row's texts contains a control token of the model."""
    try:
        renderer.check_control_tokens(row.texts())
    except TemplateError as error:
        raise Invalid(error.reason, error.message) from None


def _render(renderer: Renderer, row: Row) -> Rendered | Invalid:
    if row.text is not None:
        return renderer.plain(row.text)
    try:
        return renderer.render(row.messages, row.tools, row.untrained)
    except TemplateError as error:
        return Invalid(error.reason, error.message)
