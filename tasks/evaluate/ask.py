"""Items in a model's tokens: what it is given, and which tokens its likelihood is taken of."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from forge.core.contracts import TODAY
from forge.core.errors import ForgeError
from forge.registry.packages import LocalBase
from tasks.evaluate.items import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """An item in a model's tokens: the prompt, and the whole conversation with the places that are scored.

    All three are empty where the model's chat template refuses the conversation, as its server would.
    """

    prompt: list[int]
    whole: list[int]
    scored: list[int]


def ask_all(of: LocalBase, items: Sequence[Item], quiet: bool = False) -> list[Asked]:
    """Every item in a model's tokens; one that its chat template refuses is empty, and, unless `quiet`, a line says so.

    Raises ForgeError where there is no tokenizer, or the template refuses all of them.
    """
    tokenizer = load_tokenizer(of)
    asked, refused, reason = [], 0, ""
    for item in items:
        try:
            asked.append(ask(tokenizer, item))
        except ForgeError as error:
            raise ForgeError(f"evaluation: {of.location}: {error.message}") from None
        except Exception as error:  # whatever a template raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            asked.append(Asked([], [], []))
            refused += 1
    if refused == len(items):
        raise ForgeError(
            f"evaluation: {of.location}: its chat template refuses every conversation ({reason}); mend its "
            "chat_template.jinja"
        )
    if refused and not quiet:
        log.warning(
            f"{of.location}: its chat template refuses {refused} of {len(items)} conversations ({reason}), "
            "which count as not answered"
        )
    return asked


def ask(tokenizer: Any, item: Item) -> Asked:
    """An item in a model's tokens, as its chat template gives it."""
    conversation = item.conversation
    prompt = render(tokenizer, item, conversation[:-1])
    whole = render(tokenizer, item, conversation)
    ends = {tokenizer.eos_token_id} | {
        tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
    }
    scored: list[int] = []
    for at, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        last = at == len(conversation) - 1
        before = prompt if last else render(tokenizer, item, conversation[:at])
        upto = whole if last else render(tokenizer, item, conversation[: at + 1])
        if whole[: len(before)] != before or whole[: len(upto)] != upto:
            if last:
                raise ForgeError("the chat template's prompt is not the beginning of its conversation; mend it")
            continue  # a template that shows earlier turns in another way: what it makes of them was not trained
        span = list(range(len(before), len(upto)))
        while len(span) > 1 and whole[span[-1]] not in ends and any(whole[place] in ends for place in span):
            span.pop()  # what follows the end of the turn is not the assistant's
        scored += span
    if not scored:
        raise ForgeError("the chat template gives no tokens to an answer; mend its assistant turn")
    return Asked(prompt, whole, scored)


def render(tokenizer: Any, item: Item, messages: list[dict[str, Any]]) -> list[int]:
    """A conversation's tokens; after anything but an assistant's turn, the beginning of one."""
    # As apply_chat_template does it, which has no way to be told the date.
    template = _compile_jinja_template(tokenizer.get_chat_template(tools=item.tools))
    text = template.render(
        messages=messages,
        tools=item.tools,
        documents=None,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        strftime_now=TODAY.strftime,
        **tokenizer.special_tokens_map,
    )
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def tells_date(of: LocalBase) -> bool:
    """Whether a model's chat template tells the date: its server then gives it other tokens every day."""
    return "strftime_now" in load_tokenizer(of).get_chat_template()


def load_tokenizer(of: LocalBase) -> Any:
    """A model's tokenizer, padding on the left."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            of.location, revision=of.revision or None, padding_side="left", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ForgeError(f"evaluation: {of.location}: no tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
