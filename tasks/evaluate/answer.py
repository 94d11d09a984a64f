"""What a model says: its answers to items, batched on all devices, and how likely it finds the expected ones."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe
from forge.registry.packages import LocalBase
from tasks.evaluate.ask import Asked, load_tokenizer

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


def answer_with_transformers(
    of: LocalBase, asked: Sequence[Asked], recipe: EvaluationRecipe, devices: Sequence[str], tell: Tell
) -> list[Answer]:
    """Answer every item with a model in Hugging Face format, in its own dtype; `tell` hears how many are done.

    Each device has a whole copy of the model; with several, each has a process of its own.

    Raises ForgeError where the model cannot be loaded, or memory does not suffice.
    """
    answers: list[Answer | None] = [None] * len(asked)
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
            try:
                for future in as_completed(futures):
                    keep(futures[future], future.result())
            except BrokenProcessPool:
                raise ForgeError(
                    f"evaluation: a process that answered with {of.location} was killed, most likely for its memory; "
                    "lower evaluation.batch_size"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after a failure, no batch is begun any more
    return [answer for answer in answers if answer is not None]


class Answerer:
    """A model on a device."""

    def __init__(self, of: LocalBase, recipe: EvaluationRecipe, device: str) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(of)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                of.location,
                revision=of.revision or None,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ForgeError(f"evaluation: {of.location} cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model: Any = model.to(device).eval()
        ends = model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.room = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)

    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answer a batch."""
        try:
            return self._answer(asked)
        except torch.OutOfMemoryError:
            raise ForgeError(
                f"evaluation: {self.model.device} has too little memory for {len(asked)} prompts at once; lower "
                "evaluation.batch_size"
            ) from None

    def _answer(self, asked: Sequence[Asked]) -> list[Answer]:
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
        answers: list[list[int]] = [[] for _ in prompts]
        going = [at for at, prompt in enumerate(prompts) if 0 < len(prompt) < self.room]
        done = 0  # tokens of every answer that goes on
        while going and done < self.recipe.max_new_tokens:
            so_far = [prompts[at] + answers[at] for at in going]
            # No row is ever padded beyond the context, for which some models know no position.
            most = min(self.recipe.max_new_tokens - done, self.room - max(map(len, so_far)))
            for at, tokens in zip(going, self._continue(so_far, most, temperature), strict=True):
                answers[at] += tokens
            done += most
            going = [at for at in going if answers[at][-1] not in self.ends and len(prompts[at]) + done < self.room]
        return answers

    def _continue(self, prompts: Sequence[list[int]], most: int, temperature: float) -> list[list[int]]:
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        output = self.model.generate(**padded, **how, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id)
        return [self._cut(row) for row in output[:, padded["input_ids"].shape[1] :].tolist()]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first that ends a turn, without the padding behind it."""
        for at, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: at + 1]
        return tokens

    @torch.inference_mode()
    def nll(self, asked: Sequence[Asked]) -> list[float]:
        """Summed negative log likelihood (nats) of each conversation's scored tokens; NaN for one over the context."""
        fits = [0 < len(one.whole) <= self.room for one in asked]
        fitting = [one for one, fit in zip(asked, fits, strict=True) if fit]
        sums = iter(self._nll(fitting) if fitting else [])
        return [next(sums) if fit else math.nan for fit in fits]

    def _nll(self, asked: Sequence[Asked]) -> list[float]:
        longest = max(len(one.whole) for one in asked)
        kept = max(len(one.whole) - one.scored[0] for one in asked) + 1  # positions at the end that predict scored ones
        rows = max(1, LOGITS_BYTES // (4 * kept * self.model.config.get_text_config().vocab_size))
        sums: list[float] = []
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            tokens = torch.zeros(len(part), longest, dtype=torch.long)
            attention, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
            for row, one in enumerate(part):
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
            sums += torch.where(mask, losses, 0.0).sum(dim=1).tolist()
        return sums


def places(attention: torch.Tensor) -> torch.Tensor:
    """Positions of left-padded tokens."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Positions in batches of like length, the longest first, so that little is padded."""
    ordered = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def devices_here() -> list[str]:
    """The GPUs of this task, or the CPU."""
    return [f"cuda:{at}" for at in range(torch.cuda.device_count())] or ["cpu"]


_load: Callable[[], Answerer]  # in a process of answer_all's


def _start(of: LocalBase, recipe: EvaluationRecipe, free: Any) -> None:
    global _load
    _load = functools.cache(functools.partial(Answerer, of, recipe, free.get()))


def _answer(asked: Sequence[Asked]) -> list[Answer]:
    return _load().answer(asked)  # loaded here and not in _start, whose errors a pool does not tell
