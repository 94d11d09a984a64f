"""Each assistant turn is trained as the model has to write it when it is served, or the row is rejected or counted.

The templates are as in public bug reports of programs that do this job, made small.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.core.errors import ForgeError
from forge.models.chat_format import TemplateError, chat_format
from forge.models.conversation import Renderer
from forge.models.left_out import THINK
from tests.models.families import CLOCK, FAMILIES, UNUSABLE, call, conversation, tokenizer_of
from tests.models.families import byte_level as with_line_breaks
from tests.models.table import families
from tests.models.trained import TEXTS, check_trained, squashed, trained_turns
from tests.preprocess.tokenizers import byte_level

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}" + HEADER + "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + (c.function.arguments | tojson) }}"
    "{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# The last answer has its reasoning or an empty block; earlier ones have none.
THINKING = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m.role == 'assistant' %}{% set words = m.content.split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ words }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)


def renderer(template: str, specials: list[str] = SPECIALS) -> Renderer:
    return Renderer(chat_format(byte_level(specials, template), "test"), "test")


def trained(template: str, messages: list[dict[str, Any]], tools: Any = None, **more: Any) -> list[str]:
    """The text of each trained turn."""
    rendered = renderer(template, **more).render(messages, tools)
    return [rendered.text[begin:end] for begin, end in rendered.spans]


def asked(content: str = "", **more: Any) -> list[dict[str, Any]]:
    """A question and an answer."""
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, **more}]


def with_call(**more: Any) -> list[dict[str, Any]]:
    """A question, a call, its result and the answer."""
    return [*asked(tool_calls=[call()], **more), {"role": "tool", "content": "10:42"}, *conversation("", "It is.")[1:]]


# https://github.com/axolotl-ai-cloud/axolotl/issues/3088
def test_an_earlier_turn_that_the_template_renders_without_its_reasoning_is_not_trained() -> None:
    rendered = renderer(THINKING).render(conversation("a", "first", "b", "last"), None)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["<think>\n\n</think>\n\nlast<|im_end|>"]
    assert rendered.differing == (1,)
    messages = [*asked("one", reasoning_content="since"), *asked("two", reasoning_content="so")]
    rendered = renderer(THINKING).render(messages, None)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["<think>\nso\n</think>\n\ntwo<|im_end|>"]
    assert rendered.differing == (1,)


# https://github.com/huggingface/trl/issues/5721
def test_the_header_of_a_turn_is_not_trained_though_it_is_in_the_block() -> None:
    block = "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + block + "{% else %}" + HEADER
    template += "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    assert trained(template + PROMPT, conversation("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]


# As chat_templates/cohere2.jinja of https://github.com/huggingface/trl
def test_of_two_tokens_that_end_a_turn_the_last_is_trained() -> None:
    template = (
        "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}"
        "{{ '<|reply|>' + m.content + '<|end_reply|><|im_end|>\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<|reply|>' }}{% endif %}"
    )
    specials = [*SPECIALS, "<|reply|>", "<|end_reply|>"]
    turns = trained(template, conversation("a", "b", "c", "d"), specials=specials)
    assert turns == ["b<|end_reply|><|im_end|>", "d<|end_reply|><|im_end|>"]


def test_a_token_that_only_the_last_turn_has_is_not_trained() -> None:
    template = CHATML.replace(
        "{% endfor %}{% if add", "{% endfor %}{{ '<|endoftext|>' if not add_generation_prompt }}{% if add"
    )
    assert trained(template, conversation("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]


# https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/5389
@pytest.mark.parametrize("reasoning", ["", "so"])
def test_an_answer_after_reasoning_in_control_tokens_is_trained_whole(reasoning: str) -> None:
    shown = "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' }}{{ m.content }}"
    template = CHATML.replace("{{ m.content }}", shown, 1)
    (turn,) = trained(
        template, asked("answer", reasoning_content=reasoning), specials=[*SPECIALS, "<think>", "</think>"]
    )
    assert turn == f"{f'<think>{reasoning}</think>' if reasoning else ''}answer<|im_end|>"


LEFT_OUT = {
    # As chat_templates/lfm2.jinja of https://github.com/huggingface/trl
    "a call, though the tool's schema is shown": (
        CHATML.replace("in m.tool_calls or []", "in []"),
        with_call(),
        "tool calls",
    ),
    "the second of two calls": (
        CHATML.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
        asked(tool_calls=[call(), call()]),
        "tool calls",
    ),
    "arguments": (CHATML.replace("(c.function.arguments | tojson)", "''"), with_call(), "arguments of tool calls"),
    # As chat_templates/qwen2_5.jinja of https://github.com/huggingface/trl
    "reasoning before a call": (CHATML, with_call(reasoning_content="I need the clock"), "reasoning_content"),
    "reasoning of the answer": (CHATML, asked("b", reasoning_content="since"), "reasoning_content"),
    "the system message": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        conversation("a", "b", system="Be brief."),
        "system message",
    ),
    "the end of a long answer": (
        CHATML.replace("{{ m.content }}", "{{ m.content[:5] }}"),
        asked("too long"),
        "message",
    ),
}


@pytest.mark.parametrize(("template", "messages", "what"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_row_is_rejected_if_the_template_leaves_something_out(template: str, messages: list, what: str) -> None:
    tools = [CLOCK] if any("tool_calls" in message for message in messages) else None
    with pytest.raises(TemplateError, match=f"leaves out the row's .*{what}"):
        trained(template, messages, tools)


# https://github.com/oumi-ai/oumi/issues/2605
@pytest.mark.parametrize("write", ["c.function.arguments", "(c.function.arguments ~ '')"])
def test_arguments_are_text_for_a_template_that_takes_text(write: str) -> None:
    template = CHATML.replace("(c.function.arguments | tojson)", write)
    call_turn, _ = trained(template, with_call())
    assert call_turn == '<tool_call>clock {"zone": "UTC"}</tool_call><|im_end|>'


def test_turns_do_not_depend_on_the_rows_before() -> None:
    """A template that strips reasoning from earlier turns, after plain rows that have taught it how turns end."""
    strips = CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}"
    )
    answer = "<think>\n\n</think>\n\nYes."
    messages = conversation("Is it?", answer, "And this, which is long?", answer)
    known = renderer(strips)
    known.render(conversation("a", "b", "c", "d"), None)
    for one in (known, renderer(strips)):
        rendered = one.render(messages, None)
        assert [rendered.text[begin:end] for begin, end in rendered.spans] == [f"{answer}<|im_end|>"]
        assert rendered.differing == (1,)
    qwen = Renderer(chat_format(tokenizer_of("qwen-3"), "test"), "test")
    reply = "<tool_response>\nx\n</tool_response>"
    qwen.render(conversation("a", "<think>\nr\n</think>\n\nb", reply, "<think>\ns\n</think>\n\nd"), None)
    assert qwen.render(conversation("a", "b", "c", "d"), None).differing == (1,)


def test_blocks_of_a_template_that_strips_reasoning() -> None:
    block = "{% generation %}{{ (m.content if loop.last else m.content.split('</think>')[-1]) + '<|im_end|>\n' }}"
    template = "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}" + block + "{% endgeneration %}"
    template += "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
    rendered = renderer(template).render(conversation("a", "<think>r</think>b", "c", "<think>s</think>d"), None)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["<think>s</think>d<|im_end|>"]
    assert rendered.differing == (1,)


def test_a_block_around_the_last_token_alone() -> None:
    """As in TRL's template for training Phi 3."""
    block = "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    template = "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}" + block + "{% else %}"
    template += "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    template += "{% if not add_generation_prompt %}{% generation %}{{ '<|endoftext|>' }}{% endgeneration %}{% endif %}"
    assert trained(template + PROMPT, conversation("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_prompt_that_opens_the_reasoning_needs_reasoning() -> None:
    shown = "{{ ('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content }}"
    template = CHATML.replace("{{ m.content }}", shown, 1).replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"
    )
    renderer(template).probe()
    assert trained(template, asked("b", reasoning_content="since")) == ["since</think>b<|im_end|>"]
    with pytest.raises(TemplateError, match="that prompt opens <think>, so rows need reasoning_content"):
        trained(template, asked("b"))


def test_a_prompt_has_its_calls_in_the_form_in_which_they_are_trained() -> None:
    one = renderer(CHATML.replace("(c.function.arguments | tojson)", "c.function.arguments"))
    messages = with_call()
    assert one.render(messages, None).text.startswith(one.prompt(messages[:-1], None))


def test_a_user_may_write_as_python_does() -> None:
    template = CHATML.replace("(c.function.arguments | tojson)", "(c.function.arguments | tojson(indent=1))")
    messages = with_call()
    messages[0] = {"role": "user", "content": "{'zone': 'UTC'}"}
    assert len(trained(template, messages)) == 2


def test_many_spaces_take_no_time() -> None:
    messages = with_call()
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"zone": " " * 200_000 + "UTC"}
    assert len(trained(CHATML, messages)) == 2


def test_turns_that_are_not_to_be_learned_are_only_read() -> None:
    rendered = renderer(CHATML).render(conversation("a", "wrong", "no", "right"), None, untrained=(1,))
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["right<|im_end|>"]
    assert rendered.differing == ()


def test_the_ends_of_turns_are_known() -> None:
    assert renderer(CHATML).render(with_call(), None).ends == {"<|im_end|>"}
    plain = renderer(CHATML).plain("words")
    assert plain.ends == {renderer(CHATML).form.special["eos_token"]}
    assert plain.text.endswith(*plain.ends)


def test_a_turn_does_not_start_with_its_header() -> None:
    """A template whose prompt lacks the header after a tool's result, as one of Gemma's."""
    lacks = CHATML.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt and m.role == 'user' %}")
    lacks = lacks.replace("{% endfor %}{% if add", "{% set _.m = m %}{% endfor %}{% set m = _.m %}{% if add")
    template = "{% set _ = namespace(m=none) %}" + lacks
    with pytest.raises(TemplateError, match=r"message 4: a server's prompt lacks the header of the turn, <\|im_start"):
        trained(template, with_call())
    rendered = renderer(template).render([*with_call(), *asked("b")], None)
    assert rendered.differing == (3,)
    assert [rendered.text[begin:end] for begin, end in rendered.spans][1:] == ["b<|im_end|>"]


@pytest.mark.parametrize("role", ["model", "assistant", "bot", "x"])
@pytest.mark.parametrize("block", [True, False])
def test_a_header_in_the_turn_is_found_by_the_probe(role: str, block: bool) -> None:
    """If no prompt has it, a served model would have to write it."""
    turn = "{{ '<|im_start|>" + role + "\n' + m.content + '<|im_end|>\n' }}"
    if block:
        turn = "{% generation %}" + turn + "{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + turn + "{% else %}" + HEADER
    template += "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    with pytest.raises(ForgeError, match="it should mark the answer and end token; add the turn's header"):
        renderer(template).probe()
    renderer(template + PROMPT.replace("assistant", role)).probe()


@pytest.mark.parametrize("name", ["Model: ", "ASSISTANT: ", "<|chatbot|>"])
def test_a_header_of_words_in_the_turn_is_found_by_the_probe(name: str) -> None:
    template = (
        "{% for m in messages %}{{ ('User: ' if m.role == 'user' else '" + name + "') + m.content + '<|im_end|>\n' }}"
    )
    template += "{% endfor %}"
    with pytest.raises(ForgeError, match="it should mark the answer and end token; add the turn's header"):
        renderer(template, [*SPECIALS, "<|chatbot|>"]).probe()
    renderer(template + "{{ '" + name.strip() + "' if add_generation_prompt }}", [*SPECIALS, "<|chatbot|>"]).probe()


def test_a_template_that_takes_reasoning_in_the_content_alone_can_be_used() -> None:
    """As TRL's for training distilled DeepSeek R1."""
    template = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert renderer(template).probe().spans
    (turn,) = trained(template, asked("<think>\nsince\n</think>\n\nb"))
    assert turn == "since\n</think>\n\nb<|im_end|>"
    with pytest.raises(TemplateError, match="so the template must go on with the row's reasoning"):
        trained(template, asked("b", reasoning_content="since"))


@pytest.mark.parametrize("answer", ["\nb", "\n\nb"])
def test_a_turn_that_shares_a_token_with_its_prompt_is_not_trained(answer: str) -> None:
    """A server's prompt ends with one line break, and the whole text has a token of two there."""
    one = Renderer(chat_format(with_line_breaks(SPECIALS, CHATML), "test"), "test")
    with pytest.raises(TemplateError, match=r"message 2: its start, .* shares a token with the end of the prompt"):
        one.render(asked(answer), None)
    assert one.render([*asked(answer), *asked("c")], None).differing == (1,)
    assert one.render(asked(" b"), None).differing == ()


def test_a_prompt_that_opens_the_reasoning_with_a_line_break_needs_reasoning() -> None:
    one = Renderer(chat_format(tokenizer_of("qwen-3.5"), "test"), "test")
    with pytest.raises(TemplateError, match="opens <think>, so rows need reasoning_content"):
        one.render(asked("b"), None)
    small = Renderer(chat_format(tokenizer_of("qwen-3.5, small"), "test"), "test")
    with pytest.raises(TemplateError, match="an empty <think> block, so rows must have no reasoning"):
        small.render(asked("b", reasoning_content="since"), None)


def test_a_template_that_takes_reasoning_as_thinking_gets_it() -> None:
    """As transformers gives it to templates, which some of LFM2's and gpt-oss read."""
    template = CHATML.replace("{{ m.content }}", "{{ '<think>' + (m.thinking or '') + '</think>' + m.content }}", 1)
    messages = asked("b", reasoning_content="since")
    assert trained(template, messages) == ["<think>since</think>b<|im_end|>"]
    tokenizer = byte_level(SPECIALS, template)
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    assert renderer(template).render(messages, None).text == shown


@pytest.mark.parametrize("reasoning", ["im", "e", "b", "end", "<think>"])
def test_reasoning_is_not_found_in_the_answer_or_in_a_token(reasoning: str) -> None:
    with pytest.raises(TemplateError, match="leaves out the row's reasoning_content"):
        trained(CHATML, asked("be", reasoning_content=reasoning))


def test_text_before_the_reasoning_is_not_found_in_a_tag() -> None:
    """Qwen 3 drops what comes before <think>."""
    one = Renderer(chat_format(tokenizer_of("qwen-3"), "test"), "test")
    with pytest.raises(TemplateError, match="leaves out the row's assistant message"):
        one.render(asked("t<think>since</think>b"), None)


def test_a_users_text_must_be_whole_though_it_has_a_tag() -> None:
    drops = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}", 1)
    with pytest.raises(TemplateError, match="leaves out the row's user message"):
        trained(drops, conversation("What is </think>?", "A tag."))


def test_a_call_is_not_found_in_the_name_of_another() -> None:
    template = CHATML.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    with pytest.raises(TemplateError, match="leaves out the row's tool calls"):
        trained(template, asked(tool_calls=[call("clocks"), call("clock")]))


@pytest.mark.parametrize("answer", ["x", "y", "xx"])
def test_a_short_answer_ends_as_any_other(answer: str) -> None:
    """Phi 3 writes a token after the last message, whoever wrote it."""
    one = Renderer(chat_format(tokenizer_of("phi-3"), "test"), "test")
    rendered = one.render(asked(answer), None)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == [f"{answer}<|end|>"]


def test_calls_and_answers_may_end_with_different_tokens() -> None:
    """As in Llama 3.1, where <|eom_id|> ends a message after which the turn goes on."""
    ends = "{{ ('<|eom|>' if m.tool_calls else '<|im_end|>') + '\n' }}"
    template = CHATML.replace("{{ '<|im_end|>\n' }}{% endfor %}{% if add", ends + "{% endfor %}{% if add")
    one = renderer(template, [*SPECIALS, "<|eom|>"])
    assert one.render(with_call(), None).ends == {"<|eom|>", "<|im_end|>"}
    assert one.render(with_call()[:2], None).ends == {"<|eom|>"}
    tools = {name: FAMILIES[name].cases["tools"] for name in ("gpt-oss", "deepseek-v3")}
    found = {
        name: Renderer(chat_format(tokenizer_of(name), "test"), "test").render(case.messages, case.tools).ends
        for name, case in tools.items()
    }
    assert found == {"gpt-oss": {"<|call|>", "<|return|>"}, "deepseek-v3": {"<｜end▁of▁sentence｜>"}}


PLAIN = TEXTS.map(lambda text: THINK.sub("", text).strip()).filter(bool)


@settings(deadline=None, max_examples=60)
@given(family=st.sampled_from(sorted(name for name in FAMILIES if FAMILIES[name].plain)), data=st.data())
def test_every_trained_turn_is_a_whole_answer_and_its_end(family: str, data: st.DataObject) -> None:
    """For any texts, in every family: the tokens are those of the answer, whole, and of its end."""
    contents = data.draw(st.lists(PLAIN, min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0))
    turns = trained_turns(families()[family], conversation(*contents))
    write = FAMILIES[family].turn
    for turn, answer in zip(turns[:-1], contents[1:-1:2], strict=True):
        assert (turn and squashed(turn)) in (None, squashed(write(answer)))
    write = FAMILIES[family].last_turn or write
    assert squashed(turns[-1] or "") == squashed(write(contents[-1]))


@settings(deadline=None, max_examples=100)
@given(family=st.sampled_from(sorted([*FAMILIES, *UNUSABLE])), data=st.data())
def test_a_trained_turn_has_all_of_its_message(family: str, data: st.DataObject) -> None:
    """For any texts, also with white space around them and with reasoning, unless the row is rejected."""
    messages = conversation(
        *data.draw(st.lists(TEXTS, min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0))
    )
    for message in messages[1::2]:
        if reasoning := data.draw(st.none() | TEXTS):
            message["reasoning_content"] = reasoning
    check_trained(families()[family], messages)
