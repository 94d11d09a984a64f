"""docs/from-hosted-fine-tuning.md holds: each file on it is read, trained on or rejected as the page says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM, Qwen2Config

from forge.core.contracts import Base, Dataset
from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.storage import DirectoryStore
from tests.cli.command import forge
from tests.conftest import chat, write_jsonl
from tests.docs.test_pages import FENCED
from tests.models.families import tokenizer_of
from tests.preprocess.datasets import documents, prepare_file

PAGE = (Path(__file__).parents[2] / "docs" / "from-hosted-fine-tuning.md").read_text()
COUNT = 20
QUESTION, ANSWER = {"role": "user", "content": "Is it cold?"}, {"role": "assistant", "content": "Yes."}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/oslo.png"}}


def blocks(language: str, text: str = PAGE) -> list[str]:
    """The contents of the page's blocks of a language; those of commands have none."""
    return [block for name, block in FENCED.findall(text) if name == language]


def examples() -> list[Any]:
    """Each row on the page, with the trained text that is shown below it."""
    found = []
    for section in re.split(r"^##+ ", PAGE, flags=re.M):
        if rows := blocks("json", section):
            (row,), (trained,) = rows, blocks("text", section)
            found.append(pytest.param(row, trained.removesuffix("\n"), id=section.partition("\n")[0]))
    return found


def numbered(text: str, n: int) -> str:
    """The text with another question: a data set keeps one of equal rows."""
    return text.replace("?", f" {n}?")


def copies(row: str, count: int = COUNT) -> list[dict[str, Any]]:
    """Rows of one shape, each with a question of its own."""
    return [json.loads(numbered(row, n)) for n in range(count)]


def prepared(rows: list[dict[str, Any]], folder: Path, **options: object) -> Dataset:
    """The data set of a file of these rows, for a base that reads what they contain."""
    tokenizer_of("qwen-3" if "reasoning" in json.dumps(rows) else "qwen-2.5").save_pretrained(folder / "base")
    base = Base(location=(folder / "base").as_uri())
    store = DirectoryStore(folder / "store")
    return prepare_file(write_jsonl(folder / "train.jsonl", rows), store, base, max_seq_len=2048, **options)


def trained_texts(dataset: Dataset, folder: Path) -> list[str]:
    """What is trained of each document, one trained run per line; sorted."""
    return sorted("\n".join(runs) for _, runs in documents(dataset, DirectoryStore(folder / "store")))


def rejected(path: Path, store: DirectoryStore, base: Base | None = None) -> str:
    """The error about a file that cannot be used."""
    with pytest.raises(ForgeError) as caught:
        prepare_file(path, store, base)
    return str(caught.value)


@pytest.mark.parametrize(("row", "trained"), examples())
def test_what_is_trained_of_each_row_is_as_shown(row: str, trained: str, tmp_path: Path) -> None:
    validation = write_jsonl(tmp_path / "validation.jsonl", [chat(f"q {n}", "a") for n in range(COUNT)])
    dataset = prepared(copies(row), tmp_path, heldout_source=validation.as_uri())
    heldout = ["<think>\n\n</think>\n\na<|im_end|>" if "reasoning" in row else "a<|im_end|>"] * COUNT
    assert trained_texts(dataset, tmp_path) == sorted([*(numbered(trained, n) for n in range(COUNT)), *heldout])


def test_the_log_says_how_a_file_was_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, tools, *_ = (example.values[0] for example in examples())
    prepared(copies(weights, 200) + copies(tools), tmp_path)
    log = next(block for block in blocks("text") if block.startswith("preprocess: "))
    for line in log.splitlines():
        said = line.removeprefix("preprocess: ").replace("train.jsonl", str(tmp_path / "train.jsonl"))
        assert said in caplog.messages


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [QUESTION]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}, ANSWER]},
        {"messages": [QUESTION], "reference_answer": "Yes."},
        {"messages": [QUESTION, QUESTION, ANSWER]},
        {"messages": [ANSWER, QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER, {"role": "system", "content": "Be brief."}, QUESTION, ANSWER]},
        {"messages": [QUESTION, {**ANSWER, "weight": 0.5}]},
        {"messages": [QUESTION, ANSWER], "weight": 0.5},
        {"messages": [{**QUESTION, "weight": 1}, {**ANSWER, "weight": 1}]},
    ],
)
def test_rows_that_cannot_be_used_are_rejected_with_the_message_shown(
    row: dict[str, Any], store: DirectoryStore, tmp_path: Path
) -> None:
    error = rejected(write_jsonl(tmp_path / "train.jsonl", copies(json.dumps(row))), store)
    assert sum(message in error for message in messages_shown()) == 1, error


def test_tokenized_parquet_is_rejected_with_the_message_shown(store: DirectoryStore, tmp_path: Path) -> None:
    row = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]}
    pq.write_table(pa.Table.from_pylist([row] * COUNT), tmp_path / "train.parquet")
    error = rejected(tmp_path / "train.parquet", store)
    assert sum(message in error for message in messages_shown()) == 1, error


def messages_shown() -> list[str]:
    """The messages in the table of what is rejected."""
    table = PAGE.partition("\n## What is rejected\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^\|[^|]*\| `([^`]*)` \|", table, re.M)
    assert len(shown) > 5
    return shown


@pytest.mark.parametrize(("example", "key"), [("Tools", "tools"), ("Reasoning", "reasoning_content")])
def test_a_base_whose_template_leaves_something_out_rejects_the_rows(
    example: str, key: str, store: DirectoryStore, tmp_path: Path
) -> None:
    tokenizer_of("llama-3").save_pretrained(tmp_path / "base")
    (row,) = (shown.values[0] for shown in examples() if shown.id == example)
    path = write_jsonl(tmp_path / "train.jsonl", copies(row))
    base = Base(location=(tmp_path / "base").as_uri())
    assert f"the chat template leaves out the row's {key}" in rejected(path, store, base=base)


def converted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the page's script writes them."""
    (script,) = (block for block in blocks("python") if "sys.stdin" in block)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    done = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_script_makes_rows_that_are_trained(tmp_path: Path) -> None:
    chosen = {"input": {"messages": [QUESTION], "tools": []}, "preferred_output": [ANSWER], "non_preferred_output": []}
    theirs = [
        chosen,
        {"prompt": "Is it warm?\n\n###\n\n", "completion": " No. END"},
        {"messages": [QUESTION, ANSWER], "weight": 0},
        {"messages": [QUESTION, ANSWER], "weight": -1.5},
        {"messages": [QUESTION, ANSWER], "weight": 0.5},
        {"messages": [{**QUESTION, "weight": 1}, {**ANSWER, "weight": 1}]},
    ]
    ours = converted(theirs)
    assert ours == [
        {"messages": [QUESTION, ANSWER], "tools": []},
        {"prompt": "Is it warm?", "completion": "No."},
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, {**ANSWER, "weight": 1}]},
    ]
    for row, trained in zip(ours, ("Yes.", "No.", "Yes.", "Yes."), strict=True):
        dataset = prepared(copies(json.dumps(row)), tmp_path)
        assert trained_texts(dataset, tmp_path) == [f"{trained}<|im_end|>"] * COUNT


def recipe_shown() -> dict[str, Any]:
    (block,) = blocks("yaml")
    recipe: dict[str, Any] = yaml.safe_load(block)
    return recipe


def test_the_recipe_and_the_client_name_the_same_model() -> None:
    recipe = Recipe.model_validate(recipe_shown())
    assert recipe.training.lora is not None
    assert recipe.training.lora.rank <= recipe.serving.max_lora_rank
    assert f'model="{recipe.name}"' in PAGE
    assert f"forge rollback {recipe.name}" in PAGE


@pytest.mark.long
def test_the_commands_train_a_model_on_a_file_with_weights_and_tools(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen-2.5")
    tokenizer.save_pretrained(tmp_path / "base")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=2048, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    recipe = recipe_shown()
    recipe["model"]["base"], recipe["evaluation"]["max_new_tokens"] = str(tmp_path / "base"), 8
    recipe["gate"]["min_finished"] = 0  # so small a model does not end its answers
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    weights, tools, *_ = (example.values[0] for example in examples())
    write_jsonl(tmp_path / "train.jsonl", copies(weights, 100) + copies(tools, 100))

    commands = [line for line in "".join(blocks("")).splitlines() if line.startswith(".venv/bin/forge ")]
    assert len(commands) == 2
    for command in commands:
        done = forge(*shlex.split(command)[1:], home=tmp_path / "home", rollout="false")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100 messages not trained: their weight is 0" in done.stdout
    result = json.loads((tmp_path / "home" / "last-run.json").read_text())
    assert result["train_rows"] + result["heldout_rows"] == 200
    assert result["nll"] < result["nll_base"]
    assert (result["verdict"], result["items"] < 30) == ("inconclusive", True)  # as the page says of small files
