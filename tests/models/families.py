"""Known model families: their published chat templates with small tokenizers, and conversations for each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.preprocess.tokenizers import byte_level, sentence_piece

TEMPLATES = Path(__file__).parent / "templates"
PHI = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
QWEN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


@dataclass(frozen=True)
class Case:
    """A conversation, and the text of each assistant turn in it as a family trains it, end token included."""

    messages: list[dict[str, Any]]
    trained: list[str]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Family:
    """A tokenizer, and how its template writes an assistant turn with the given content."""

    build: Callable[[str], Any]  # from the template
    turn: Callable[[str], str]
    last_turn: Callable[[str], str] | None = None  # if it differs from earlier ones
    earlier: bool = True  # whether turns before the last are trained: not if the template drops their reasoning
    system: bool = True
    cases: dict[str, Case] = field(default_factory=dict)  # in addition to those that all families share

    def case(self, *contents: str, system: str = "") -> Case:
        """A conversation of user and assistant in turn, the user first."""
        messages = conversation(*contents, system=system)
        answers = contents[1::2]
        trained = [self.turn(answer) for answer in answers[:-1] if self.earlier]
        return Case(messages, [*trained, (self.last_turn or self.turn)(answers[-1])])

    def all_cases(self) -> dict[str, Case]:
        """The shared conversations and the family's own."""
        cases = {
            "single": self.case("When does it leave?", "At 10:42."),
            "multi-turn": self.case("a", "b", "c", "it's d", "e", "Zoë – 日本 🚆"),
            "same words": self.case("the answer", "the answer", "the answer", "the answer"),
            "lines": self.case("a\nb\n\nc", "if x:\n    return  1\n\nd"),
        }
        if self.system:
            cases["system"] = self.case("a", "b", "c", "d", system="Be brief.")
        return cases | self.cases


def conversation(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Messages of user and assistant in turn, the user first."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def call(name: str = "clock", **more: str) -> dict[str, Any]:
    """A tool call."""
    return {"type": "function", "function": {"name": name, "arguments": {"zone": "UTC"}}, **more}


CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time in a zone.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
CALL_ID = "abcdefgh1"


def tool_messages(content: str = "", **answer: str) -> list[dict[str, Any]]:
    """A question, a tool call with the given content, the tool's result, and the answer."""
    return [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": content, "tool_calls": [call(id=CALL_ID)]},
        {"role": "tool", "content": "10:42", "tool_call_id": CALL_ID},
        {"role": "assistant", "content": "It is 10:42.", **answer},
    ]


QWEN_CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
NO_THINKING = "<think>\n\n</think>\n\n"


def _chatml(*names: str) -> Callable[[str], Any]:
    return lambda template: byte_level(["<|endoftext|>", "<|im_end|>", "<|im_start|>"], template, plain=names)


FAMILIES = {
    "llama-2": Family(
        lambda template: sentence_piece(["<s>", "</s>"], template, prefix=True),
        lambda content: f"{content} </s>",
    ),
    "llama-3": Family(
        lambda template: byte_level(
            ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"], template
        ),
        lambda content: f"{content}<|eot_id|>",
    ),
    "llama-3.1": Family(
        lambda template: byte_level(
            ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>",
             "<|eom_id|>", "<|python_tag|>"],
            template,
        ),
        lambda content: f"{content}<|eot_id|>",
        cases={
            "tools": Case(
                tool_messages(),
                ['{"name": "clock", "parameters": {"zone": "UTC"}}<|eot_id|>', "It is 10:42.<|eot_id|>"],
                [CLOCK],
            ),
            "tools not called": Case(conversation("a", "b", "c", "d"), ["b<|eot_id|>", "d<|eot_id|>"], [CLOCK]),
        },
    ),
    "qwen-2.5": Family(
        _chatml(*QWEN[:2]),
        lambda content: f"{content}<|im_end|>",
        cases={
            "tools": Case(tool_messages(), [f"{QWEN_CALL}<|im_end|>", "It is 10:42.<|im_end|>"], [CLOCK]),
            "text next to a call": Case(
                tool_messages("Let me see."),
                [f"Let me see.\n{QWEN_CALL}<|im_end|>", "It is 10:42.<|im_end|>"],
                [CLOCK],
            ),
        },
    ),
    "qwen-3": Family(
        _chatml(*QWEN),
        lambda content: f"{content}<|im_end|>",
        lambda content: f"{NO_THINKING}{content}<|im_end|>",
        earlier=False,
        cases={
            "tools": Case(tool_messages(), [f"{NO_THINKING}It is 10:42.<|im_end|>"], [CLOCK]),
            "thinking": Case(
                conversation("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd"),
                ["<think>\nso\n</think>\n\nd<|im_end|>"],
            ),
            "thinking before an earlier tool call": Case(
                [*tool_messages("<think>\nhm\n</think>\n\n"), *conversation("c", "d")],
                [f"{NO_THINKING}d<|im_end|>"],
                [CLOCK],
            ),
            "reasoning_content": Case(
                [*conversation("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}],
                ["<think>\nhm\n</think>\n\nb<|im_end|>"],
            ),
            "thinking between tool calls": Case(
                tool_messages("<think>\nWhich zone?\n</think>\n\n", reasoning_content="Easy."),
                [
                    f"<think>\nWhich zone?\n</think>\n\n{QWEN_CALL}<|im_end|>",
                    "<think>\nEasy.\n</think>\n\nIt is 10:42.<|im_end|>",
                ],
                [CLOCK],
            ),
        },
    ),
    "gemma-2": Family(
        lambda template: sentence_piece(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], template),
        lambda content: f"{content}<end_of_turn>",
        system=False,
    ),
    "gemma-3": Family(
        lambda template: sentence_piece(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], template),
        lambda content: f"{content}<end_of_turn>",
    ),
    "mistral": Family(
        lambda template: sentence_piece(
            ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
             "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
            template,
        ),
        lambda content: f" {content}</s>",
        system=False,
        cases={
            "tools": Case(
                tool_messages(),
                [
                    '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "UTC"}, "id": "abcdefgh1"}]</s>',
                    " It is 10:42.</s>",
                ],
                [CLOCK],
            ),
            # The tools move to the last user message: an earlier turn was preceded by other text when it was written.
            "tools in two turns": Case(conversation("a", "b", "c", "d"), [" d</s>"], [CLOCK]),
        },
    ),
    "phi-3": Family(
        lambda template: sentence_piece(["<s>", "<|endoftext|>"], template, prefix=True, rstrip=PHI),
        lambda content: f"{content}<|end|>",
    ),
    "phi-4": Family(
        lambda template: byte_level(["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"], template),
        lambda content: f"{content}<|im_end|>",
    ),
    "chatml": Family(_chatml(), lambda content: f"{content}<|im_end|>"),
    "generation-blocks": Family(_chatml(), lambda content: f"{content}<|im_end|>"),
}  # fmt: skip


def tokenizer_of(family: str) -> Any:
    """A new tokenizer of a family, with its chat template."""
    return FAMILIES[family].build((TEMPLATES / f"{family}.jinja").read_text())
