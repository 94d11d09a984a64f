"""Known model families: their published chat templates with small tokenizers, and conversations for each of them."""

import ast
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.preprocess import tokenizers
from tests.preprocess.tokenizers import sentence_piece

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
    template: Callable[[], str] | None = None  # if it is not the file of the family's name
    plain: bool = True  # whether answers without reasoning are trained

    def case(self, *contents: str, system: str = "") -> Case:
        """A conversation of user and assistant in turn, the user first."""
        messages = conversation(*contents, system=system)
        answers = contents[1::2]
        trained = [self.turn(answer) for answer in answers[:-1] if self.earlier]
        return Case(messages, [*trained, (self.last_turn or self.turn)(answers[-1])])

    def all_cases(self) -> dict[str, Case]:
        """The shared conversations and the family's own."""
        if not self.plain:
            return self.cases
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


def tool_messages(content: str = "", arguments: str = "", **answer: str) -> list[dict[str, Any]]:
    """A question, a tool call with the given content, the tool's result, and the answer."""
    asked = call(id=CALL_ID)
    if arguments:
        asked["function"]["arguments"] = arguments
    return [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": content, "tool_calls": [asked]},
        {"role": "tool", "content": "10:42", "tool_call_id": CALL_ID},
        {"role": "assistant", "content": "It is 10:42.", **answer},
    ]


QWEN_CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=clock>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n</tool_call>"
GPT_OSS_CALL = ' to=functions.clock<|channel|>commentary json<|message|>{"zone": "UTC"}<|call|>'
DEEPSEEK = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>",
]  # fmt: skip
NO_THINKING = "<think>\n\n</think>\n\n"


def byte_level(specials: list[str], template: str, plain: Sequence[str] = ()) -> Any:
    """A byte-level BPE with a token of two line breaks, as real ones have."""
    tokenizer = tokenizers.byte_level(specials, template)
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts["model"]["vocab"]["ĊĊ"] = max(tokenizer.get_vocab().values()) + 1
    facts["model"]["merges"].append(["Ċ", "Ċ"])
    fast = Tokenizer.from_str(json.dumps(facts))
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    joined = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    joined.chat_template = template
    return joined


def written(name: str) -> str:
    """The template in a file of this folder."""
    return (TEMPLATES / f"{name}.jinja").read_text()


def shipped(module: str) -> str:
    """The chat template that is written within one of transformers' modules."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "models" / module).read_text()
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return next(text for text in texts if isinstance(text, str) and "add_generation_prompt" in text and "{%" in text)


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
    "qwen-3.5": Family(
        _chatml(*QWEN),
        lambda content: content,
        cases={
            "reasoning": Case(
                [*conversation("a", "b", "c"), {"role": "assistant", "content": "d", "reasoning_content": "so"}],
                ["so\n</think>\n\nd<|im_end|>"],
            ),
            "reasoning between tool calls": Case(
                tool_messages("<think>Which zone?</think>", reasoning_content="Easy."),
                [f"Which zone?\n</think>\n\n{XML_CALL}<|im_end|>", "Easy.\n</think>\n\nIt is 10:42.<|im_end|>"],
                [CLOCK],
            ),
        },
        plain=False,
    ),
    "qwen-3.5, small": Family(
        _chatml(*QWEN),
        lambda content: f"{content}<|im_end|>",
        earlier=False,
        cases={
            "tools": Case(
                tool_messages("Let me see."),
                [f"Let me see.\n\n{XML_CALL}<|im_end|>", "It is 10:42.<|im_end|>"],
                [CLOCK],
            ),
        },
        template=lambda: written("qwen-3.5").replace("default(true)", "default(false)"),
    ),
    "llama-4": Family(
        lambda template: byte_level(
            ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|python_start|>",
             "<|python_end|>", "<|image|>"],
            template,
        ),
        lambda content: f"{content}<|eot|>",
        cases={
            "tools": Case(
                tool_messages("Let me see."),
                [
                    '<|python_start|>Let me see.<|python_end|>{"name": "clock", "parameters": {"zone": "UTC"}}<|eot|>',
                    "It is 10:42.<|eot|>",
                ],
                [CLOCK],
            ),
        },
        # Without the date of today, which a server's prompt has.
        template=lambda: shipped("llama4/processing_llama4.py").replace("strftime_now is defined", "false"),
    ),
    "qwen-2-audio": Family(
        _chatml(),
        lambda content: f"{content}<|im_end|>",
        template=lambda: shipped("qwen2_audio/processing_qwen2_audio.py"),
    ),
    "gpt-oss": Family(
        lambda template: byte_level(
            ["<|startoftext|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"],
            template,
        ),
        lambda content: f"<|channel|>final<|message|>{content}<|return|>",
        earlier=False,  # they end with <|end|>, which the model does not write
        cases={
            "tools": Case(
                tool_messages(), [GPT_OSS_CALL, "<|channel|>final<|message|>It is 10:42.<|return|>"], [CLOCK]
            ),
            "reasoning": Case(
                [*conversation("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}],
                [
                    "<|channel|>analysis<|message|>hm<|end|>"
                    "<|start|>assistant<|channel|>final<|message|>b<|return|>"
                ],
            ),
        },
    ),
    "deepseek-v3": Family(
        lambda template: byte_level(DEEPSEEK, template),
        lambda content: f"{content}<｜end▁of▁sentence｜>",
        cases={
            "tools": Case(
                tool_messages(arguments='{"zone": "UTC"}'),
                [
                    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n"
                    '{"zone": "UTC"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
                    "It is 10:42.<｜end▁of▁sentence｜>",
                ],
                [CLOCK],
            ),
        },
    ),
    "mistral-small": Family(
        lambda template: byte_level(
            ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
             "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
            template,
        ),
        lambda content: f"{content}</s>",
        cases={
            "tools": Case(
                tool_messages("Let me see."),
                [
                    'Let me see.[TOOL_CALLS][{"name": "clock", "arguments": {"zone": "UTC"}, "id": "abcdefgh1"}]</s>',
                    "It is 10:42.</s>",
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
# A job with one of these stops before any row: the template rejects even a question with its answer.
UNUSABLE = {
    "deepseek-r1": Family(
        lambda template: byte_level(DEEPSEEK, template),
        lambda content: content,
        template=lambda: written("deepseek-v3").replace("default(false)", "default(true)"),
    ),
    "glm-4.5": Family(
        lambda template: byte_level(
            ["<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
             "<|observation|>"],
            template,
            plain=QWEN,
        ),
        lambda content: content,
    ),
    "smol-vlm": Family(
        lambda template: byte_level(["<|im_start|>", "<end_of_utterance>"], template),
        lambda content: content,
        template=lambda: shipped("smolvlm/processing_smolvlm.py"),
    ),
}  # fmt: skip


def tokenizer_of(name: str) -> Any:
    """A new tokenizer of a family, with its chat template."""
    family = FAMILIES.get(name) or UNUSABLE[name]
    return family.build(family.template() if family.template else written(name))
