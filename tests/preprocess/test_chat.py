"""The trained tokens are those of the assistant's turns, including their end tokens, and no others."""

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, processors

from forge.core.errors import ForgeError
from forge.models.chat import byte_tokenizer, load_tokenizer
from forge.models.chat_format import chat_format
from forge.models.conversation import GENERATION, Renderer
from forge.registry.packages import LocalBase
from tasks.preprocess.render import render_rows
from tasks.preprocess.rows import Invalid, Row
from tasks.preprocess.tokens import TRAINED, Encoder
from tests.preprocess.tokenizers import CHATML, FAMILIES, LLAMA3, byte_level, chatml, llama3

ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def row(*contents: str, system: str = "") -> Row:
    """A conversation of user and assistant in turn, the user first."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return Row([{"role": "system", "content": system}, *messages] if system else messages, None, None, "g", "s")


def encode(tokenizer: Any, conversation: Row) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens, and which are trained; Invalid if it is rejected."""
    form = chat_format(tokenizer, "base model test")
    (rendered,) = render_rows(Renderer(form, "base model test"), [conversation])
    if isinstance(rendered, Invalid):
        raise rendered
    (document,) = Encoder(form.tokenizer).encode([rendered.text], [rendered.spans])
    return document.tokens & ~TRAINED, (document.tokens & TRAINED) > 0


def trained_text(tokenizer: Any, conversation: Row) -> str:
    tokens, trained = encode(tokenizer, conversation)
    return tokenizer.decode(tokens[trained])


CONVERSATIONS = [
    row("When does it leave?", "At 10:42."),
    row("één ✓\n", "twee – 日本 🚆\n\nand a line"),
    row("a", "b", "c", "it's d"),
    row("the answer", "the answer", "the answer", "the answer"),  # user and assistant say the same
    row("x", "\n\nbegins with lines"),
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_are_the_answers_and_their_end_tokens(family: str, conversation: Row) -> None:
    tokenizer = FAMILIES[family]()
    answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    if family in ("llama3", "gemma"):  # their templates strip white space
        answers = [answer.strip() for answer in answers]
    if family == "mistral":  # its template starts an answer with a space
        answers = [f" {answer}" for answer in answers]
    assert trained_text(tokenizer, conversation) == "".join(answer + ENDS[family] for answer in answers)
    tokens, _ = encode(tokenizer, conversation)
    assert tokens.tolist() == tokenizer.apply_chat_template(conversation.messages, return_dict=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_follow_the_prompt_of_a_server(family: str) -> None:
    conversation = row("When does it leave?", "At 10:42.")
    tokenizer = FAMILIES[family]()
    tokens, trained = encode(tokenizer, conversation)
    prompt = tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True, return_dict=False)
    assert tokens[: int(trained.argmax())].tolist() == prompt


@pytest.mark.parametrize("family", ["llama3", "chatml"])
def test_a_system_message_is_not_trained(family: str) -> None:
    tokenizer = FAMILIES[family]()
    conversation = row("a", "b", system="be brief")
    assert trained_text(tokenizer, conversation) == f"b{ENDS[family]}"
    assert "be brief" in tokenizer.decode(encode(tokenizer, conversation)[0])


@pytest.mark.parametrize(("family", "message"), [("mistral", "Only user and assistant"), ("gemma", "System role not")])
def test_a_rejection_quotes_the_template(family: str, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        encode(FAMILIES[family](), row("a", "b", system="be brief"))


def with_block(inside: str, after: str = "") -> str:
    """Llama 3's template with the assistant's turn in a generation block."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ "
        + inside
        + " }}{% endgeneration %}{{ "
        + after
        + " }}"
        "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize(
    "template",
    [
        with_block("message['content'] | trim + '<|eot_id|>'", "''"),
        with_block("message['content'] | trim", "'<|eot_id|>'"),  # the end token outside the block
        with_block("message['content'] | trim + '<|eot_id|>\n'", "''"),
    ],
)
def test_generation_blocks_are_trained_with_their_end_token(template: str) -> None:
    tokenizer = byte_level(LLAMA3_SPECIALS, template)
    assert GENERATION.search(template)
    for conversation in CONVERSATIONS:
        answers = [m["content"].strip() for m in conversation.messages if m["role"] == "assistant"]
        assert trained_text(tokenizer, conversation) == "".join(f"{answer}<|eot_id|>" for answer in answers)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "no chat template"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "never stop"),
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{{ raise_exception('no') }}", "no"),
        (with_block("message['content'] | trim", "'\n'"), "never stop"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ messages[0].content + m.content "
            "+ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "marks 'askanswer<|eot_id|>'",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
            "marks 'assistant: answer<|eot_id|>' as the assistant's turn",
        ),
        ("{{ bos_token if add_generation_prompt else '' }}" + CHATML, "differently than in a server's prompt"),
        ("{% if %}", "cannot be used"),
    ],
)
def test_a_template_whose_turns_cannot_be_found_is_an_error(template: str, message: str) -> None:
    form = chat_format(byte_level(LLAMA3_SPECIALS, template), "base model test")
    with pytest.raises(ForgeError) as caught:
        Renderer(form, "base model test").probe()
    assert caught.value.message.startswith("base model test: ")
    assert message in caught.value.message


def test_a_template_that_renders_the_last_turn_differently() -> None:
    """Like Qwen 3's, which drops the reasoning of all turns but the last: a server has no turn written without it."""
    think = "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '')"
    thinking = LLAMA3.replace("+ message['content'] | trim", f"+ {think} + message['content'] | trim")
    tokenizer = byte_level(LLAMA3_SPECIALS, thinking)
    assert trained_text(tokenizer, row("a", "b", "c", "d")) == "<think>\n\n</think>\n\nd<|eot_id|>"


def test_an_end_token_that_absorbs_the_line_break_after_it_is_trained() -> None:
    """Like Phi 3's <|end|>, an added token with rstrip."""
    tokenizer = byte_level(["<s>", "<|end|>"], CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "<s>"))
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    tokens, trained = encode(tokenizer, row("a", "b", "c", "d"))
    assert tokenizer.decode(tokens[trained]) == "b<|end|>d<|end|>"


def test_a_post_processor_does_not_hide_the_spaces_of_code() -> None:
    tokenizer = byte_level(LLAMA3_SPECIALS, LLAMA3)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert trained_text(tokenizer, row("a", "if x:\n    return  1")) == "if x:\n    return  1<|eot_id|>"


def test_labels_do_not_depend_on_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = row("word", "label", "two", "second")
    cached = trained_text(llama3(), conversation), trained_text(byte_tokenizer(64), conversation)
    monkeypatch.setattr("tasks.preprocess.tokens.MOST_PIECES", 0)
    assert (trained_text(llama3(), conversation), trained_text(byte_tokenizer(64), conversation)) == cached


def test_tool_calls_are_only_read_where_reasoning_is_shown_in_the_last_turn_only() -> None:
    """As in Qwen 3: a server has the call written after <think>, and then shows it without."""
    think = "{{ '<think>\n\n</think>\n\n' if loop.last and message.role == 'assistant' else '' }}"
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        CHATML.replace("{% if message.content", think + "{% if message.content"),
    )
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "10:42"},
        {"role": "assistant", "content": "It is 10:42."},
    ]
    decoded = trained_text(tokenizer, Row(messages, None, None, "g", "s"))
    assert decoded == "<think>\n\n</think>\n\nIt is 10:42.<|im_end|>"


def test_a_template_must_mark_every_turn() -> None:
    template = with_block("message['content'] | trim + '<|eot_id|>'", "''").replace(
        "== 'assistant'", "== 'assistant' and loop.last"
    )
    with pytest.raises(Invalid, match="marks 1 of 2 assistant turns"):
        encode(byte_level(LLAMA3_SPECIALS, template), row("a", "b", "c", "d"))


def test_templates_write_the_pinned_date() -> None:
    tokenizer = byte_level(LLAMA3_SPECIALS, "{{ strftime_now('%d %b %Y') }}" + LLAMA3)
    assert tokenizer.decode(encode(tokenizer, row("a", "b"))[0]).startswith("26 Jul 2024")


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def test_tool_calls_are_trained_and_tool_results_are_not() -> None:
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "10:42"},
        {"role": "assistant", "content": "It is 10:42."},
    ]
    decoded = trained_text(chatml(), Row(messages, [{"name": "clock"}], None, "g", "s"))
    call = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
    assert decoded == f"{call}<|im_end|>It is 10:42.<|im_end|>"


def test_a_plain_text_is_trained_except_its_begin_token() -> None:
    tokenizer = llama3()
    tokens, trained = encode(tokenizer, Row([], None, "Once upon a time.", "g", "s"))
    assert tokenizer.decode(tokens) == "<|begin_of_text|>Once upon a time.<|eot_id|>"
    assert trained.tolist() == [False] + [True] * (len(tokens) - 1)


def test_a_rejected_row_does_not_affect_its_batch() -> None:
    tokenizer = byte_level(
        LLAMA3_SPECIALS,
        "{% if messages[0].content == 'bad' %}{{ raise_exception('a bad row') }}{% endif %}"
        + with_block("message['content'] | trim + '<|eot_id|>'", "''"),
    )
    renderer = Renderer(chat_format(tokenizer, "test"), "test")
    good, bad, other = render_rows(renderer, [row("a", "b"), row("bad", "b"), row("c", "d")])
    assert isinstance(bad, Invalid)
    assert "a bad row" in bad.message
    assert not isinstance(good, Invalid)
    assert not isinstance(other, Invalid)


def test_the_byte_tokenizer_decodes_what_it_encoded() -> None:
    tokenizer = byte_tokenizer(128)
    for conversation in CONVERSATIONS:
        answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        assert trained_text(tokenizer, conversation) == "".join(f"{answer}<|end|>" for answer in answers)


def test_the_error_for_a_missing_tokenizer_names_the_model(tmp_path) -> None:
    with pytest.raises(ForgeError, match=str(tmp_path)):
        load_tokenizer(LocalBase(str(tmp_path)), 128)
