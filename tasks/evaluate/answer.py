"""Answers to items with transformers, batched on all devices, and the likelihood of the expected answers."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe
from forge.models.chat import load_tokenizer
from forge.registry.packages import LocalBase
from tasks.evaluate.ask import Asked

SEED = 0
LOGITS_BYTES = 2**30  # limit for the logits that one forward pass of the likelihood keeps
OnProgress = Callable[[int], None]  # called with the number of items answered so far
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer to an item, and the likelihood of the item's own answers.

    `tokens` were generated in `seconds`, which is the time of the whole batch; `ended` is False if the answer was cut
    off. `nll` is a sum in nats over `nll_tokens`: all assistant turns, including their end-of-turn tokens. `samples`
    are answers drawn at the recipe's temperature.
    """

    text: str
    tokens: int
    ended: bool
    seconds: float
    nll: float
    nll_tokens: int
    samples: tuple[str, ...] = ()


def answer_with_transformers(
    model: LocalBase,
    asked: Sequence[Asked],
    recipe: EvaluationRecipe,
    devices: Sequence[str],
    on_progress: OnProgress,
) -> list[Answer]:
    """Answer every item with a model in Hugging Face format, in the dtype it was saved in.

    Each device has a copy of the whole model. If there are several devices, each has its own process.

    Raises ForgeError if the model cannot be loaded or runs out of memory.
    """
    answers: list[Answer | None] = [None] * len(asked)
    done = 0
    with contextlib.closing(_answer_batches(model, asked, recipe, devices)) as answered:
        for batch, batch_answers in answered:
            for at, answer in zip(batch, batch_answers, strict=True):
                answers[at] = answer
            done += len(batch)
            on_progress(done)
    return [answer for answer in answers if answer is not None]


def _answer_batches(
    model: LocalBase, asked: Sequence[Asked], recipe: EvaluationRecipe, devices: Sequence[str]
) -> Generator[tuple[list[int], list[Answer]], None, None]:
    """The answers batch by batch, with the positions of the batch's items, in the order in which batches finish."""
    work = list(batches([len(one.prompt) for one in asked], recipe.batch_size))
    if len(devices) == 1:
        engine = TransformersEngine(model, recipe, devices[0])
        for batch in work:
            yield batch, engine.answer([asked[at] for at in batch])
        return
    context = get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _start, (model, recipe, free)) as pool:
        futures = {pool.submit(_answer, [asked[at] for at in batch]): batch for batch in work}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ForgeError(
                f"a process that answered with {model.location} was killed, most likely because memory ran out",
                where="evaluation",
                fix="lower evaluation.batch_size",
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a failure, don't start the remaining batches


class TransformersEngine:
    """A model on a device, run by transformers."""

    def __init__(self, local: LocalBase, recipe: EvaluationRecipe, device: str) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(local, padding_side="left")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                local.location,
                revision=local.revision or None,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise cannot_load(local.location, error) from None
        self.model: Any = model.to(device).eval()
        # As vLLM does: of the generation config it reads only the end tokens and the penalty, and it also stops at the
        # tokenizer's eos_token.
        known = model.generation_config
        ends = known.eos_token_id if isinstance(known.eos_token_id, list) else [known.eos_token_id]
        self.ends = {end for end in [*ends, self.tokenizer.eos_token_id] if end is not None}
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.ends), repetition_penalty=known.repetition_penalty
        )
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)  # in tokens

    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answer a batch."""
        try:
            return self._answer(asked)
        except torch.OutOfMemoryError:
            raise ForgeError(
                f"{self.model.device} has too little memory for {len(asked)} prompts together",
                where="evaluation",
                fix="lower evaluation.batch_size",
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
        """Decode tokens, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], temperature: float = 0.0) -> list[list[int]]:
        """The tokens of an answer to each prompt, including the end-of-turn token, as one left-padded batch.

        An answer may fill the context and is cut there, as the server does.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = [at for at, prompt in enumerate(prompts) if 0 < len(prompt) < self.context]
        done = 0  # tokens generated for each unfinished answer
        while unfinished and done < self.recipe.max_new_tokens:
            so_far = [prompts[at] + answers[at] for at in unfinished]
            # Padded rows must not exceed the context: some models have no position embeddings beyond it.
            most = min(self.recipe.max_new_tokens - done, self.context - max(map(len, so_far)))
            for at, tokens in zip(unfinished, self._continue(so_far, most, temperature), strict=True):
                answers[at] += tokens
            done += most
            unfinished = [
                at for at in unfinished if answers[at][-1] not in self.ends and len(prompts[at]) + done < self.context
            ]
        return answers

    def _continue(self, prompts: Sequence[list[int]], most: int, temperature: float) -> list[list[int]]:
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        output = self.model.generate(
            **padded, **sampling, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id
        )
        return [self._cut(row) for row in output[:, padded["input_ids"].shape[1] :].tolist()]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Drop the padding after the first end-of-turn token."""
        for at, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: at + 1]
        return tokens

    @torch.inference_mode()
    def nll(self, asked: Sequence[Asked]) -> list[float]:
        """Summed negative log-likelihood (nats) of each conversation's scored tokens; NaN if it exceeds the context."""
        fits = [0 < len(one.whole) <= self.context for one in asked]
        fitting = [one for one, fit in zip(asked, fits, strict=True) if fit]
        sums = iter(self._nll(fitting) if fitting else [])
        return [next(sums) if fit else math.nan for fit in fits]

    def _nll(self, asked: Sequence[Asked]) -> list[float]:
        longest = max(len(one.whole) for one in asked)
        kept = max(len(one.whole) - one.scored[0] for one in asked) + 1  # last positions, which predict scored tokens
        rows = max(1, LOGITS_BYTES // (4 * kept * self.model.config.get_text_config().vocab_size))
        sums: list[float] = []
        for start in range(0, len(asked), rows):
            sums += self._summed_losses(asked[start : start + rows], longest, min(kept, longest))
        return sums

    def _summed_losses(self, asked: Sequence[Asked], longest: int, kept: int) -> list[float]:
        """Summed losses of the scored tokens, from one forward pass over rows padded to `longest`."""
        tokens, attention, scored = _left_padded(asked, longest)
        inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": position_ids(attention)}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
        targets, mask = (value[:, 1 - kept :].to(self.model.device) for value in (tokens, scored))
        # Flattened: on a CPU, cross_entropy over a dimension in the middle is off by 1e-3.
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        summed: list[float] = torch.where(mask, losses, 0.0).sum(dim=1).tolist()
        return summed


def _left_padded(asked: Sequence[Asked], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and mask of the scored tokens, each of shape [items, length]."""
    tokens = torch.zeros(len(asked), length, dtype=torch.long)
    attention, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, one in enumerate(asked):
        start = length - len(one.whole)
        tokens[row, start:] = torch.tensor(one.whole)
        attention[row, start:] = 1
        scored[row, start + torch.tensor(one.scored)] = True
    return tokens, attention, scored


def position_ids(attention: torch.Tensor) -> torch.Tensor:
    """Positions of left-padded tokens, from their attention mask [items, length]."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Positions in batches of similar length, the longest first, to keep padding small."""
    ordered = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def cannot_load(model: object, error: Exception) -> ForgeError:
    """The error for a model that cannot be loaded; its first line gives the reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ForgeError(f"{model} cannot be loaded: {reason}", where="evaluation")


def local_devices() -> list[str]:
    """The GPUs of this process, or the CPU."""
    return [f"cuda:{at}" for at in range(torch.cuda.device_count())] or ["cpu"]


_load: Callable[[], TransformersEngine]  # set in the processes of the pool


def _start(model: LocalBase, recipe: EvaluationRecipe, free: Any) -> None:
    global _load
    _load = functools.cache(functools.partial(TransformersEngine, model, recipe, free.get()))


def _answer(asked: Sequence[Asked]) -> list[Answer]:
    return _load().answer(asked)  # loads here rather than in _start, because a pool hides an initializer's errors
