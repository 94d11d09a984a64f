"""The watch period: a new model under its public name, beside what was measured of the one before."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openai import OpenAI, OpenAIError

from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.serving.client import client_of
from forge.serving.vllm_client import UNREACHABLE, VLLM
from tasks.rollout.prove import HELLO

PROBES = 4  # prompts that are asked in turn, and before the swap all at once
PAUSE = 0.5  # seconds between them
TOKENS = 16  # of an answer, at most
SLOW = 0.5  # seconds: no answer that is slower by less is a breach
FEW = 200  # tokens under which vLLM's own measure says little


@dataclass(frozen=True)
class Latency:
    """Mean seconds of a probe, and vLLM's own mean seconds between two tokens (None of too few)."""

    probe: float
    token: float | None


class Watch:
    """Watches a public name of a server."""

    def __init__(self, endpoint: str, name: str, prompts: list[list[dict[str, Any]]]) -> None:
        self.client: OpenAI = client_of(endpoint)
        self.vllm = VLLM(endpoint.removesuffix("/v1"))
        self.name = name
        self.prompts = prompts or [HELLO]

    def measure(self) -> Latency | None:
        """What serves now under the name; None where nothing does."""
        try:
            seconds = [self._probe(at)[0] for at in range(PROBES)]
            total, count = self.vllm.token_seconds()
        except (OpenAIError, *UNREACHABLE):
            return None
        return Latency(sum(seconds) / len(seconds), total / count if count >= FEW else None)

    def watch(
        self,
        versioned: str,
        before: Latency | None,
        recipe: ServingRecipe,
        check: Callable[[], None] = lambda: None,
    ) -> Latency:
        """Watch a new version for the recipe's period; ForgeError where it fails, or is much slower than `before`.

        `check` raises what ends the watch early.
        """
        try:
            start, first = self.vllm.names().versions.get(versioned), self.vllm.token_seconds()
            seconds: list[float] = []
            ends = time.monotonic() + recipe.watch_seconds
            while not seconds or time.monotonic() < ends:
                check()
                took, said = self._probe(len(seconds))
                if said != versioned:
                    raise ForgeError(f"{self.name} was answered by {said}, not by {versioned}")
                seconds.append(took)
                time.sleep(min(PAUSE, max(0.0, ends - time.monotonic())))
            end, last = self.vllm.names().versions.get(versioned), self.vllm.token_seconds()
        except (OpenAIError, *UNREACHABLE) as error:
            raise ForgeError(f"while it was watched, {versioned} did not answer: {error}") from None
        requests = (end.requests if end else 0) - (start.requests if start else 0)
        errors = (end.errors if end else 0) - (start.errors if start else 0)
        if requests > 0 and errors / requests > recipe.max_error_rate:
            raise ForgeError(
                f"while it was watched, {errors} of {requests} requests to {versioned} failed, and "
                f"serving.max_error_rate is {recipe.max_error_rate}"
            )
        tokens = last[1] - first[1]
        after = Latency(sum(seconds) / len(seconds), (last[0] - first[0]) / tokens if tokens >= FEW else None)
        if before is not None:
            limit = recipe.max_latency_ratio
            if after.probe > limit * before.probe and after.probe - before.probe > SLOW:
                raise ForgeError(
                    f"while it was watched, {versioned} took {after.probe:.2f} s to answer what took "
                    f"{before.probe:.2f} s before, and serving.max_latency_ratio is {limit}"
                )
            if before.token and after.token and after.token > limit * before.token:
                raise ForgeError(
                    f"while it was watched, vLLM took {1000 * after.token:.0f} ms a token, and "
                    f"{1000 * before.token:.0f} ms before; serving.max_latency_ratio is {limit}"
                )
        return after

    def _probe(self, at: int) -> tuple[float, str]:
        """Ask a prompt; returns the seconds, and which version answered."""
        started = time.monotonic()
        messages: Any = self.prompts[at % min(PROBES, len(self.prompts))]
        answer = self.client.chat.completions.create(
            model=self.name, messages=messages, temperature=0, max_tokens=TOKENS
        )
        return time.monotonic() - started, answer.model
