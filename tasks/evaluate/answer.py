"""What a model says: its answers to items, batched on all devices, and how likely it finds the expected ones."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tasks.contracts import Base
from tasks.errors import ForgeError
from tasks.evaluate.items import Item
from tasks.recipe import EvaluationRecipe

SEED = 0
LOGITS_BYTES = 2**30  # held at once for the likelihood
Tell = Callable[[int], None]
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Answer:
    """What a model said to an item, greedily, and how likely it finds the item's own answers.

    `tokens` were generated in `seconds` (those of the whole batch); `ended` says whether the answer came to its end.
    `nll` is a sum in nats over `nll_tokens`: those of all the assistant's turns, their ends included. `samples` are
    answers that were drawn.
    """

    text: str
    tokens: int
    ended: bool
    seconds: float
    nll: float
    nll_tokens: int
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """An item in a model's tokens: the prompt, and the whole conversation with the places that are scored."""

    prompt: list[int]
    whole: list[int]
    scored: list[int]


def answer_all(
    of: Base, items: Sequence[Item], recipe: EvaluationRecipe, devices: Sequence[str], tell: Tell
) -> list[Answer]:
    """Answer every item with a model in Hugging Face format, in its own dtype; `tell` hears how many are done.

    Each device has a whole copy of the model; with several, each has a process of its own.
    """
    tokenizer = load_tokenizer(of)
    asked = [ask(tokenizer, item) for item in items]
    answers: list[Answer | None] = [None] * len(items)
    work = list(batches([len(one.prompt) for one in asked], recipe.batch_size))
    done = 0

    def keep(batch: list[int], found: list[Answer]) -> None:
        nonlocal done
        for at, answer in zip(batch, found, strict=True):
            answers[at] = answer
        done += len(batch)
        tell(done)

    if len(devices) == 1:
        model = Answerer(of, recipe, devices[0])
        for batch in work:
            keep(batch, model.answer([asked[at] for at in batch]))
    else:
        context = get_context("spawn")
        free = context.Queue()
        for device in devices:
            free.put(device)
        with ProcessPoolExecutor(len(devices), context, _start, (of, recipe, free)) as pool:
            futures = {pool.submit(_answer, [asked[at] for at in batch]): batch for batch in work}
            for future in as_completed(futures):
                keep(futures[future], future.result())
    return [answer for answer in answers if answer is not None]


class Answerer:
    """A model on a device."""

    def __init__(self, of: Base, recipe: EvaluationRecipe, device: str) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(of)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                of.location,
                revision=of.revision or None,
                dtype="auto",
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ForgeError(f"evaluation: {of.location} cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model: Any = model.to(device).eval()
        ends = model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.room = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)

    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answer a batch."""
        prompts = [one.prompt for one in asked]
        started = time.monotonic()
        greedy = self.generate(prompts)
        seconds = time.monotonic() - started
        samples: list[tuple[str, ...]] = [()] * len(asked)
        if self.recipe.samples:
            torch.manual_seed(SEED)
            drawn = [self.generate(prompts, self.recipe.temperature) for _ in range(self.recipe.samples)]
            samples = [tuple(self.text(tokens) for tokens in row) for row in zip(*drawn, strict=True)]
        return [
            Answer(self.text(tokens), len(tokens), bool(self.ends & set(tokens)), seconds, nll, len(one.scored), texts)
            for one, tokens, nll, texts in zip(asked, greedy, self.nll(asked), samples, strict=True)
        ]

    def text(self, tokens: list[int]) -> str:
        """Tokens as a reader sees them."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], temperature: float = 0.0) -> list[list[int]]:
        """The tokens of an answer to each prompt, the end of its turn included, as one left-padded batch.

        An answer goes as far as the server's would, which ends it where the context ends.
        """
        fitting = [prompt for prompt in prompts if len(prompt) < self.room]
        if not fitting:
            return [[] for _ in prompts]
        padded = self.tokenizer.pad({"input_ids": fitting}, return_tensors="pt").to(self.model.device)
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        output = self.model.generate(
            **padded, **how, max_new_tokens=self.recipe.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id
        )
        rows = iter(output[:, padded["input_ids"].shape[1] :].tolist())
        return [
            self._cut(next(rows)[: self.room - len(prompt)]) if len(prompt) < self.room else [] for prompt in prompts
        ]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first that ends a turn, without the padding behind it."""
        for at, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: at + 1]
        return tokens

    @torch.inference_mode()
    def nll(self, asked: Sequence[Asked]) -> list[float]:
        """Summed negative log likelihood (nats) of each conversation's scored tokens; NaN for one over the context."""
        longest = min(self.room, max(len(one.whole) for one in asked))
        kept = max(len(one.whole) - one.scored[0] for one in asked) + 1  # positions at the end that predict scored ones
        rows = max(1, LOGITS_BYTES // (4 * kept * self.model.config.get_text_config().vocab_size))
        sums: list[float] = []
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            tokens = torch.zeros(len(part), longest, dtype=torch.long)
            attention, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
            for row, one in enumerate(part):
                if len(one.whole) <= longest:
                    before = longest - len(one.whole)
                    tokens[row, before:] = torch.tensor(one.whole)
                    attention[row, before:] = 1
                    scored[row, before + torch.tensor(one.scored)] = True
            inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": places(attention)}
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            logits = self.model(**inputs, logits_to_keep=min(kept, longest), use_cache=False).logits[:, :-1].float()
            wanted, mask = (value[:, 1 - min(kept, longest) :].to(self.model.device) for value in (tokens, scored))
            # Flattened: over a dimension in the middle, its sums on a CPU are off by 1e-3.
            losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
            found = torch.where(mask, losses, 0.0).sum(dim=1).tolist()
            sums += [nats if len(one.whole) <= longest else math.nan for nats, one in zip(found, part, strict=True)]
        return sums


def places(attention: torch.Tensor) -> torch.Tensor:
    """Positions of left-padded tokens."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)


def load_tokenizer(of: Base) -> Any:
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
                raise ForgeError(
                    "evaluation: the chat template's prompt is not the beginning of its conversation; mend it"
                )
            continue  # a template that shows earlier turns in another way: what it makes of them was not trained
        span = list(range(len(before), len(upto)))
        while len(span) > 1 and whole[span[-1]] not in ends and any(whole[place] in ends for place in span):
            span.pop()  # what follows the end of the turn is not the assistant's
        scored += span
    if not scored:
        raise ForgeError("evaluation: the chat template gives no tokens to an answer; mend its assistant turn")
    return Asked(prompt, whole, scored)


def render(tokenizer: Any, item: Item, messages: list[dict[str, Any]]) -> list[int]:
    """A conversation's tokens; after anything but an assistant's turn, the beginning of one."""
    tokens: list[int] = tokenizer.apply_chat_template(
        messages,
        tools=item.tools,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        tokenize=True,
        return_dict=False,
    )
    return tokens


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Positions in batches of like length, the longest first, so that little is padded."""
    ordered = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def devices_here() -> list[str]:
    """The GPUs of this task, or the CPU."""
    return [f"cuda:{at}" for at in range(torch.cuda.device_count())] or ["cpu"]


_answerer: Answerer | None = None


def _start(of: Base, recipe: EvaluationRecipe, free: Any) -> None:
    global _answerer
    _answerer = Answerer(of, recipe, free.get())


def _answer(asked: Sequence[Asked]) -> list[Answer]:
    if _answerer is None:
        raise RuntimeError("_start was not called")
    return _answerer.answer(asked)
