"""The documents of a data set as text, and what of them is trained, from rows and tokenizers as users have them.

The rows and templates are as in public bug reports of programs that do this job, made small.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from forge.core.contracts import Base, Dataset
from forge.models.chat import ChatTokenizer, load_tokenizer
from forge.registry.packages import LocalBase
from forge.storage import DirectoryStore
from tests.conftest import write_jsonl
from tests.models.families import CLOCK, conversation, tokenizer_of, tool_messages
from tests.preprocess.datasets import card_of, documents, prepare_file
from tests.preprocess.tokenizers import CHATML, chatml, llama3

COUNT = 20
NAMED = {"default": CHATML, "tool_use": "{{ 'tools: ' ~ (tools | tojson) ~ '\n' }}" + CHATML}


def prepare_rows(
    rows: list[dict[str, Any]] | Path, store: DirectoryStore, folder: Path, tokenizer: Any = None, **options: object
) -> Dataset:
    """The data set of rows, or of a file of them, for a base with this tokenizer."""
    base = Base()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "base")
        base = Base(location=(folder / "base").as_uri())
    path = rows if isinstance(rows, Path) else write_jsonl(folder / "rows.jsonl", rows)
    return prepare_file(path, store, base, max_seq_len=2048, **options)


def test_turns_whose_reasoning_the_template_drops_are_not_trained_and_counted(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """https://github.com/modelscope/ms-swift/issues/4939"""

    def row(n: int) -> dict[str, Any]:
        messages = conversation(f"q {n}", "first", "more", f"last {n}")
        messages[1]["reasoning_content"] = "since"
        return {"messages": messages}

    dataset = prepare_rows([row(n) for n in range(COUNT)], store, tmp_path, tokenizer_of("qwen-3"))
    answers = sorted(f"<think>\n\n</think>\n\nlast {n}<|im_end|>" for n in range(COUNT))
    assert sorted(run for _, runs in documents(dataset, store) for run in runs) == answers
    assert f"{COUNT} messages not trained: the chat template renders them differently later" in caplog.text


def test_rows_with_tools_get_the_tool_use_template_of_a_saved_tokenizer(store: DirectoryStore, tmp_path: Path) -> None:
    """https://github.com/huggingface/transformers/issues/31429"""
    tokenizer = chatml()
    tokenizer.chat_template = NAMED
    rows = [{"messages": conversation(f"q {n}", "b"), **({"tools": [CLOCK]} if n % 2 else {})} for n in range(COUNT)]
    texts = [text for text, _ in documents(prepare_rows(rows, store, tmp_path, tokenizer), store)]
    assert sum(text.startswith("tools: ") and "The time in a zone." in text for text in texts) == COUNT // 2
    assert sum(text.startswith("<|im_start|>user") for text in texts) == COUNT // 2


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_a_document_has_one_begin_token_though_the_tokenizer_adds_its_own(
    kind: str, store: DirectoryStore, tmp_path: Path
) -> None:
    """https://github.com/OpenRLHF/OpenRLHF/issues/393"""
    tokenizer = llama3()
    begin = tokenizer.bos_token
    adds = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    chats = [{"messages": conversation(f"q {n}", "b")} for n in range(COUNT)]
    rows = chats if kind == "messages" else [{"text": f"some words {n}"} for n in range(COUNT)]
    own = write_jsonl(tmp_path / "own.jsonl", [{"messages": conversation("mine", "m")}])
    dataset = prepare_rows(rows, store, tmp_path, tokenizer, heldout_source=own.as_uri())
    assert [text.count(begin) for text, _ in documents(dataset, store)] == [1] * (COUNT + 1)
    chat = ChatTokenizer(load_tokenizer(LocalBase(str(tmp_path / "base"))), "test")
    assert chat.prompt(conversation("q"), None).count(tokenizer.bos_token_id) == 1


def of_sharegpt(n: int) -> dict[str, Any]:
    """https://github.com/axolotl-ai-cloud/axolotl/issues/1703"""
    turns = [("human", f"q {n}"), ("gpt", "a wrong answer"), ("human", "No."), ("gpt", f"right {n}")]
    weights: list[dict[str, int]] = [{}, {"weight": 0}, {}, {"weight": 1}]
    values = [{"from": who, "value": text} for who, text in turns]
    return {"conversations": [value | weight for value, weight in zip(values, weights, strict=True)]}


def of_chat(n: int) -> dict[str, Any]:
    """https://github.com/hiyouga/LlamaFactory/issues/2571"""
    first, wrong, second, right = conversation(f"q {n}", "a wrong answer", "No.", f"right {n}")
    return {"messages": [first, {**wrong, "loss": False}, second, {**right, "loss": True}]}


@pytest.mark.parametrize("row", [of_sharegpt, of_chat])
def test_an_answer_that_is_marked_as_wrong_is_read_but_not_trained(
    row: Callable[[int], dict], store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = documents(prepare_rows([row(n) for n in range(COUNT)], store, tmp_path), store)
    assert all("<|assistant|>a wrong answer<|end|>" in text for text, _ in found)
    assert sorted(run for _, runs in found for run in runs) == sorted(f"right {n}<|end|>" for n in range(COUNT))
    assert f"{COUNT} messages not trained: their weight is 0" in caplog.text


def test_nulls_that_arrow_adds_are_not_trained(store: DirectoryStore, tmp_path: Path) -> None:
    """https://github.com/modelscope/ms-swift/issues/6467"""

    def row(n: int) -> dict[str, Any]:
        name, value = ("zone", "UTC") if n % 2 else ("offset", n)
        schema = {"type": "object", "properties": {name: {"type": "string"}}}
        asked = {"function": {"name": "clock", "arguments": {name: value}}}
        _, called, *rest = tool_messages()
        messages = [*conversation(f"q {n}"), {**called, "tool_calls": [asked]}, *rest]
        return {"messages": messages, "tools": [{"function": {"name": "clock", "parameters": schema}}]}

    rows = [row(n) for n in range(COUNT)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "null" in json.dumps(table.to_pylist())
    sources = [rows, table.to_pylist(), tmp_path / "rows.parquet"]
    digests = {prepare_rows(source, store, tmp_path, tokenizer_of("qwen-2.5")).digest for source in sources}
    assert len(digests) == 1


def as_map(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a table whose arguments are a map: https://github.com/apache/arrow/issues/39010"""
    question, asked, *rest = row["messages"]
    function = asked["tool_calls"][0]["function"]
    calls = [{**asked["tool_calls"][0], "function": {**function, "arguments": [*function["arguments"].items()]}}]
    return {"messages": [question, {**asked, "tool_calls": calls}, *rest], "tools": json.dumps(row["tools"])}


def as_texts(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose objects are JSON, as datasets' List(Json()): https://github.com/modelscope/ms-swift/issues/10125"""
    return {name: [json.dumps(entry) for entry in value] for name, value in row.items()}


TEXT = pa.string()
CALL = pa.struct({"id": TEXT, "function": pa.struct({"name": TEXT, "arguments": pa.map_(TEXT, TEXT)})}.items())
MESSAGE = pa.struct({"role": TEXT, "content": TEXT, "tool_calls": pa.list_(CALL), "tool_call_id": TEXT}.items())
WITH_MAP = pa.schema({"messages": pa.list_(MESSAGE), "tools": TEXT}.items())


@pytest.mark.parametrize(("form", "schema"), [(as_map, WITH_MAP), (as_texts, None)])
def test_parquet_of_other_types_gives_the_same_data_set(
    form: Callable[[dict], dict], schema: pa.Schema | None, store: DirectoryStore, tmp_path: Path
) -> None:
    rows = [{"messages": [*conversation(f"q {n}"), *tool_messages()[1:]], "tools": [CLOCK]} for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist([form(row) for row in rows], schema), tmp_path / "rows.parquet")
    plain, other = (
        prepare_rows(source, store, tmp_path, tokenizer_of("qwen-2.5")).digest
        for source in (rows, tmp_path / "rows.parquet")
    )
    assert other == plain


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_unusual_separators_in_a_text_split_no_row(kind: str, store: DirectoryStore, tmp_path: Path) -> None:
    """https://github.com/huggingface/tau/issues/354"""
    answer = "\u200b\u202eabc\u202c\x85👩‍👩‍👧\x0b\x1c\u2029"
    rows = [{"prompt": f"a\u2028b\u0085c\x0c {n}", "completion": f"{answer}{n}"} for n in range(COUNT)]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        separator = "\n" if kind == "jsonl" else ",\n"
        text = separator.join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(f"{text}\n" if kind == "jsonl" else f"[{text}]", encoding="utf-8")
    dataset = prepare_rows(path, store, tmp_path)
    assert card_of(dataset, store)["rows"] == COUNT
    trained = sorted(run for _, runs in documents(dataset, store) for run in runs)
    assert trained == sorted(f"{answer}{n}<|end|>" for n in range(COUNT))


def test_the_data_set_names_the_tokens_that_end_its_turns(store: DirectoryStore, tmp_path: Path) -> None:
    """Of a pretrained base, whose eos_token is another one."""
    tokenizer = chatml()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    dataset = prepare_rows(
        [{"messages": conversation(f"q {n}", "b")} for n in range(COUNT)], store, tmp_path, tokenizer
    )
    assert card_of(dataset, store)["end_tokens"] == ["<|im_end|>"]
    assert {run for _, runs in documents(dataset, store) for run in runs} == {"b<|im_end|>"}
