"""vLLM's HTTP API as the reconciler and rollouts use it: health, adapters, tokens, logprobs and metrics."""

import json
from dataclasses import dataclass, field
from typing import Any

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from forge.serving.desired import Failed

TIMEOUT = urllib3.Timeout(connect=2, read=10)
LOADING = urllib3.Timeout(connect=2, read=300)  # vLLM reads the adapter from disk
# The last three are raised if another program answers on that port.
UNREACHABLE = (urllib3.exceptions.HTTPError, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Counts:
    """The requests to one version since vLLM started, as the middleware counts them."""

    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Names:
    """The middleware's public names, with their versioned names (None: not loaded yet), and its counts by version."""

    names: dict[str, str | None] = field(default_factory=dict)
    versions: dict[str, Counts] = field(default_factory=dict)


class VLLM:
    """vLLM at a URL (without /v1). Methods raise one of UNREACHABLE if it doesn't answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = urllib3.PoolManager(retries=False, timeout=TIMEOUT)

    def healthy(self) -> bool | None:
        """Whether its engine is alive; None if it doesn't answer."""
        try:
            return self.http.request("GET", f"{self.url}/health").status == 200
        except UNREACHABLE:
            return None

    def models(self) -> list[str]:
        """The versioned names that it serves: the base and its adapters."""
        entries = self._get("/v1/models")["data"]
        ids = {entry["id"] for entry in entries}
        return [entry["id"] for entry in entries if entry.get("root") not in ids - {entry["id"]}]

    def names(self) -> Names:
        """The middleware's public names and request counts."""
        served = self._get("/served")
        return Names(served["names"], {version: Counts(**counts) for version, counts in served["versions"].items()})

    def load(self, versioned: str, path: str) -> None:
        """Load an adapter from a directory under its versioned name. Raises Failed with vLLM's reason if it refuses."""
        body = {"lora_name": versioned, "lora_path": path}
        answer = self.http.request("POST", f"{self.url}/v1/load_lora_adapter", json=body, timeout=LOADING)
        if answer.status != 200 and b"already been loaded" not in answer.data:
            raise Failed(f"vLLM does not load the adapter {path}: {_reason(answer.data)}")

    def unload(self, versioned: str) -> None:
        """Unload an adapter."""
        answer = self.http.request("POST", f"{self.url}/v1/unload_lora_adapter", json={"lora_name": versioned})
        if answer.status != 200:
            raise urllib3.exceptions.HTTPError(f"vLLM does not unload {versioned}: {_reason(answer.data)}")

    def prompt_nll(self, versioned: str, tokens: list[int], scored: list[int]) -> float:
        """Mean negative log-likelihood of the tokens at the positions `scored`, in nats per token."""
        body = {"model": versioned, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choice = self._post("/v1/completions", body)["choices"][0]
        logprobs = choice["prompt_logprobs"]
        return -sum(float(logprobs[at][str(tokens[at])]["logprob"]) for at in scored if at) / len(scored)

    def tokens(self, versioned: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """The token IDs of a conversation's prompt, including the header of the answer (the generation prompt)."""
        shown = as_server_reads(messages)
        body: dict[str, Any] = {"model": versioned, "messages": shown, "add_generation_prompt": True}
        if tools:
            body["tools"] = tools
        return [int(token) for token in self._post("/tokenize", body)["tokens"]]

    def token_seconds(self) -> tuple[float, float]:
        """vLLM's inter-token latency over all requests so far: the sum in seconds, and the number of intervals."""
        text = self.http.request("GET", f"{self.url}/metrics").data.decode()
        totals = {"_sum": 0.0, "_count": 0.0}
        for family in text_string_to_metric_families(text):
            if family.name == "vllm:inter_token_latency_seconds":
                for sample in family.samples:
                    for ending in totals:
                        if sample.name.endswith(ending):
                            totals[ending] += sample.value
        return totals["_sum"], totals["_count"]

    def _get(self, path: str) -> Any:
        return _parsed(self.http.request("GET", f"{self.url}{path}"), path)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _parsed(self.http.request("POST", f"{self.url}{path}", json=body, timeout=LOADING), path)


def as_server_reads(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their reasoning under the name that vLLM reads in requests, which it then gives templates too."""
    return [
        {**message, "reasoning": message["reasoning_content"]} if "reasoning_content" in message else message
        for message in messages
    ]


def _parsed(answer: Any, path: str) -> Any:
    if answer.status != 200:
        raise urllib3.exceptions.HTTPError(f"{path} returned {answer.status}: {_reason(answer.data)}")
    return json.loads(answer.data)


def _reason(body: bytes) -> str:
    """The error message in a response of vLLM."""
    try:
        error = json.loads(body)
        return str(error.get("message") or error["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.decode(errors="replace")[:300]
