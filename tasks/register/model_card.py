"""The model card: a README.md in the format of the Hugging Face Hub.

https://huggingface.co/docs/hub/model-cards
"""

from typing import Any

from forge.core.contracts import Base
from forge.registry.packages import ADAPTER, portable_name

CARD = "README.md"
USE = """\
This is an adapter. Load it on top of its base model:

```python
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "DIRECTORY OF THIS FILE")
```

"""


def model_card(facts: dict[str, Any]) -> str:
    """The card of a model, from the facts of its manifest. The same facts always give the same text."""
    from huggingface_hub import EvalResult, ModelCardData

    base, metrics = facts["base"], facts["metrics"]
    adapter = facts["kind"] == ADAPTER
    name = portable_name(Base(**base))
    head = ModelCardData(
        base_model=name if "/" in name and "://" not in base["location"] else None,  # only an ID of the Hub
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
        f"Fine-tuned and evaluated by Forge. Verdict of the gate: **{facts['verdict']}**.",
        "",
        "| metric, on held-out prompts | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        "",
        *(USE.format(base=name or "BASE").splitlines() if adapter else ()),
        "## Lineage",
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
        "`manifest.json` lists every file with its size and SHA-256. It is written last: a package without it is"
        " incomplete.",
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
