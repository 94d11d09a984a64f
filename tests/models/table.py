"""The table of docs/data.md: what is trained of small conversations, by chat template.

python -m tests.models.table writes it into the page. The part with TRL's templates needs .venv-trl (make .venv-trl).
"""

import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from forge.core.errors import ForgeError
from forge.models.chat_format import TemplateError
from tests.models.families import FAMILIES, QWEN, UNUSABLE, byte_level, tokenizer_of
from tests.models.trained import chat_of, trained_turns

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data.md"
MARKS = {name: (f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n") for name in ("families", "trl")}
TRL = sorted(ROOT.glob(".venv-trl/lib/python3*/site-packages/trl/chat_templates/*.jinja"))

SYSTEM, QUESTION = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Well?"}
ANSWER = {"role": "assistant", "content": "Yes."}
REASONED = {**ANSWER, "reasoning_content": "Hm."}
TAGGED = {**ANSWER, "content": "<think>\nHm.\n</think>\n\nYes."}
IDS = ("abcdefgh1", "abcdefgh2")
AT = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks there.", "parameters": AT}}]


def _called(*places: str) -> list[dict[str, Any]]:
    """A question, calls in one turn, their results, and the answer."""
    functions = [{"name": "look", "arguments": {"at": place}} for place in places]
    calls = [{"id": IDS[at], "type": "function", "function": function} for at, function in enumerate(functions)]
    results = [{"role": "tool", "content": "Blue.", "tool_call_id": IDS[at]} for at in range(len(places))]
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, *results, ANSWER]


CONVERSATIONS = {
    "answer": [QUESTION, ANSWER],
    "two turns": [QUESTION, ANSWER, QUESTION, ANSWER],
    "after a system message": [SYSTEM, QUESTION, ANSWER],
    "a call, its result, the answer": _called("sky"),
    "two calls, their results, the answer": _called("sky", "sea"),
    "answer with reasoning_content": [QUESTION, REASONED],
    "two turns with reasoning_content": [QUESTION, REASONED, QUESTION, REASONED],
    "reasoning as &lt;think&gt; in the content": [QUESTION, TAGGED],
}
NAMED = {"answer": "answer", "answer with reasoning_content": "with reasoning"}
NOTES = {
    "leaves out the row's tools": "the template does not show tools",
    "leaves out the row's tool calls": "the template leaves out a call",
    "leaves out the row's arguments of tool calls": "the template leaves out a call",
    "leaves out the row's reasoning_content": "the template leaves out the reasoning",
    "leaves out the row's assistant message": "the template leaves out the reasoning",
    "leaves out the row's system message": "the template leaves out the system message unless a question is last",
    "leaves out the row's user message": "the template takes content in parts only",
    "has no element": "the template takes content in parts only",
    "has no attribute 'text'": "the template takes content in parts only",
    "only supports single tool-calls": "the template takes one call in a turn",
    "must alternate": "the template takes no tool messages",
    "System role not supported": "the template takes no system message",
    "so rows need reasoning_content": "the prompt opens <think>, and the row has no reasoning",
    "so the template must go on with": "the prompt opens <think>, and the template does not go on with the reasoning",
    "rows must have no reasoning": "the prompt ends with an empty <think> block, and the row has reasoning",
    "lacks the header of the turn": "the prompt after the result lacks the header of the turn",
    "no control token ends": "no control token ends the turn",
    "renders the messages before it differently": "the conversation before the answer is not the prompt of a server",
}


@cache
def families() -> dict[str, Any]:
    """A tokenizer of each family, by its name."""
    return {name: tokenizer_of(name) for name in [*FAMILIES, *UNUSABLE]}


@cache
def of_trl() -> dict[str, Any]:
    """A tokenizer with each of TRL's templates, and with the control tokens that are written in it, by its name."""
    base = byte_level(["<bos>", "<eos>"], "").backend_tokenizer.to_str()
    named = (
        r"<\|[^|<>\s'\"]+\|?>|<[a-z_]+\|>|<\|\"\|>|<｜[^<>]+?｜>|</?s>|<(?:start|end)_of_(?:turn|utterance)>|\[/?INST\]"
    )
    tokenizers = {}
    for path in TRL:
        template = path.read_text()
        tokenizer = Tokenizer.from_str(base)
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(re.findall(named, template))]
        )
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
        fast.chat_template = template
        tokenizers[path.stem] = fast
    return tokenizers


@cache
def outcome(tokenizer: Any) -> dict[str, list[str | None] | str]:
    """What is trained of each conversation, or why it is rejected; only the latter if it rejects the smallest one."""
    try:
        chat_of(tokenizer).renderer.probe()
    except ForgeError as error:
        return {"": _note(str(error))}
    found: dict[str, list[str | None] | str] = {}
    for name, messages in CONVERSATIONS.items():
        tools = TOOLS if any("tool_calls" in message for message in messages) else None
        try:
            found[name] = trained_turns(tokenizer, messages, tools)
        except TemplateError as error:
            found[name] = _note(error.message)
    return found


def _note(message: str) -> str:
    return next(note for part, note in NOTES.items() if part in message)


def _cells(found: dict[str, list[str | None] | str], notes: dict[str, int]) -> Iterator[str]:
    """The cells of a row. A turn that an earlier column has is called by its name."""
    if "" in found:
        yield f"not usable ({notes.setdefault(str(found['']), len(notes) + 1)})"
        yield from [""] * (len(CONVERSATIONS) - 1)
        return
    known: dict[str, str] = {}
    for name, turns in found.items():
        if isinstance(turns, str):
            yield f"rejected ({notes.setdefault(turns, len(notes) + 1)})"
            continue
        yield ", ".join("*read*" if turn is None else known.get(turn) or _code(turn) for turn in turns)
        if name in NAMED and turns[0] is not None:
            known.setdefault(turns[0], NAMED[name])


def _code(text: str) -> str:
    """A text as Markdown, also within a table: a code span cannot have vertical bars there on all sites."""
    shown = html.escape(text.replace("\n", "\\n").replace(" ", "␣", text.startswith(" ")), quote=False)
    return "<code>" + re.sub(r"[|`_*\[\]]", lambda match: f"&#{ord(match.group())};", shown) + "</code>"


def _table(rows: dict[str, dict[str, list[str | None] | str]]) -> str:
    """A Markdown table of outcomes; templates with the same one share a row."""
    notes: dict[str, int] = {}
    lines = ["| template | " + " | ".join(CONVERSATIONS) + " |", "|---" * (len(CONVERSATIONS) + 1) + "|"]
    same: dict[str, list[str]] = {}
    for name, found in rows.items():
        same.setdefault(" | ".join(_cells(found, notes)), []).append(name)
    lines += [f"| {'; '.join(names)} | {cells} |" for cells, names in same.items()]
    numbered = [f"{number}. {html.escape(note, quote=False)}" for note, number in notes.items()]
    return "\n".join([*lines, "", "Reasons:", "", *numbered]) + "\n"


def family_table() -> str:
    """The table of the families in tests/models/families.py."""
    return _table({name: outcome(tokenizer) for name, tokenizer in families().items()})


def trl_table() -> str:
    """The table of the templates in TRL's package."""
    return _table({name: outcome(tokenizer) for name, tokenizer in of_trl().items()})


def on_page(name: str) -> str:
    """The table that the page has."""
    begin, end = MARKS[name]
    return PAGE.read_text().partition(begin)[2].partition(end)[0].strip("\n") + "\n"


def write() -> None:
    """Write the tables into the page."""
    tables = {"families": family_table()} | ({"trl": trl_table()} if TRL else {})
    for name, table in tables.items():
        begin, end = MARKS[name]
        head, _, rest = PAGE.read_text().partition(begin)
        PAGE.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    write()
