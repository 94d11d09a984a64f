"""Held-out items in a model's tokens: the prompt to answer, and the conversation with the tokens that are scored."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge.core.errors import ForgeError
from forge.models.chat import ChatTokenizer, load_tokenizer
from forge.models.chat_format import TemplateError, chat_format
from forge.registry.packages import LocalBase
from tasks.evaluate.items import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """An item in a model's tokens: the prompt, and the whole conversation with the indices of the scored tokens.

    The scored tokens are those that training on the conversation would train. All three lists are empty if the
    model's chat template cannot handle the conversation; a model cannot be trained on such a row either.
    """

    prompt: list[int]
    whole: list[int]
    scored: list[int]


def ask_all(of: LocalBase, items: Sequence[Item], quiet: bool = False) -> list[Asked]:
    """Every item in a model's tokens; rejected ones are empty, and their number is logged unless `quiet`.

    Raises ForgeError if the model has no tokenizer or chat template, or its template rejects every item.
    """
    chat = ChatTokenizer(load_tokenizer(of), f"model {of.location}")
    asked, rejected, reason = [], 0, ""
    for item in items:
        try:
            asked.append(ask(chat, item))
        except TemplateError as error:
            reason = error.message
            asked.append(Asked([], [], []))
            rejected += 1
    where = f"evaluation: {of.location}"
    if rejected == len(items):
        raise ForgeError(
            f"none of the {rejected} conversations can be scored ({reason})",
            where=where,
            fix="fix its chat_template.jinja",
        )
    if rejected and not quiet:
        log.warning(
            f"{where}: {rejected} of {len(items)} conversations cannot be scored ({reason}); they count as unanswered"
        )
    return asked


def ask(chat: ChatTokenizer, item: Item) -> Asked:
    """An item in a model's tokens; TemplateError if it cannot be trained on, and so not be scored."""
    prompt = chat.prompt(item.messages, item.tools)
    whole, trained = chat.conversation(item.conversation, item.tools, item.untrained)
    scored: list[int] = np.flatnonzero(trained).tolist()
    if not scored:
        raise TemplateError("nothing to train", "no token belongs to an assistant turn")
    return Asked(prompt, whole, scored)


def shows_date(of: LocalBase) -> bool:
    """Whether a model's chat template writes today's date: its server then builds a different prompt every day."""
    return chat_format(load_tokenizer(of), f"model {of.location}").shows_date
