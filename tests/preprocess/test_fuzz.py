"""Whatever a file of rows holds, each row becomes a document or is rejected for a reason, or the file is one error."""

import datetime
import decimal
import gzip
import json
import math
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.models.chat_format import chat_format
from tasks.preprocess.file_formats import RawFile, read_blocks
from tasks.preprocess.row_formats import find_row_format
from tasks.preprocess.worker import ReadJob, Worker
from tests.models.families import tokenizer_of
from tests.preprocess.fuzzing import ABSENT, changed, cut_or_spliced, fuzz

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": [0.5, None]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER], "group": "g", "slice": "s", "check": {"kind": "number", "tolerance": 0.1}},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"},
            ANSWER,
        ],
        "tools": [TOOL],
    },
    {
        "messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
        "functions": [TOOL],
    },
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}],
        "tools": "[]",
    },
    {"prompt": "a", "completion": "b", "system": "s", "history": [["q", "r"]]},
    {"prompt": [USER], "completion": [ANSWER], "check": {"kind": "regex", "pattern": "b+"}},
    {"instruction": "a", "input": "i", "output": "b", "history": [["q", "r"]], "check": "json"},
    {"text": "Once upon a time.", "group": 7},
]
# Written as they are, in place of a value.
RAW = [
    "NaN", "-Infinity", "1e999", "-0", "01", "9" * 5000, "[" * 300 + "]" * 300, "[" * 3000 + "]" * 3000,
    '{"a":' * 600 + "1" + "}" * 600, '{"a":' * 940 + "1" + "}" * 940, '{"a": 1, "a": 2}', '"\\ud83d"',
    '{"\\ud83d": 1}', '"\\u0000"', "'x'", '"', "{", "",
]  # fmt: skip
VALUES: list[Any] = [
    ABSENT, None, True, False, 0, 1, -1, 0.5, 2**63, 2**64, 1e308, "", " ", "\u2028", "x", "\x00", [], {}, [None], [[]],
    {"a": None}, "[]", "{}", "[", '["a"]', '{"a": NaN}', '{"x": 1e999}', "[" * 3000, "null", "user", "assistant",
    "tool", "system", "exact", "<|im_end|>", "<think>", "AKIA" + "IOSFODNN7EXAMPLE", "(" * 3000, USER, ANSWER, CALL,
    [CALL], [TOOL], [USER, ANSWER], *(f"@{number}@" for number in range(len(RAW))),
]  # fmt: skip
ODD = [  # that only Parquet has
    math.nan, math.inf, b"\xff", b"text", datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1), datetime.time(1),
    datetime.timedelta(1), decimal.Decimal("1.5"), uuid.UUID(int=1), [("k", 1)], 2**63 - 1,
]  # fmt: skip
CELLS = [None, "x", 1, 0.5, b"\xff", 2**62, ["y"], [("k", "v")], *ODD]
COLUMNS = ["messages", "prompt", "completion", "text", "tools", "group", "slice", "check", "conversations", "system"]
TYPES = [
    pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.date64(), pa.duration("s"), pa.time64("ns"), pa.int64(),
    pa.uint64(), pa.float16(), pa.binary(), pa.large_string(), pa.list_(pa.string()), pa.map_(pa.int32(), pa.string()),
    pa.null(), pa.map_(pa.string(), pa.int64()), pa.decimal128(38, 3), pa.dictionary(pa.int32(), pa.string()),
    pa.binary(4), pa.bool_(), pa.struct([("role", pa.string()), ("content", pa.binary())]),
    pa.list_(pa.struct([("role", pa.string())])),
]  # fmt: skip
INSERTED = [b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b'"', b"\\", b"[", b"]", b"{", b","]
SPLICES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 40), st.sampled_from(INSERTED) | st.binary(max_size=4)), max_size=3
)


@st.composite
def row_lists(draw: st.DrawFn, values: list[Any]) -> list[Any]:
    """Rows of which some values are exchanged or missing, and values that are no rows."""
    rows: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        row: Any = draw(st.sampled_from(ROWS))
        for _ in range(draw(st.integers(0, 3))):
            row = changed(row, draw(st.integers(0, 40)), draw(st.sampled_from(values)))
        rows.append(row if draw(st.integers(0, 19)) else draw(st.sampled_from(values)))
    return [None if row is ABSENT else row for row in rows]


def as_json(value: Any) -> str:
    text = json.dumps(value)
    for number, raw in enumerate(RAW):
        text = text.replace(f'"@{number}@"', raw)
    return text


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of text: its name and its bytes."""
    rows = draw(row_lists(VALUES))
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "tsv"]))
    if kind == "jsonl":
        text = "".join(as_json(row) + draw(st.sampled_from(["\n", "\n", "\r\n"])) for row in rows)
    elif kind == "json":
        text = f"[{', '.join(map(as_json, rows))}]"
    else:
        tables = [row if isinstance(row, dict) else {"text": row} for row in rows]
        names = list(dict.fromkeys(name for row in tables for name in row))
        lines = [names, *([as_field(row.get(name)) for name in names] for row in tables)]
        quoted = [['"' + field.replace('"', '""') + '"' for field in line] for line in lines]
        text = "".join(("," if kind == "csv" else "\t").join(line) + "\n" for line in quoted)
    data = text.encode(draw(st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16"])), "surrogatepass")
    for place, size, new in draw(SPLICES) if draw(st.booleans()) else ():
        data = cut_or_spliced(data, place, size, new)
    packed = draw(st.sampled_from(["", "", ".gz", ".zst"]))
    if packed:
        data = gzip.compress(data, mtime=0) if packed == ".gz" else pa.compress(data, "zstd", asbytes=True)
        for place, size, new in draw(SPLICES) if draw(st.integers(0, 3)) == 0 else ():
            data = cut_or_spliced(data, place, size, new)
    return f"r.{kind}{packed}", data


def as_field(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else as_json(value)


@st.composite
def parquets(draw: st.DrawFn) -> tuple[str, bytes]:
    """A Parquet file: of rows if Arrow can hold them, or of a column of some type."""
    sink = pa.BufferOutputStream()
    try:
        if draw(st.booleans()):
            rows = [row for row in draw(row_lists([*VALUES, *ODD])) if isinstance(row, dict)] or [ROWS[0]]
            table = pa.Table.from_pylist(rows, None)
        else:
            columns = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3))
            arrays = []
            for _ in columns:
                values = draw(st.lists(st.sampled_from(CELLS), min_size=2, max_size=2))
                arrays.append(array(values, draw(st.sampled_from(TYPES))))
            table = pa.Table.from_arrays(arrays, columns)
        pq.write_table(table, sink)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return "r.parquet", b"PAR1PAR1"
    data = sink.getvalue().to_pybytes()
    for place, size, new in draw(SPLICES) if draw(st.integers(0, 2)) == 0 else ():
        data = cut_or_spliced(data, place, size, new)
    return "r.parquet", data


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values that a type can hold, and nulls."""
    held = []
    for value in values:
        try:
            pa.array([value], kind)
            held.append(value)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            held.append(None)
    return pa.array(held, kind)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} in a row")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    recipe = DataRecipe(max_seq_len=512, turns="merge", overlong="split", near_duplicates=0.8)
    form = chat_format(tokenizer_of("qwen-3"), "base model test")
    return Worker(ReadJob(recipe, form, "base model test", tmp_path_factory.mktemp("spills")))


@pytest.mark.parametrize(("kind", "examples", "few"), [("text", texts(), 80), ("Parquet", parquets(), 30)])
def test_any_file_gives_documents_and_rejected_rows_or_a_clear_error(
    kind: str, examples: st.SearchStrategy[Any], few: int, worker: Worker, tmp_path: Path
) -> None:
    def check(example: tuple[str, bytes]) -> None:
        name, data = example
        path = tmp_path / name
        path.write_bytes(data)
        try:
            blocks, row_format, _ = find_row_format(worker.job.recipe, read_blocks([RawFile(name, path)]))
            results = [worker.read(block, row_format, "heldout") for block in blocks]
        except ForgeError as error:
            assert name in error.message
            assert len(error.message.encode()) < 100_000
            return
        for result in results:
            for _, reason, message in result.rejected:
                assert reason.encode()
                assert message.encode()
            stored = worker.job.directory / f"{worker.spill}.rows"
            with stored.open("rb") as rows:
                for at, size in result.documents[["rows_at", "rows_size"]].tolist():
                    rows.seek(at)
                    row = json.loads(rows.read(size), parse_constant=no_constant)
                    assert row.get("text") or row["messages"][-1]["role"] == "assistant"
            if not result.other_shape:
                assert result.rows <= len(result.documents) + len(result.rejected)

    fuzz(check, examples, few)
