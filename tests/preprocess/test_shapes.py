"""Rows of all shapes and formats come to the same conversations."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.storage import DirectoryStore
from tasks.preprocess.formats import RawFile, read_blocks
from tasks.preprocess.rows import Invalid, digests
from tasks.preprocess.shapes import SHAPES, detect, shape_named, to_row
from tasks.preprocess.sources import find_files
from tasks.preprocess.worker import heldout_row, split_row
from tests.conftest import chat, write_jsonl
from tests.preprocess.test_zoo import prepare_file

RECIPE = DataRecipe(max_seq_len=128)
ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("value", "shape", "messages"),
    [
        ({"messages": ASKED}, "chat", ASKED),
        ({"messages": json.dumps(ASKED)}, "chat", ASKED),  # as CSV has it
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ASKED[1]]}, "chat", ASKED),
        ({"prompt": "a", "completion": "b"}, "prompt", ASKED),
        ({"prompt": "a", "completion": "b", "system": "s"}, "prompt", [{"role": "system", "content": "s"}, *ASKED]),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt", ASKED),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", ASKED),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "alpaca",
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt", ASKED),
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
                ASKED[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                ASKED[1],
            ],
        ),
        (
            {
                "messages": [
                    ASKED[0],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                ]
            },
            "chat",
            [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
    ],
)
def test_shapes_are_detected_and_converted(value: dict, shape: str, messages: list) -> None:
    found = detect(value)
    assert found is not None
    assert found.name == shape
    assert to_row(value, found, RECIPE, Counter()).messages == messages


def test_plain_texts() -> None:
    row = to_row({"text": "Once upon a time."}, shape_named("text"), RECIPE, Counter())
    assert (row.text, row.messages) == ("Once upon a time.", [])


def test_columns_are_optional_and_those_not_used_are_counted() -> None:
    ignored: Counter[str] = Counter()
    asked = [{"role": "user", "content": "One  TWO"}, {"role": "assistant", "content": "x"}]
    first = to_row({"messages": [*asked, *ASKED], "id": 7}, shape_named("chat"), RECIPE, ignored)
    second = to_row({"messages": ASKED, "group": 7, "slice": "s"}, shape_named("chat"), RECIPE, ignored)
    assert (first.group, first.slice) == ("one two", "all")
    assert (second.group, second.slice) == ("7", "s")
    assert ignored == {"id": 1}


def test_keys_of_messages_that_are_not_used_are_counted() -> None:
    ignored: Counter[str] = Counter()
    to_row({"messages": [{**ASKED[0], "time": "10:42"}, ASKED[1]]}, shape_named("chat"), RECIPE, ignored)
    assert ignored == {"messages.time": 1}


def test_a_shape_that_the_recipe_names_is_not_guessed() -> None:
    with pytest.raises(Invalid, match="must have instruction and output"):
        to_row({"messages": ASKED}, shape_named("alpaca"), RECIPE, Counter())


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


def test_all_formats_give_the_same_data_set(store: DirectoryStore, tmp_path: Path) -> None:
    kinds = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "csv", "tsv")
    digests = {kind: prepare_file(write_as(tmp_path, kind), store).digest for kind in kinds}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_small_blocks_give_the_same_rows_and_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_as(tmp_path, kind)

    def read() -> list:
        return [pair for block in read_blocks([RawFile("x", path)]) for pair in block.values()]

    whole = read()
    assert [value for _, value in whole] == ROWS
    monkeypatch.setattr("tasks.preprocess.formats.BLOCK", 100)
    assert read() == whole
    if kind == "jsonl":
        assert [number for number, _ in whole] == list(range(1, 41))


def test_json_and_csv_rows_are_known_by_the_line_they_begin_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"text":\n  "a"},\n {"text": "b"}]\n')
    assert [number for block in read_blocks([RawFile("x", path)]) for number, _ in block.values()] == [2, 4]
    path = tmp_path / "rows.csv"
    path.write_text('text\n"a\nb"\nc\n')
    assert [number for block in read_blocks([RawFile("x", path)]) for number, _ in block.values()] == [2, 4]


def test_a_line_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.preprocess.formats.BLOCK", 100)
    monkeypatch.setattr("tasks.preprocess.formats.LONGEST", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(ForgeError, match=r"rows\.jsonl:1: a line of more than"):
        list(read_blocks([RawFile("rows.jsonl", path)]))


def test_directories_and_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "deep/c.parquet", "README.md", "_SUCCESS", ".hidden/d.jsonl", "E.JSONL.GZ"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(source: str) -> list[str]:
        return [file.path.relative_to(tmp_path).as_posix() for file in find_files(source)]

    assert names(str(tmp_path)) == ["E.JSONL.GZ", "a.csv", "b.jsonl", "deep/c.parquet"]
    assert names(f"{tmp_path}/*.jsonl") == ["b.jsonl"]
    assert names(f"file://{tmp_path}/**/*.[cp]*") == ["a.csv", "deep/c.parquet"]


def test_files_of_unknown_kinds_are_told(store: DirectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_jsonl(tmp_path / "rows" / "a.jsonl", ROWS)
    (tmp_path / "rows" / "b.jsonl.bz2").write_text("x")
    prepare_file(tmp_path / "rows", store)
    assert "1 files in" in (told := capsys.readouterr().out)
    assert "b.jsonl.bz2" in told


@pytest.mark.parametrize("what", ["missing", "nothing", "*.jsonl"])
def test_a_source_that_holds_nothing(what: str, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ForgeError) as caught:
        find_files(str(tmp_path / what))
    assert str(tmp_path / what) in caught.value.message


def test_the_shape_and_why_are_told(store: DirectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"{n}", "output": "b", "id": n} for n in range(40)])
    prepare_file(path, store)
    told = capsys.readouterr().out
    assert f"shape alpaca: {path}:1 is alpaca (it has instruction and output)" in told
    assert "columns not used: id" in told


@pytest.mark.parametrize(
    ("column", "kept"),
    [
        ("json", '{"kind":"json"}'),
        ({"kind": "number", "tolerance": 0.01}, '{"kind":"number","tolerance":0.01}'),
        ('{"kind": "regex", "pattern": "a+"}', '{"kind":"regex","pattern":"a+"}'),
    ],
)
def test_a_row_may_say_how_its_answer_is_judged(column: object, kept: str) -> None:
    row = to_row({**chat("q", "a"), "check": column}, SHAPES[0], RECIPE, Counter())
    assert row.check == kept
    assert digests(row) != digests(to_row(chat("q", "a"), SHAPES[0], RECIPE, Counter()))
    assert heldout_row(row)["check"] == json.loads(kept)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("fuzzy", "check.kind: Input should be"),
        ({"kind": "regex"}, "a check of kind regex needs a pattern"),
        ({"kind": "regex", "pattern": "("}, "pattern is no regular expression"),
        (3, "check: Input should be"),
    ],
)
def test_a_check_that_is_none_is_refused(column: object, says: str) -> None:
    with pytest.raises(Invalid, match=re.escape(says)):
        to_row({**chat("q", "a"), "check": column}, SHAPES[0], RECIPE, Counter())


def test_of_a_split_row_the_last_part_keeps_the_check() -> None:
    row = to_row({"messages": [*chat("q", "a")["messages"], *chat("r", "b")["messages"]], "check": "json"},
                 SHAPES[0], RECIPE, Counter())  # fmt: skip
    assert [part.check for part in split_row(row)] == ["", '{"kind":"json"}']
