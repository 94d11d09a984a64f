"""What the reconciler and a rollout ask vLLM over HTTP, beside the questions that any client asks."""

import json
from dataclasses import dataclass, field
from typing import Any

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from forge.serving.desired import Failed

TIMEOUT = urllib3.Timeout(connect=2, read=10)
LOADING = urllib3.Timeout(connect=2, read=300)  # an adapter is read from disk
# The last three: something else answers on that port.
UNREACHABLE = (urllib3.exceptions.HTTPError, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Counts:
    """What the middleware has counted of one version since vLLM started."""

    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Names:
    """Where the middleware leads public names (None: nowhere yet), and its counts by versioned name."""

    names: dict[str, str | None] = field(default_factory=dict)
    versions: dict[str, Counts] = field(default_factory=dict)


class VLLM:
    """vLLM at a URL (without /v1). Where it does not answer, methods raise one of UNREACHABLE."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = urllib3.PoolManager(retries=False, timeout=TIMEOUT)

    def healthy(self) -> bool | None:
        """Whether it answers that it is healthy, which it is not where its engine has ended; None without an answer."""
        try:
            return self.http.request("GET", f"{self.url}/health").status == 200
        except UNREACHABLE:
            return None

    def models(self) -> list[str]:
        """The versioned names that it serves: the base's, and those of its adapters."""
        entries = self._get("/v1/models")["data"]
        ids = {entry["id"] for entry in entries}
        return [entry["id"] for entry in entries if entry.get("root") not in ids - {entry["id"]}]

    def names(self) -> Names:
        """What the middleware says of public names and of requests."""
        found = self._get("/served")
        return Names(found["names"], {version: Counts(**counts) for version, counts in found["versions"].items()})

    def load(self, versioned: str, path: str) -> None:
        """Load an adapter from a directory under its versioned name; raises Failed, with vLLM's reason."""
        body = {"lora_name": versioned, "lora_path": path}
        answer = self.http.request("POST", f"{self.url}/v1/load_lora_adapter", json=body, timeout=LOADING)
        if answer.status != 200 and b"already been loaded" not in answer.data:
            raise Failed(f"vLLM does not load the adapter {path}: {_reason(answer.data)}")

    def unload(self, versioned: str) -> None:
        """Take an adapter away."""
        answer = self.http.request("POST", f"{self.url}/v1/unload_lora_adapter", json={"lora_name": versioned})
        if answer.status != 200:
            raise urllib3.exceptions.HTTPError(f"{versioned} is not unloaded: {_reason(answer.data)}")

    def prompt_nll(self, versioned: str, tokens: list[int], scored: list[int]) -> float:
        """How unlikely the model finds the tokens at the places `scored`: nats a token."""
        body = {"model": versioned, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choice = self._post("/v1/completions", body)["choices"][0]
        found = choice["prompt_logprobs"]
        return -sum(float(found[at][str(tokens[at])]["logprob"]) for at in scored if at) / len(scored)

    def tokens(self, versioned: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """The tokens that the model is given for a conversation, the beginning of its answer included."""
        body: dict[str, Any] = {"model": versioned, "messages": messages, "add_generation_prompt": True}
        if tools:
            body["tools"] = tools
        return [int(token) for token in self._post("/tokenize", body)["tokens"]]

    def token_seconds(self) -> tuple[float, float]:
        """vLLM's own count: seconds between tokens, summed over all requests, and how many such gaps there were."""
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


def _parsed(answer: Any, path: str) -> Any:
    if answer.status != 200:
        raise urllib3.exceptions.HTTPError(f"{path} was answered with {answer.status}: {_reason(answer.data)}")
    return json.loads(answer.data)


def _reason(body: bytes) -> str:
    """The message in one of vLLM's answers."""
    try:
        found = json.loads(body)
        return str(found.get("message") or found["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.decode(errors="replace")[:300]
