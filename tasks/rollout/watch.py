"""Watches a new version under its public name, and compares it with measurements of the previous one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openai import OpenAI, OpenAIError

from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.serving.client import client_of
from forge.serving.vllm_client import UNREACHABLE, VLLM, Counts
from tasks.rollout.prove import HELLO

PROBES = 4  # prompts; all are sent before the switch, and in turn during the watch period
PAUSE = 0.5  # seconds between probes
TOKENS = 16  # maximum length of an answer
SLOW = 0.5  # seconds; a smaller increase of the latency is not a breach
FEW = 200  # tokens; vLLM's inter-token latency over fewer is not significant


@dataclass(frozen=True)
class Latency:
    """Mean latency of a probe, and vLLM's mean inter-token latency (None if over FEW tokens), both in seconds."""

    probe: float
    token: float | None


@dataclass(frozen=True)
class Totals:
    """vLLM's counters at one moment: requests to a version, and inter-token latency over all requests."""

    counts: Counts
    token_seconds: float
    tokens: float


class Watch:
    """Watches a public name of a server."""

    def __init__(self, endpoint: str, name: str, prompts: list[list[dict[str, Any]]]) -> None:
        self.client: OpenAI = client_of(endpoint)
        self.vllm = VLLM(endpoint.removesuffix("/v1"))
        self.name = name
        self.prompts = prompts or [HELLO]

    def measure(self) -> Latency | None:
        """The latency of what serves now under the name; None if it doesn't answer."""
        try:
            seconds = [self._probe(at)[0] for at in range(PROBES)]
            total, count = self.vllm.token_seconds()
        except (OpenAIError, *UNREACHABLE):
            return None
        return _latency(seconds, total, count)

    def watch(
        self,
        versioned: str,
        before: Latency | None,
        recipe: ServingRecipe,
        check: Callable[[], None] = lambda: None,
    ) -> Latency:
        """Watch a new version for the recipe's period.

        ForgeError if too many requests fail, or it is much slower than `before`. `check` is called before each probe,
        and can raise an error to end the watch.
        """
        try:
            start = self._totals(versioned)
            seconds = self._probe_for(recipe.watch_seconds, versioned, check)
            end = self._totals(versioned)
        except (OpenAIError, *UNREACHABLE) as error:
            raise ForgeError(f"did not answer during the watch period: {error}", where=versioned) from None
        _check_errors(versioned, start, end, recipe.max_error_rate)
        after = _latency(seconds, end.token_seconds - start.token_seconds, end.tokens - start.tokens)
        if before is not None:
            _check_latency(versioned, before, after, recipe.max_latency_ratio)
        return after

    def _totals(self, versioned: str) -> Totals:
        return Totals(self.vllm.names().versions.get(versioned, Counts()), *self.vllm.token_seconds())

    def _probe_for(self, period: float, versioned: str, check: Callable[[], None]) -> list[float]:
        """Send probes for some seconds, at least as many as `measure` does; returns their latencies."""
        seconds: list[float] = []
        end = time.monotonic() + period
        while len(seconds) < PROBES or time.monotonic() < end:
            check()
            took, version = self._probe(len(seconds))
            if version != versioned:
                raise ForgeError(f"answered by {version}, not by {versioned}", where=self.name)
            seconds.append(took)
            time.sleep(min(PAUSE, max(0.0, end - time.monotonic())))
        return seconds

    def _probe(self, at: int) -> tuple[float, str]:
        """Send one prompt; returns the seconds it took, and the version that answered."""
        started = time.monotonic()
        messages: Any = self.prompts[at % min(PROBES, len(self.prompts))]
        answer = self.client.chat.completions.create(
            model=self.name, messages=messages, temperature=0, max_tokens=TOKENS
        )
        return time.monotonic() - started, answer.model


def _latency(seconds: list[float], token_seconds: float, tokens: float) -> Latency:
    return Latency(sum(seconds) / len(seconds), token_seconds / tokens if tokens >= FEW else None)


def _check_errors(versioned: str, start: Totals, end: Totals, max_error_rate: float) -> None:
    requests = end.counts.requests - start.counts.requests
    errors = end.counts.errors - start.counts.errors
    if requests > 0 and errors / requests > max_error_rate:
        raise ForgeError(
            f"{errors} of {requests} requests failed during the watch period, and serving.max_error_rate is "
            f"{max_error_rate}",
            where=versioned,
        )


def _check_latency(versioned: str, before: Latency, after: Latency, max_ratio: float) -> None:
    if after.probe > max_ratio * before.probe and after.probe - before.probe > SLOW:
        raise ForgeError(
            f"took {after.probe:.2f} s for prompts that took {before.probe:.2f} s before, and "
            f"serving.max_latency_ratio is {max_ratio}",
            where=versioned,
        )
    if before.token and after.token and after.token > max_ratio * before.token:
        raise ForgeError(
            f"vLLM took {1000 * after.token:.0f} ms per token in the watch period, and {1000 * before.token:.0f} ms "
            f"before; serving.max_latency_ratio is {max_ratio}",
            where=versioned,
        )
