"""The held-out loss of each side's saved model, one document at a time, in fp32."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from benchmarks.finetune.data import IGNORED, documents

DOCUMENTS = 400


def main(models: dict[str, str], base: str, dataset: str, folder: str) -> dict[str, Any]:
    """Mean loss of each model by name (nats per trained token)."""
    heldout = documents(Path(dataset, "heldout"))
    pairs = list(zip(heldout["input_ids"], heldout["labels"], strict=True))[:DOCUMENTS]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses = {name: mean_loss(load(Path(path), base).to(device).eval(), pairs, device) for name, path in models.items()}
    return {"losses": losses}


def load(path: Path, base: str) -> Any:
    """The model at a path, or the base with the adapter at that path."""
    if not (path / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(path))


@torch.no_grad()
def mean_loss(model: Any, pairs: list[tuple[list[int], list[int]]], device: torch.device) -> float:
    """Mean cross entropy over the trained tokens of documents of (tokens, labels)."""
    total, trained = 0.0, 0
    for tokens, labels in pairs:
        logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0, :-1]
        targets = torch.tensor(labels[1:], device=device)
        total += functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum").item()
        trained += int((targets != IGNORED).sum())
    return total / trained


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
