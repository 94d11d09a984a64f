"""The model card: README.md in the form of the Hugging Face Hub, so that people and other tools read it too.

https://huggingface.co/docs/hub/model-cards
"""

from typing import Any

from forge.core.contracts import Base
from forge.registry.packages import ADAPTER, portable_name

CARD = "README.md"
USE = """\
This is an adapter, to be loaded beside the base that it was trained on:

```python
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "DIRECTORY OF THIS FILE")
```

"""


def model_card(facts: dict[str, Any]) -> str:
    """The card of a model, made of its manifest's facts alone: the same facts give the same text."""
    from huggingface_hub import EvalResult, ModelCardData

    base, metrics = facts["base"], facts["metrics"]
    adapter = facts["kind"] == ADAPTER
    name = portable_name(Base(**base))
    head = ModelCardData(
        base_model=name if "/" in name and "://" not in base["location"] else None,  # the hub knows its own ids alone
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["forge", *(["lora"] if adapter else [])],
        model_name=facts["name"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=facts["name"],
                dataset_name=f"held-out rows of sha256-{facts['dataset'][:12]}",
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ],
    )
    lines = [
        f"# {facts['name']}",
        "",
        f"Fine-tuned and evaluated by Forge. The gate said: **{facts['verdict']}**.",
        "",
        "| measure, on held-out prompts | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        "",
        *(USE.format(base=name or "BASE").splitlines() if adapter else ()),
        "## What it was made from",
        "",
        "| | |",
        "|---|---|",
        f"| trained from | {' '.join(base.values()).strip()} |",
        f"| data set | sha256 {facts['dataset']} |",
        f"| recipe | sha256 {facts['recipe']} |",
        f"| evaluation | sha256 {facts['evaluation']} |",
        f"| model's files | sha256 {facts['model_digest']} |",
        f"| trained by | {facts['made_by']} |",
        *(f"| {name} | {version} |" for name, version in facts["versions"].items()),
        "",
        "`manifest.json` names every file with its size and SHA-256, and is written last: a package without it is not"
        " whole.",
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
