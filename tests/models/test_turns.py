"""Each assistant turn is trained as the model has to write it when it is served, or the row is rejected or counted.

The templates are as in public bug reports of programs that do this job, made small.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.models.chat_format import TemplateError, chat_format
from forge.models.conversation import Renderer
from tests.models.families import CLOCK, FAMILIES, call, conversation, tokenizer_of
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


def test_an_earlier_turn_that_the_template_renders_without_its_reasoning_is_not_trained() -> None:
    rendered = renderer(THINKING).render(conversation("a", "first", "b", "last"), None)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["<think>\n\n</think>\n\nlast<|im_end|>"]
    assert rendered.differing == (1,)
    messages = [*asked("one", reasoning_content="since"), *asked("two", reasoning_content="so")]
    rendered = renderer(THINKING).render(messages, None)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["<think>\nso\n</think>\n\ntwo<|im_end|>"]
    assert rendered.differing == (1,)


def test_the_header_of_a_turn_is_not_trained_though_it_is_in_the_block() -> None:
    block = "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + block + "{% else %}" + HEADER
    template += "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    assert trained(template + PROMPT, conversation("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]


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


@pytest.mark.parametrize("reasoning", ["", "so"])
def test_an_answer_after_reasoning_in_control_tokens_is_trained_whole(reasoning: str) -> None:
    shown = "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' }}{{ m.content }}"
    template = CHATML.replace("{{ m.content }}", shown, 1)
    (turn,) = trained(
        template, asked("answer", reasoning_content=reasoning), specials=[*SPECIALS, "<think>", "</think>"]
    )
    assert turn == f"{f'<think>{reasoning}</think>' if reasoning else ''}answer<|im_end|>"


LEFT_OUT = {
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
    with pytest.raises(TemplateError, match="if that prompt opens <think>, rows need reasoning_content"):
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


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>|[]"), min_size=1, max_size=30).filter(str.strip)
RENDERERS = {name: Renderer(chat_format(tokenizer_of(name), "test"), "test") for name in FAMILIES}


@settings(deadline=None, max_examples=60)
@given(family=st.sampled_from(sorted(FAMILIES)), contents=st.lists(WORDS, min_size=2, max_size=8))
def test_every_trained_turn_is_a_whole_answer_and_its_end(family: str, contents: list[str]) -> None:
    """For any texts, in every family: the answer, whole, and then control tokens alone."""
    contents = contents[: len(contents) // 2 * 2]
    rendered = RENDERERS[family].render(conversation(*contents), None)
    answers = contents[1::2]
    left = [answer for at, answer in enumerate(answers) if 2 * at + 1 not in rendered.differing]
    assert len(rendered.spans) == len(left) >= 1
    for (begin, end), answer in zip(rendered.spans, left, strict=True):
        turn = rendered.text[begin:end]
        before, _, after = turn.rpartition(answer.strip())
        assert before.strip() in ("", "<think>\n\n</think>")
        assert after.strip() in rendered.ends
    prompt = RENDERERS[family].prompt(conversation(*contents[:-1]), None)
    assert rendered.spans[-1][0] == len(prompt)
