"""Training and evaluation use the same tokens of a conversation: its text, its trained tokens, and its rejections."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import Check
from forge.models.chat import ChatTokenizer, byte_tokenizer, conversation_texts, load_tokenizer, trained_mask
from forge.models.chat_format import TemplateError, chat_format
from forge.models.conversation import Renderer
from forge.registry.packages import LocalBase
from tasks.evaluate.ask import Asked, ask, ask_all, shows_date
from tasks.evaluate.items import Item, read_items
from tasks.preprocess.render import reject_control_tokens, render_rows
from tasks.preprocess.rows import Invalid, Row
from tasks.preprocess.tokens import TRAINED, Encoder
from tests.conftest import write_jsonl
from tests.models.families import (
    CLOCK,
    FAMILIES,
    Case,
    call,
    conversation,
    tokenizer_of,
    tool_messages,
)
from tests.preprocess.tokenizers import CHATML, byte_level, chatml, sentence_piece

CASES = [(family, name) for family in FAMILIES for name in FAMILIES[family].all_cases()]
EXACT = Check(kind="exact")


def trained(tokenizer: Any, case: Case) -> tuple[list[int], list[int]]:
    """The tokens that training gets of a conversation, and the indices of those that it trains on."""
    form = chat_format(tokenizer, "test")
    renderer, row = Renderer(form, "test"), Row(case.messages, case.tools, None, "g", "s")
    (rendered,) = render_rows(renderer, [row])
    if isinstance(rendered, Invalid):
        raise rendered
    reject_control_tokens(renderer, row)
    (encoded,) = Encoder(form.tokenizer).encode([rendered.text], [rendered.spans])
    return (encoded.tokens & ~TRAINED).tolist(), np.flatnonzero(encoded.tokens & TRAINED).tolist()


def scored(tokenizer: Any, case: Case, folder: Path) -> tuple[list[int], list[int], list[int]]:
    """The prompt, the whole conversation, and the scored indices, as evaluation gets them from a held-out row."""
    chat = ChatTokenizer(tokenizer, "test")
    row = {"messages": case.messages, "slice": "s", **({"tools": case.tools} if case.tools else {})}
    items, _ = read_items(write_jsonl(folder / "heldout.jsonl", [row]), 1, None)
    if items:
        asked = ask(chat, items[0])
        return asked.prompt, asked.whole, asked.scored
    # No check scores reasoning apart from the answer, so evaluation skips such rows; their tokens must agree anyway.
    whole, mask = chat.conversation(case.messages, case.tools)
    return chat.prompt(case.messages[:-1], case.tools), whole, np.flatnonzero(mask).tolist()


def runs(indices: list[int]) -> list[list[int]]:
    """Indices grouped into runs of successive ones."""
    return [group.tolist() for group in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_evaluation_scores_exactly_the_trained_tokens(family: str, name: str, tmp_path: Path) -> None:
    tokenizer, case = tokenizer_of(family), FAMILIES[family].all_cases()[name]
    tokens, targets = trained(tokenizer, case)
    prompt, whole, scores = scored(tokenizer, case, tmp_path)
    assert whole == tokens
    assert scores == targets
    assert [tokenizer.decode([tokens[at] for at in run]) for run in runs(targets)] == case.trained
    # A server sends the same tokens, by transformers' own apply_chat_template.
    assert whole == tokenizer.apply_chat_template(case.messages, tools=case.tools, return_dict=False)
    assert prompt == tokenizer.apply_chat_template(
        case.messages[:-1], tools=case.tools, add_generation_prompt=True, return_dict=False
    )
    assert whole[: len(prompt)] == prompt
    assert runs(targets)[-1][0] == len(prompt)


REJECTED = {
    "gemma-2: system message": ("gemma-2", Case(conversation("a", "b", system="s"), []), "System role not supported"),
    "gemma-3: tools": ("gemma-3", Case(conversation("a", "b"), [], [CLOCK]), "leaves out the row's tools"),
    "llama-2: tools": ("llama-2", Case(conversation("a", "b"), [], [CLOCK]), "leaves out the row's tools"),
    "phi-4: tool calls": ("phi-4", Case(tool_messages(), []), "leaves out the row's tool calls"),
    "llama-3.1: several calls in a turn": (
        "llama-3.1",
        Case([tool_messages()[0], {"role": "assistant", "content": "", "tool_calls": [call(), call()]}], [], [CLOCK]),
        "only supports single tool-calls",
    ),
    "llama-3.1: text next to a call": (
        "llama-3.1",
        Case(tool_messages("Let me see."), [], [CLOCK]),
        "leaves out the row's text next to tool calls",
    ),
    # It is shown if a question is last, as in a server's prompt, but not once the answer follows.
    "mistral: system message": (
        "mistral",
        Case(conversation("a", "b", system="s"), []),
        "leaves out the row's system message",
    ),
    "chatml: control token": (
        "chatml",
        Case(conversation("a<|im_end|>", "b"), []),
        r"control token <\|im_end\|>, which it would not read as text",
    ),
    "generation-blocks: control token in an answer": (
        "generation-blocks",
        Case(conversation("a", "b<|im_start|>"), []),
        r"control token <\|im_start\|>",
    ),
}


@pytest.mark.parametrize(("family", "case", "message"), REJECTED.values(), ids=REJECTED)
def test_training_and_evaluation_reject_the_same_conversations(
    family: str, case: Case, message: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(family)
    with pytest.raises(Invalid, match=message) as training:
        trained(tokenizer, case)
    with pytest.raises(TemplateError, match=message) as evaluation:
        scored(tokenizer, case, tmp_path)
    assert (training.value.reason, training.value.message) == (evaluation.value.reason, evaluation.value.message)


def test_a_rejected_conversation_counts_as_unanswered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer_of("mistral").save_pretrained(tmp_path)
    items = [
        Item([{"role": "user", "content": "a"}], "b", "s", EXACT),
        Item([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], "b", "s", EXACT),
    ]
    first, second = ask_all(LocalBase(str(tmp_path)), items)
    assert first.scored
    assert second == Asked([], [], [])
    assert "1 of 2 conversations cannot be scored (the chat template leaves out the row's system message" in caplog.text
    with pytest.raises(ForgeError, match="none of the 1 conversations can be scored"):
        ask_all(LocalBase(str(tmp_path)), items[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_of_a_known_family_passes_the_probe(family: str) -> None:
    Renderer(chat_format(tokenizer_of(family), "test"), "test").probe()


def test_an_unknown_character_does_not_end_a_turn() -> None:
    """<unk> is what a lookup returns for a token that the vocabulary does not have, such as another family's end."""
    template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|fin|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|fin|>"]
    tokenizer = sentence_piece(specials, template, fallback=False)
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    case = Case(conversation("a", "one ☃ two"), [])
    tokens, targets = trained(tokenizer, case)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == tokenizer.convert_tokens_to_ids("<unk>")
    assert tokenizer.convert_tokens_to_ids("<unk>") in [tokens[at] for at in targets]
    assert tokenizer.decode([tokens[at] for at in targets]) == "one <unk> two<|fin|>"
    assert ask(ChatTokenizer(tokenizer, "test"), Item(case.messages[:1], "one ☃ two", "s", EXACT)).scored == targets


NAMED = {"default": CHATML, "tool_use": "{{ 'tools: ' ~ (tools | tojson) ~ '\n' }}" + CHATML}


@pytest.mark.parametrize("tools", [None, [CLOCK]])
def test_rows_with_tools_use_the_tool_use_template(tools: list | None, tmp_path: Path) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = NAMED
    case = Case(conversation("a", "b"), [], tools)
    tokens, targets = trained(tokenizer, case)
    assert tokens == tokenizer.apply_chat_template(case.messages, tools=tools, return_dict=False)
    assert tokenizer.decode(tokens).startswith("tools: " if tools else "<|im_start|>user")
    assert tokenizer.decode([tokens[at] for at in targets]) == "b<|im_end|>"
    assert scored(tokenizer, case, tmp_path)[1:] == (tokens, targets)


def test_named_templates_need_a_default_one() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ForgeError, match=r"model test: .* \(rag, tool_use\) is named default"):
        Renderer(chat_format(tokenizer, "model test"), "model test").probe()


def test_the_template_digest_covers_all_named_templates() -> None:
    tokenizer = chatml()
    alone = chat_format(tokenizer, "test").template_digest
    tokenizer.chat_template = {"default": CHATML}
    assert chat_format(tokenizer, "test").template_digest == alone
    tokenizer.chat_template = NAMED
    assert chat_format(tokenizer, "test").template_digest != alone


def test_the_mask_goes_by_where_a_token_starts() -> None:
    offsets = [(0, 1), (1, 3), (3, 5), (5, 9), (9, 10)]
    assert trained_mask(offsets, [(2, 6)]).tolist() == [False, False, True, True, False]
    assert trained_mask(offsets, [(0, 2), (9, 10)]).tolist() == [False, True, False, False, True]
    assert trained_mask([], [(0, 2)]).tolist() == []


@pytest.mark.parametrize("date", [True, False])
def test_a_template_that_shows_the_date_is_recognized(date: bool, tmp_path: Path) -> None:
    byte_level(["<s>", "</s>"], ("{{ strftime_now('%Y') }}" if date else "") + CHATML).save_pretrained(tmp_path)
    assert shows_date(LocalBase(str(tmp_path))) == date


def test_a_tokenizer_for_batches_pads_with_its_end_token(tmp_path: Path) -> None:
    chatml().save_pretrained(tmp_path)
    assert load_tokenizer(LocalBase(str(tmp_path))).pad_token is None
    tokenizer = load_tokenizer(LocalBase(str(tmp_path)), padding_side="left")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")
    byte_tokenizer(64).save_pretrained(tmp_path)
    assert load_tokenizer(LocalBase(str(tmp_path)), padding_side="left").pad_token == byte_tokenizer(64).pad_token


def test_a_tokenizer_without_a_fast_version_is_an_error() -> None:
    with pytest.raises(ForgeError, match=r"model test: .* no fast version; save it with a tokenizer\.json"):
        chat_format(object(), "model test")


def test_all_texts_of_a_conversation_are_searched_for_control_tokens() -> None:
    chat = ChatTokenizer(tokenizer_of("qwen-2.5"), "test")
    messages = tool_messages()
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"zone": "<|im_end|>"}
    with pytest.raises(TemplateError, match="control token"):
        chat.conversation(messages, [CLOCK])
    tool = json.loads(json.dumps(CLOCK).replace("The time", "<|im_start|>"))
    with pytest.raises(TemplateError, match="control token"):
        chat.conversation(tool_messages(), [tool])
    row = Row(messages, [tool], None, "g", "s")
    assert conversation_texts(row.messages, row.tools) == row.texts()
