"""What is trained of a conversation, in tokens; and texts for conversations."""

from functools import cache
from itertools import groupby
from typing import Any

from hypothesis import strategies as st

from forge.models.chat import ChatTokenizer
from forge.models.chat_format import TemplateError
from forge.models.left_out import THINK

# Any texts, and those that look like what templates write.
LOOKALIKES = ["assistant", "model\n", "user", "final", "tool", "<|im_end", "im_end|>", "<|im_ end|>", "<|IM_END|>",
              "</ s>", "[/ INST]", "<start_of_turn", "<think>", "</think>", "\n", "\n\n", " ", "\t", "\u00a0", "Yes.",
              "{{ x }}", "{% if %}", "日本", "e\u0301"]  # fmt: skip
CHARACTERS = st.characters(codec="utf-8", exclude_characters="▁")  # which tokenizers decode to a space
TEXTS = st.lists(st.one_of(st.sampled_from(LOOKALIKES), st.text(CHARACTERS, max_size=6)), min_size=1, max_size=4).map(
    "".join
)


@cache
def chat_of(tokenizer: Any) -> ChatTokenizer:
    """One for all rows, as in a run."""
    return ChatTokenizer(tokenizer, "test")


def trained_turns(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[str | None]:
    """The trained tokens of each assistant turn, decoded; None for a turn that is only read.

    Raises TemplateError for a row that is rejected. Checks that a server's prompt has the tokens before each turn.
    """
    chat = chat_of(tokenizer)
    tokens, mask = chat.conversation(messages, tools)
    differing = chat.renderer.render(messages, tools).differing
    runs = [[at for at, _ in run] for trained, run in groupby(enumerate(mask), lambda pair: bool(pair[1])) if trained]
    turns: list[str | None] = []
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at in differing:
            turns.append(None)
        elif message["role"] == "assistant":
            run = runs.pop(0)
            assert chat.prompt(messages[:at], tools) == tokens[: run[0]]
            turns.append(tokenizer.decode([tokens[number] for number in run]))
    assert not runs
    return turns


def squashed(text: str) -> str:
    """A text without white space, which templates trim."""
    return "".join(text.split())


def check_trained(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    """Each trained turn of a conversation without calls has its reasoning and its content, in order, and its end.

    The row may be rejected, or earlier turns read alone.
    """
    try:
        turns = trained_turns(tokenizer, messages)
    except TemplateError:
        return
    assert turns[-1]
    ends = chat_of(tokenizer).renderer.render(messages, None).ends
    for turn, message in zip(turns, messages[1::2], strict=True):
        if turn is None:
            continue
        assert turn.endswith(tuple(ends))
        rest = squashed(THINK.sub("", turn))
        for part in [*THINK.split(message.get("reasoning_content", "")), *THINK.split(message["content"])]:
            at = rest.find(squashed(part))
            assert at >= 0
            rest = rest[at + len(squashed(part)) :]
        assert squashed(message.get("reasoning_content", "")) in squashed(turn)
