"""lm-evaluation-harness on custom tasks, compared with the likelihoods that transformers computes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge.core.errors import ForgeError, Problems
from forge.core.settings import Settings
from tasks.evaluate.harness import check_harness, read_results, run_harness
from tests.conftest import Trained

INSTALLED = Settings().harness_python.exists()
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs lm-evaluation-harness: make .venv-harness")
CHOICES = ["19", "20", '{"date":"20']
QUESTIONS = ["NL: 20 juni 1969", "EN: May 1, 1999", "DE: 3. Mai 2001", "FR: 4 mai 2020", "IT: 5 marzo 1980"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def write_task(folder: Path, **changes: object) -> Path:
    """Write a multiple-choice task with its rows; returns its file."""
    rows = folder / "rows.json"
    rows.write_text("\n".join(json.dumps({"q": q, "gold": at % len(CHOICES)}) for at, q in enumerate(QUESTIONS)))
    task = {
        "task": "years",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": CHOICES,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    file = folder / "years.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


@needs_harness
@pytest.mark.long
def test_a_custom_task_scores_as_with_transformers(trained: Trained, settings: Settings, tmp_path: Path) -> None:
    directory = trained.store.path(trained.model.uri) / "model"
    found = run_harness(directory, [str(write_task(tmp_path))], settings, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    right = 0
    for at, question in enumerate(QUESTIONS):
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        likely = []
        for choice in CHOICES:
            whole = tokenizer(prompt + choice, return_tensors="pt", add_special_tokens=False).input_ids
            start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            with torch.no_grad():
                logits = model(whole).logits.log_softmax(-1)[0]
            likely.append(sum(logits[place - 1, whole[0, place]].item() for place in range(start, whole.shape[1])))
        right += likely.index(max(likely)) == at % len(CHOICES)
    assert found == {"harness/years/acc": pytest.approx(right / len(QUESTIONS))}


@needs_harness
@pytest.mark.long
def test_an_unknown_task_is_named(trained: Trained, settings: Settings) -> None:
    directory = trained.store.path(trained.model.uri) / "model"
    with pytest.raises(ForgeError, match=r"harness_tasks no_such_task: .*no_such_task.*fix the task") as caught:
        run_harness(directory, ["no_such_task"], settings, batch_size=4)
    assert "Traceback" not in caught.value.message


def test_all_missing_and_invalid_tasks_are_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "nameless.yaml").write_text("dataset_path: json\nprocess: !function utils.f\n")
    tasks = ["hellaswag", str(tmp_path / "missing.yaml"), str(tmp_path / "bad.yaml"), str(tmp_path / "nameless.yaml")]
    with pytest.raises(Problems) as caught:
        check_harness(tasks, Settings(home=tmp_path, harness_python=Path(sys.executable)))
    found = caught.value.problems
    assert len(found) == 4
    for problem, part in zip(
        found, ["make .venv-harness", "missing.yaml: cannot be read", "not valid YAML", "no key `task`"], strict=True
    ):
        assert part in problem


@needs_harness
def test_valid_tasks_pass(settings: Settings, tmp_path: Path) -> None:
    check_harness(["hellaswag", str(write_task(tmp_path))], settings)


def test_results_are_flat_and_without_standard_errors() -> None:
    results = {"a": {"alias": "a", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": 0.1, "pass@1,strict": 1}}
    assert read_results({"results": results}) == {"harness/a/acc": 0.5, "harness/a/pass_1.strict": 1.0}
