"""Answers and scores of one model on held-out conversations: exact match, JSON validity and NLL."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tasks.contracts import Base
from tasks.errors import ForgeError

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Item:
    """A held-out conversation: `messages` up to the last assistant turn, and that turn as `expected`."""

    messages: list[dict[str, str]]
    expected: str
    slice: str


@dataclass(frozen=True)
class Answer:
    """What a model answered (greedy), and the mean negative log likelihood (nats a token) of the expected answer."""

    text: str
    nll: float
    exact: bool


@dataclass(frozen=True)
class Scores:
    """Means over items: shares in [0, 1], NLL in nats a token; json_validity is None where no item expects JSON."""

    items: int
    exact_match: float
    json_validity: float | None
    nll: float


def read_items(path: Path, most: int) -> list[Item]:
    """The first held-out conversations (they are stored in the order of their digests, so this is a fair draw).

    Plain texts and conversations with tools are passed over: exact match says nothing of them.
    """
    items: list[Item] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "messages" not in row or any(
                message["role"] == "tool" or len(message) > 2 for message in row["messages"]
            ):
                continue
            items.append(Item(row["messages"][:-1], row["messages"][-1]["content"], row["slice"]))
            if len(items) == most:
                break
    return items


def answer_all(
    of: Base, items: Sequence[Item], max_new_tokens: int, batch_size: int, tell: Callable[[int], None]
) -> list[Answer]:
    """Answer every item with a model in Hugging Face format, in its own dtype; `tell` hears how many are done."""
    options: Any = {"revision": of.revision or None, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(of.location, padding_side="left", **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        of.location, dtype="auto", attn_implementation="sdpa", use_safetensors=True, **options
    )
    model = model.to(device).eval()
    prompts = [tokens_of(tokenizer, item.messages, add_generation_prompt=True) for item in items]
    whole = [
        tokens_of(
            tokenizer, [*item.messages, {"role": "assistant", "content": item.expected}], add_generation_prompt=False
        )
        for item in items
    ]
    texts, nlls = [""] * len(items), [0.0] * len(items)
    done = 0
    for batch in batches([len(prompt) for prompt in prompts], batch_size):
        for at, text in zip(
            batch, generate(model, tokenizer, [prompts[at] for at in batch], max_new_tokens), strict=True
        ):
            texts[at] = text
        nll = answer_nll(model, [whole[at] for at in batch], [len(prompts[at]) for at in batch])
        for at, value in zip(batch, nll, strict=True):
            nlls[at] = value
        done += len(batch)
        tell(done)
    return [
        Answer(text, nll, text.strip() == item.expected.strip())
        for item, text, nll in zip(items, texts, nlls, strict=True)
    ]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Positions in batches of like length, the longest first, so that little is padded."""
    ordered = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def tokens_of(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    """A conversation as the chat template gives it."""
    tokens: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    return tokens


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers to prompts, as one left-padded batch."""
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    output = model.generate(
        **padded, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    room = model.config.max_position_embeddings
    answers = [
        row[: room - len(prompt)]
        for row, prompt in zip(output[:, padded["input_ids"].shape[1] :], prompts, strict=True)
    ]  # as far as the server goes, which ends an answer where the context ends
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


@torch.inference_mode()
def answer_nll(model: Any, whole: list[list[int]], prompt_lengths: list[int]) -> list[float]:
    """Mean negative log likelihood (nats) of each answer's tokens, the end of its turn included, given its prompt."""
    longest = max(len(tokens) for tokens in whole)
    tokens = torch.zeros(len(whole), longest, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (sequence, start) in enumerate(zip(whole, prompt_lengths, strict=True)):
        if start >= len(sequence):
            raise ForgeError("evaluation: the chat template gives no tokens to an answer; mend its assistant turn")
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        attention[row, : len(sequence)] = 1
        scored[row, start : len(sequence)] = True
    logits = model(input_ids=tokens.to(model.device), attention_mask=attention.to(model.device)).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:].to(model.device), reduction="none")
    mask = scored[:, 1:].to(model.device)
    means: list[float] = ((losses * mask).sum(dim=1) / mask.sum(dim=1)).tolist()
    return means


def summarise(items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
    """Mean scores over items; at least one item."""
    valid = [is_json(answer.text) for item, answer in zip(items, answers, strict=True) if is_json(item.expected)]
    return Scores(
        items=len(items),
        exact_match=sum(answer.exact for answer in answers) / len(items),
        json_validity=sum(valid) / len(valid) if valid else None,
        nll=sum(answer.nll for answer in answers) / len(items),
    )


def by_slice(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Scores]:
    """Scores of each slice, in the order of their names."""
    return {
        name: summarise(*zip(*((i, a) for i, a in zip(items, answers, strict=True) if i.slice == name), strict=True))
        for name in sorted({item.slice for item in items})
    }


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
