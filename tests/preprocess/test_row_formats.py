"""All row formats and file formats give the same conversations."""

import csv
import gzip
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.storage import DirectoryStore
from tasks.preprocess.file_formats import RawFile, read_blocks
from tasks.preprocess.row_formats import ROW_FORMATS, detect_row_format, row_format_named, to_row
from tasks.preprocess.rows import Invalid, Row, digests
from tasks.preprocess.sources import find_files
from tasks.preprocess.worker import heldout_row, split_row
from tests.conftest import chat, write_jsonl
from tests.preprocess.datasets import prepare_file

RECIPE = DataRecipe(max_seq_len=128)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
NO_ARGUMENTS = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("value", "row_format", "messages"),
    [
        ({"messages": CHAT}, "chat", CHAT),
        ({"messages": json.dumps(CHAT)}, "chat", CHAT),  # as in CSV
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, CHAT[1]]},
            "chat",
            CHAT,
        ),
        ({"prompt": "a", "completion": "b"}, "prompt", CHAT),
        (
            {"prompt": "a", "completion": "b", "system": "s"},
            "prompt",
            [{"role": "system", "content": "s"}, *CHAT],
        ),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt", CHAT),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", CHAT),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "alpaca",
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt", CHAT),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            "sharegpt",
            [
                {"role": "system", "content": "s"},
                CHAT[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                CHAT[1],
            ],
        ),
        (
            {
                "messages": [
                    CHAT[0],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                ]
            },
            "chat",
            [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        # As OpenAI's API had calls and system messages: https://github.com/MicrosoftDocs/azure-docs/issues/120001
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    CHAT[0],
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                    {"role": "function", "name": "f", "content": "1"},
                    CHAT[1],
                ]
            },
            "chat",
            [
                {"role": "system", "content": "s"},
                CHAT[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "name": "f"},
                CHAT[1],
            ],
        ),
        ({"messages": CHAT, "system": "s"}, "chat", [{"role": "system", "content": "s"}, *CHAT]),
        ({"messages": [json.dumps(message) for message in CHAT]}, "chat", CHAT),  # as datasets' List(Json()) in Parquet
        # https://github.com/hiyouga/LlamaFactory/issues/6878
        ({"conversations": CHAT}, "sharegpt", CHAT),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "s"},
            "prompt",
            [{"role": "system", "content": "s"}, *CHAT],
        ),
        # https://github.com/hiyouga/LlamaFactory/issues/3351
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["c", "d"]]},
            "alpaca",
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
                *CHAT,
            ],
        ),
        # https://github.com/vllm-project/vllm/issues/19419
        (
            {
                "messages": [
                    CHAT[0],
                    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": ""}]},
                ]
            },
            "chat",
            [
                CHAT[0],
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}],
                },
            ],
        ),
        # Arrow gives every object the keys of all, with nulls: https://github.com/castform-ai/benchmax/issues/34
        (
            {
                "messages": [
                    {**CHAT[0], "tool_calls": None, "weight": None},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": None, "function": {"name": "f", "arguments": {"x": 1, "y": None}}}],
                    },
                ],
                "tools": None,
            },
            "chat",
            [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
    ],
)
def test_row_formats_are_detected_and_converted(value: dict, row_format: str, messages: list) -> None:
    detected = detect_row_format(value)
    assert detected is not None
    assert detected.name == row_format
    assert to_row(value, detected, RECIPE, Counter(), Counter()).messages == messages


TOOL = {"name": "f", "parameters": {"type": "object"}}
SERVED = {"type": "function", "function": {"name": "f", "description": None, "parameters": {"type": "object"}}}


# https://github.com/OpenRLHF/OpenRLHF/issues/1079
@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "a", "completion": "b", "tools": [TOOL]},
        {"prompt": "a", "completion": "b", "tools": json.dumps([TOOL])},
        {"prompt": "a", "completion": "b", "tools": [json.dumps(TOOL)]},
        {"instruction": "a", "output": "b", "tools": [{**TOOL, "default": None}]},
        {"messages": CHAT, "tools": [TOOL]},
    ],
)
def test_tools_beside_any_format_are_read(value: dict) -> None:
    row_format = detect_row_format(value)
    assert row_format is not None
    assert to_row(value, row_format, RECIPE, Counter(), Counter()).tools == [SERVED]


def test_functions_are_tools() -> None:
    row = to_row({"messages": CHAT, "functions": [TOOL]}, ROW_FORMATS[0], RECIPE, Counter(), Counter())
    assert row.tools == [SERVED]


def test_tools_have_the_form_that_servers_show_and_their_other_keys_are_counted() -> None:
    tool = {"function": {"return": {"type": "string"}, "strict": True, "description": "d", "name": "f"}, "x": 1}
    ignored: Counter[str] = Counter()
    row = to_row({"messages": CHAT, "tools": [tool]}, ROW_FORMATS[0], RECIPE, ignored, Counter())
    function = {"name": "f", "description": "d", "parameters": None, "strict": True}
    assert row.tools == [{"type": "function", "function": function}]
    assert list(row.tools[0]["function"]) == list(function)
    assert ignored == {"tools.return": 1, "tools.x": 1}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"trainable": False, "weight": 1}])
@pytest.mark.parametrize("row_format", ["chat", "sharegpt"])
def test_turns_can_be_left_out_of_training(row_format: str, mark: dict) -> None:
    if row_format == "chat":
        turns = [CHAT[0], {**CHAT[1], **mark}, {**CHAT[0], "weight": None}, {**CHAT[1], "weight": 1}]
        value: dict = {"messages": turns}
    else:
        pairs = [({"from": "human", "value": "a"}, {"from": "gpt", "value": "b"})] * 2
        value = {"conversations": [pairs[0][0], {**pairs[0][1], **mark}, *pairs[1]]}
    row = to_row(value, row_format_named(row_format), RECIPE, Counter(), Counter())
    assert row.messages == CHAT * 2
    assert row.untrained == (1,)
    assert digests(row) != digests(replace(row, untrained=()))


TWICE = [CHAT[0], {"role": "user", "content": "c"}, CHAT[1]]
LEADING = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "Hello."}, *CHAT]


def test_conversations_that_do_not_alternate_are_rejected_merged_or_shortened() -> None:
    def read(messages: list, turns: str) -> tuple[list, tuple[int, ...], Counter[str]]:
        changed: Counter[str] = Counter()
        recipe = RECIPE.model_copy(update={"turns": turns})
        row = to_row({"messages": messages}, ROW_FORMATS[0], recipe, Counter(), changed)
        return row.messages, row.untrained, +changed

    merged = [{"role": "user", "content": "a\n\nc"}, CHAT[1]]
    assert read(TWICE, "merge") == (merged, (), {"merged with the message before": 1})
    assert read(LEADING, "drop-leading") == (
        [LEADING[0], *CHAT],
        (),
        {"dropped, before the user's first message": 1},
    )
    for messages, turns in ((TWICE, "strict"), (TWICE, "drop-leading"), (LEADING, "strict"), (LEADING, "merge")):
        with pytest.raises(Invalid, match=r"user and assistant must alternate.* see data\.turns"):
            read(messages, turns)
    # What is learned and what is not is never merged, and its place moves with the others.
    answers = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[1]]
    with pytest.raises(Invalid, match="must alternate"):
        read(answers, "merge")
    assert read([*TWICE[:2], {**CHAT[1], "weight": 0}, *CHAT], "merge")[:2] == ([*merged, *CHAT], (1,))


def test_a_split_row_keeps_what_is_not_trained() -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(8)]
    row = Row([{"role": "system", "content": "s"}, *turns], None, None, "g", "s", '"exact"', (2, 6))
    first, second = split_row(row)
    assert [message["content"] for message in first.messages] == ["s", "0", "1", "2", "3"]
    assert [message["content"] for message in second.messages] == ["s", "4", "5", "6", "7"]
    assert (first.untrained, second.untrained) == ((2,), (2,))
    assert (first.check, second.check) == ("", '"exact"')
    (only,) = split_row(replace(row, untrained=(2, 4)))
    assert (only.messages[1]["content"], only.untrained) == ("4", ())


def test_plain_text_row() -> None:
    row = to_row({"text": "Once upon a time."}, row_format_named("text"), RECIPE, Counter(), Counter())
    assert (row.text, row.messages) == ("Once upon a time.", [])


def test_group_and_slice_have_defaults_and_unused_columns_are_counted() -> None:
    ignored: Counter[str] = Counter()
    first_turn = [{"role": "user", "content": "One  TWO"}, {"role": "assistant", "content": "x"}]
    first = to_row({"messages": [*first_turn, *CHAT], "id": 7}, row_format_named("chat"), RECIPE, ignored, Counter())
    second = to_row({"messages": CHAT, "group": 7, "slice": "s"}, row_format_named("chat"), RECIPE, ignored, Counter())
    assert (first.group, first.slice) == ("one two", "all")
    assert (second.group, second.slice) == ("7", "s")
    assert ignored == {"id": 1}


def test_unused_keys_of_messages_are_counted() -> None:
    ignored: Counter[str] = Counter()
    to_row({"messages": [{**CHAT[0], "time": "10:42"}, CHAT[1]]}, row_format_named("chat"), RECIPE, ignored, Counter())
    assert ignored == {"messages.time": 1}


def test_row_format_of_the_recipe_is_not_detected() -> None:
    with pytest.raises(Invalid, match="must have instruction and output"):
        to_row({"messages": CHAT}, row_format_named("alpaca"), RECIPE, Counter(), Counter())


ROWS = [{"prompt": f'question {n}, "quoted"\nwith a line', "completion": f"answer {n} é"} for n in range(40)]


def write_as(path: Path, kind: str) -> Path:
    path = path / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if kind.startswith("jsonl"):
        compressed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": None}[kind]
        path.write_bytes(compressed or pa.compress(lines, "zstd", asbytes=True))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


def test_all_file_formats_give_the_same_data_set(store: DirectoryStore, tmp_path: Path) -> None:
    kinds = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "csv", "tsv")
    digests = {kind: prepare_file(write_as(tmp_path, kind), store).digest for kind in kinds}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_block_size_does_not_change_rows_and_line_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_as(tmp_path, kind)

    def read() -> list:
        return [pair for block in read_blocks([RawFile("x", path)]) for pair in block.values()]

    whole = read()
    assert [value for _, value in whole] == ROWS
    monkeypatch.setattr("tasks.preprocess.file_formats.BLOCK", 100)
    assert read() == whole
    if kind == "jsonl":
        assert [number for number, _ in whole] == list(range(1, 41))


def test_json_and_csv_rows_have_the_number_of_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"text":\n  "a"},\n {"text": "b"}]\n')
    assert [number for block in read_blocks([RawFile("x", path)]) for number, _ in block.values()] == [2, 4]
    path = tmp_path / "rows.csv"
    path.write_text('text\n"a\nb"\nc\n')
    assert [number for block in read_blocks([RawFile("x", path)]) for number, _ in block.values()] == [2, 4]


def test_rows_of_one_line_have_numbers_of_their_own(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [*ROWS[:20], {"prompt": "long", "completion": "x" * 500}, *ROWS[20:]]
    path.write_text(json.dumps(rows))
    dataset = prepare_file(path, store, max_reject_fraction=0.1)
    assert dataset.train_rows + dataset.heldout_rows == len(ROWS)
    (rejected,) = (store.path(dataset.uri) / "rejects.jsonl").read_text().splitlines()
    assert json.loads(rejected)["row"] == f"{path}:21"


def test_endless_line_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.preprocess.file_formats.BLOCK", 100)
    monkeypatch.setattr("tasks.preprocess.file_formats.MAX_ROW", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(ForgeError, match=r"rows\.jsonl:1: a line of more than"):
        list(read_blocks([RawFile("rows.jsonl", path)]))


def test_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    for name in ("b.jsonl", "a.csv", "deep/c.parquet", "README.md", "_SUCCESS", ".hidden/d.jsonl", "E.JSONL.GZ"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(source: str) -> list[str]:
        return [file.path.relative_to(tmp_path).as_posix() for file in find_files(source)]

    assert names(str(tmp_path)) == ["E.JSONL.GZ", "a.csv", "b.jsonl", "deep/c.parquet"]
    assert names(f"{tmp_path}/*.jsonl") == ["b.jsonl"]
    assert names(f"file://{tmp_path}/**/*.[cp]*") == ["a.csv", "deep/c.parquet"]


def test_skipped_files_are_reported(store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "rows" / "a.jsonl", ROWS)
    (tmp_path / "rows" / "b.jsonl.bz2").write_text("x")
    prepare_file(tmp_path / "rows", store)
    assert "skipped 1 files of unknown type" in caplog.text
    assert "b.jsonl.bz2" in caplog.text


@pytest.mark.parametrize("what", ["missing", "nothing", "*.jsonl"])
def test_source_without_files(what: str, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ForgeError) as caught:
        find_files(str(tmp_path / what))
    assert str(tmp_path / what) in caught.value.message


def test_row_format_and_ignored_columns_are_logged(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"{n}", "output": "b", "id": n} for n in range(40)])
    prepare_file(path, store)
    assert f"row format alpaca: {path}:1 is alpaca (it has instruction and output)" in caplog.text
    assert "columns ignored: id" in caplog.text


@pytest.mark.parametrize(
    ("column", "check"),
    [
        ("json", '{"kind":"json"}'),
        ({"kind": "number", "tolerance": 0.01}, '{"kind":"number","tolerance":0.01}'),
        ('{"kind": "regex", "pattern": "a+"}', '{"kind":"regex","pattern":"a+"}'),
    ],
)
def test_row_can_say_how_its_answer_is_scored(column: object, check: str) -> None:
    row = to_row({**chat("q", "a"), "check": column}, ROW_FORMATS[0], RECIPE, Counter(), Counter())
    assert row.check == check
    assert digests(row) != digests(to_row(chat("q", "a"), ROW_FORMATS[0], RECIPE, Counter(), Counter()))
    assert heldout_row(row)["check"] == json.loads(check)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("fuzzy", "check.kind: Input should be"),
        ({"kind": "regex"}, "a check of kind regex needs a pattern"),
        ({"kind": "regex", "pattern": "("}, "pattern is not a regular expression"),
        (3, "check: Input should be"),
    ],
)
def test_invalid_check_is_rejected(column: object, message: str) -> None:
    with pytest.raises(Invalid, match=re.escape(message)):
        to_row({**chat("q", "a"), "check": column}, ROW_FORMATS[0], RECIPE, Counter(), Counter())


def test_last_part_of_a_split_row_keeps_the_check() -> None:
    row = to_row({"messages": [*chat("q", "a")["messages"], *chat("r", "b")["messages"]], "check": "json"},
                 ROW_FORMATS[0], RECIPE, Counter(), Counter())  # fmt: skip
    assert [part.check for part in split_row(row)] == ["", '{"kind":"json"}']


def read(value: dict, row_format: str = "chat", **options: object) -> Row:
    """The row of a value in a format."""
    recipe = RECIPE.model_copy(update=options)
    return to_row(value, row_format_named(row_format), recipe, Counter(), Counter())


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_other_names_of_reasoning_are_read(name: str) -> None:
    answer = {**CHAT[1], name: "because", "reasoning_content": " "}
    assert read({"messages": [CHAT[0], answer]}).messages[1]["reasoning_content"] == "because"


def test_system_prompt_is_the_system_message() -> None:
    expected = [{"role": "system", "content": "s"}, *CHAT]
    assert read({"messages": CHAT, "system_prompt": "s"}).messages == expected
    assert read({"messages": expected, "system_prompt": "s", "system": "s"}).messages == expected
    with pytest.raises(Invalid, match="the columns system and system_prompt differ; remove one"):
        read({"messages": CHAT, "system_prompt": "s", "system": "t"})


def test_history_is_read_before_a_prompt_too() -> None:
    row = read({"prompt": "a", "completion": "b", "history": [["c", "d"]], "system": "s"}, "prompt")
    assert [message["content"] for message in row.messages] == ["s", "c", "d", "a", "b"]


def test_a_blank_input_is_none() -> None:
    assert read({"instruction": "a", "input": " \n", "output": "b"}, "alpaca").messages == CHAT


def test_the_order_of_a_messages_keys_does_not_make_another_row() -> None:
    keys = {"role": "assistant", "content": "b", "name": "n", "reasoning_content": "r", "tool_call_id": "t"}
    rows = [read({"messages": [CHAT[0], dict(order)]}) for order in (keys.items(), reversed(keys.items()))]
    assert digests(rows[0]) == digests(rows[1])


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_empty_column_is_as_good_as_none(nothing: str | None) -> None:
    ignored: Counter[str] = Counter()
    columns = dict.fromkeys(["group", "slice", "check", "system", "tools", "note"], nothing)
    row = to_row({"messages": CHAT, **columns}, row_format_named("chat"), RECIPE, ignored, Counter())
    assert digests(row) == digests(read({"messages": CHAT}))
    assert ignored == {}
    assert detect_row_format({"text": "a", "prompt": nothing, "completion": nothing}) is row_format_named("text")


def test_nulls_of_a_check_are_dropped() -> None:
    assert read({"messages": CHAT, "check": {"kind": "json", "pattern": None}}).check == '{"kind":"json"}'


def test_keys_of_calls_that_are_not_used_are_counted() -> None:
    ignored: Counter[str] = Counter()
    call = {"type": "function", "index": 0, "origin": "x", "function": {**CALL["function"], "strict": True}}
    row = to_row(
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call]}]},
        row_format_named("chat"), RECIPE, ignored, Counter(),
    )  # fmt: skip
    assert row.messages[1]["tool_calls"] == [CALL]
    assert ignored == {"messages.tool_calls.strict": 1, "messages.tool_calls.origin": 1}


def test_nothing_is_counted_of_a_row_that_is_rejected() -> None:
    ignored: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    recipe = RECIPE.model_copy(update={"turns": "merge"})
    value = {"messages": [{**CHAT[0], "time": "10:42"}, CHAT[0]], "note": "x"}
    with pytest.raises(Invalid, match="no assistant turn"):
        to_row(value, row_format_named("chat"), recipe, ignored, changed)
    assert (ignored, changed) == ({}, {})


def test_messages_keep_their_numbers_when_others_are_merged_or_dropped() -> None:
    with pytest.raises(Invalid, match=r"message 4 \(tool\)"):
        read({"messages": [*TWICE, {"role": "tool", "content": "x"}, CHAT[1]]}, turns="merge")
    with pytest.raises(Invalid, match=r"message 4 \(user\)"):
        read({"messages": [LEADING[1], LEADING[1], CHAT[0], CHAT[0]]}, turns="drop-leading")


def test_a_file_and_links_to_it_are_read_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "a.jsonl").symlink_to(path)
    for source in (tmp_path, tmp_path / "*"):
        assert [file.path.name for file in find_files(str(source))] == ["a.jsonl"]


def test_directories_that_match_a_glob_are_read(tmp_path: Path) -> None:
    for name in ("part-1/a.jsonl", "part-2/deep/b.jsonl", "part-3.jsonl", "_part-4/c.jsonl", "part-2/README.md"):
        write_jsonl(tmp_path / name, ROWS)
    names = [file.path.relative_to(tmp_path).as_posix() for file in find_files(str(tmp_path / "*part-*"))]
    assert names == ["part-1/a.jsonl", "part-2/deep/b.jsonl", "part-3.jsonl"]


@pytest.mark.parametrize("name", [".jsonl", ".jsonl.gz", "a.b.JSONL"])
def test_the_ending_of_a_name_says_its_format(name: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    blocks = read_blocks(find_files(str(tmp_path / name)))
    assert [value for block in blocks for _, value in block.values()] == ROWS


def test_the_parts_of_a_packed_file_are_all_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:100]) + gzip.compress(lines[100:]))
    parts = [pa.compress(part, "zstd", asbytes=True) for part in (lines[:100], lines[100:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(parts))
    blocks = read_blocks(find_files(str(tmp_path)))
    assert [value for block in blocks for _, value in block.values()] == [*ROWS, *ROWS]


def test_a_file_whose_name_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / os.fsdecode(b"\xff.jsonl"), ROWS)
    with pytest.raises(ForgeError, match=r"udcff\.jsonl: the name is not UTF-8; rename the file"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("source", ["/\0/*", "a\0.jsonl"])
def test_a_path_that_no_file_can_have(source: str) -> None:
    with pytest.raises(ForgeError, match="NUL"):
        find_files(source)
