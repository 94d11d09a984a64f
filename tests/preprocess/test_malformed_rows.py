"""Malformed input of all kinds: each has one clear message with the file, the row and the fix."""

import gzip
import json
import os
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.core.errors import ForgeError
from forge.storage import DirectoryStore
from tests.preprocess.datasets import card_of, prepare_file

CHAT = b'{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}\n'
GOOD = CHAT % (b"a", b"b")


def messages(*pairs: tuple[str, object], **more: object) -> bytes:
    """A row of JSON with messages of these roles and contents."""
    return (
        json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs], **more}).encode()
        + b"\n"
    )


def call(**function: object) -> bytes:
    """A row with a tool call."""
    answer = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    return json.dumps({"messages": [{"role": "user", "content": "x"}, answer]}).encode() + b"\n"


SECRET = "AKIA" + "IOSFODNN7EXAMPLE"
LINES = {  # a line among good ones, and its error message
    "not JSON": (b"not json\n", "not valid JSON (Expecting value at column 1)"),
    "truncated": (b'{"messages": [\n', "not valid JSON"),
    "two objects in a line": (GOOD.strip() * 2 + b"\n", "not valid JSON (Extra data"),
    "single quotes": (b"{'messages': []}\n", "not valid JSON"),
    "empty line": (b"\n", "the line is empty; remove it"),
    "blank line": (b"   \t\n", "the line is empty; remove it"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "byte order mark; save it as UTF-8 without one"),
    "not UTF-8": (CHAT % (b"caf\xe9", b"b"), "not UTF-8 text (byte 47); convert the file to UTF-8"),
    "UTF-16": (GOOD.decode().strip().encode("utf-16-le") + b"\n", "cannot be used"),
    "NUL": (b"\x00\n", "not valid JSON"),
    "deep nesting": (b"[" * 100_000 + b"\n", "JSON that cannot be read"),
    "endless number": (b'{"messages": ' + b"9" * 5000 + b"}\n", "JSON that cannot be read"),
    "lone surrogate": (CHAT % (b"\\ud83d", b"b"), "half a character (a lone surrogate)"),
    "lone surrogate in a column": (GOOD.replace(b"]}", b'], "slice": "\\ud83d"}'), "half a character"),
    "NaN": (GOOD.replace(b"]}", b'], "score": NaN}'), "NaN is not valid JSON"),
    "Infinity": (GOOD.replace(b"]}", b'], "score": -Infinity}'), "-Infinity is not valid JSON"),
    "duplicate key": (GOOD.replace(b'{"role"', b'{"role": "user", "role"', 1), "the key 'role' appears twice"),
    "a list": (b'["a"]\n', "a row must be a JSON object"),
    "a string": (b'"a"\n', "a row must be a JSON object"),
    "null": (b"null\n", "a row must be a JSON object"),
    "no known column": (b'{"question": "a"}\n', "the columns are question; a row must have messages (chat)"),
    "null messages": (b'{"messages": null}\n', "a row must have messages (chat)"),
    "messages not a list": (b'{"messages": {}}\n', "must hold a list of messages"),
    "no messages": (b'{"messages": []}\n', "must hold a list of messages"),
    "a message that is a string": (b'{"messages": ["a"]}\n', "message 1: role is None"),
    "unknown role": (messages(("human", "a"), ("assistant", "b")), "role is 'human'; it must be one of"),
    "role not a string": (messages((1, "a")), "role is 1"),  # type: ignore[arg-type]
    "role a list": (messages((["user"], "a")), "role is ['user']"),  # type: ignore[arg-type]
    "content a number": (messages(("user", 1)), "message 1 (user): content must be a string, not a number"),
    "content null": (messages(("user", "a"), ("assistant", None)), "content must be a string, not missing"),
    "content blank": (messages(("user", " \n"), ("assistant", "b")), "content must not be empty"),
    "an image": (messages(("user", [{"type": "image", "url": "x"}])), "a part that is not text"),
    "no assistant": (messages(("user", "a")), "no assistant turn: there is nothing to learn"),
    "system alone": (messages(("system", "a")), "no assistant turn"),
    "assistant first": (messages(("assistant", "a")), "message 1 (assistant): expected user here"),
    "the user last": (messages(("user", "a"), ("assistant", "b"), ("user", "c")), "add the last answer"),
    "the user twice": (messages(("user", "a"), ("user", "b"), ("assistant", "c")), "(user): expected assistant here"),
    "system late": (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "may only come first; move it"),
    "a tool answer without a call": (messages(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 2 (tool)"),
    "a call without a name": (call(arguments={}), 'a tool call must be {"function"'),
    "arguments not an object": (call(name="f", arguments=[1]), "the arguments of f must be a JSON object"),
    "arguments not JSON": (call(name="f", arguments="{"), "message 2: the arguments of f: not valid JSON"),
    "arguments too large a number": (call(name="f", arguments={"n": 2**70}), "cannot be stored"),
    "a call by the user": (
        b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}\n', "only an assistant may have"),
    "no turn to be trained": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n',
        "every assistant turn has weight 0 (or loss or train false); remove the row"),
    "tools nested too deeply": (
        messages(("user", "a"), ("assistant", "b")).replace(
            b'"messages"', b'"tools": [' + b'{"a": ' * 600 + b"1" + b"}" * 600 + b'], "messages"'),
        "JSON that is nested too deeply"),
    "a tool whose function is a text": (
        messages(("user", "a"), ("assistant", "b"), tools=[{"function": "f"}]), "tools must be a list of JSON schemas"),
    "no calls, as text, and no answer": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": "[]"}]}\n',
        "message 2 (assistant): content must not be empty"),
    "calls in two ways": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}], '
        b'"function_call": {"name": "f"}}]}\n', "has tool_calls and function_call; remove one"),
    "half a weight": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}\n',
        "message 2: weight is 0.5; it must be 0 or 1"),
    "a user's turn to be trained": (
        b'{"messages": [{"role": "user", "content": "a", "train": true}, {"role": "assistant", "content": "b"}]}\n',
        "message 1: train is True, but only assistant turns are trained"),
    "pictures next to the messages": (
        messages(("user", "a"), ("assistant", "b"), images=["a.png"]), "the row has images, and only text"),
    "two system messages": (
        messages(("system", "s"), ("user", "a"), ("assistant", "b"), system="t"), "message and another column system"),
    "a call that the template leaves out": (call(name="f", arguments={}), "leaves out the row's tool calls"),
    "tools that the template leaves out": (
        messages(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}]), "leaves out the row's tools"),
    "a tool without a name": (
        messages(("user", "a"), ("assistant", "b"), tools=[{"function": {}}]), "a tool has no name"),
    "a weight of the row": (messages(("user", "a"), ("assistant", "b"), weight=0), "the row has a weight of 0"),
    "a refusal": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "refusal": "No."}]}\n',
        "has a refusal and no content; make the refusal its content",
    ),
    "lone surrogate in a column name": (b'{"\\ud83d": 1}\n', "the columns are \\ud83d"),
    "tools not a list": (messages(("user", "a"), ("assistant", "b"), tools={"a": 1}), "tools must be a list"),
    "group a list": (messages(("user", "a"), ("assistant", "b"), group=["x"]), "group must be a string or an integer"),
    "slice a float": (messages(("user", "a"), ("assistant", "b"), slice=0.5), "slice must be a string or an integer"),
    "too long": (
        CHAT % (b"x" * 200, b"y"), "205 tokens long, and data.max_seq_len is 128; shorten it, raise the limit",
    ),
    "a control token": (CHAT % (b"a<|end|>", b"b"), "control token <|end|>, which it would not read as text"),
    "a cloud key": (CHAT % (SECRET.encode(), b"b"), "holds a credential (AWS Access Key); remove it"),
    "a key in the system message": (
        messages(("system", SECRET), ("user", "a"), ("assistant", "b")), "holds a credential (AWS Access Key)"),
    "a password in a URL": (CHAT % (b"postgres://me:hunter2@db/x", b"b"), "a credential (Basic Auth Credentials)"),
    "arguments by another name": (
        call(name="f", parameters={"x": 1}), "the call of f has no arguments, but parameters; write its arguments as"),
    "arguments beside the function": (
        call(name="f").replace(b'"function"', b'"arguments": {"x": 1}, "function"'),
        "message 2: the call of f has no arguments, but arguments; write its arguments as arguments, next to its name"),
    "tools in two ways": (
        messages(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}], functions=[{"name": "f"}]),
        "the row has tools and functions; remove one"),
    "a mask of what is trained": (
        messages(("user", "a"), ("assistant", "b")).replace(b'"b"', b'"b", "loss_mask": [1]'),
        "message 2: loss_mask is not read; give the turn a weight of 0 or 1 instead"),
    "reasoning in two ways": (
        messages(("user", "a"), ("assistant", "b")).replace(b'"b"', b'"b", "reasoning": "c", "thinking": "d"'),
        "message 2 has reasoning_content and a different thinking; remove one"),
    "an integer too long to read": (
        call(name="f", arguments='{"n": ' + "9" * 5000 + "}"),
        "message 2: the arguments of f: JSON that cannot be read: an integer has more than 4300 digits; write it as"),
    "an integer too long to store": (
        call(name="f", arguments={"n": 2**64}), "an integer of more than 64 bits cannot be stored; write it as text"),
    "a number too large": (
        GOOD.replace(b"]}", b'], "score": 1e999}'), "1e999 is too large for a number; write it as text"),
    "a number too large in arguments": (
        call(name="f", arguments='{"n": -1e999}'), "the arguments of f: -1e999 is too large for a number"),
    "a blank column system": (messages(("user", "a"), ("assistant", "b"), system=" "),
        "the column system (system): content must not be empty"),
    "a second system message": (messages(("system", "s"), ("user", "a"), ("system", "t"), ("assistant", "b")),
        "message 3 (system): a system message may only come first; move it there, into the one that is there"),
    "the wrong turn, after a column system": (
        messages(("user", "a"), ("user", "b"), system="s"), "message 2 (user): expected assistant here"),
    "half a pair": (b'{"prompt": "a", "completion": ""}\n',
        "completion must not be empty; a row of format prompt must have prompt and completion"),
    "a byte order mark in a line": (b"\xef\xbb\xbf" + GOOD, "the line starts with a byte order mark"),
    "group a float": (
        messages(("user", "a"), ("assistant", "b"), group=1.0), "or an integer, not a number with a point"),
    "half a character in a check": (
        GOOD.replace(b"]}", b'], "check": {"kind": "regex", "pattern": "\\ud83d"}}'), "a text holds half a character"),
    "a check that no program can read": (
        messages(("user", "a"), ("assistant", "b"), check={"kind": "regex", "pattern": "(" * 3000}),
        "pattern is not a regular expression"),
    "ShareGPT in the wrong column": (b'{"messages": [{"from": "human", "value": "a"}]}\n',
        "role is None; it must be one of system, user, assistant, tool; name a column of messages with from and value"),
    "a role of any length": (messages(("x" * 5000, "a")), "message 1: role is 'xxx"),
    "a content that is a number, with a call": (
        messages(("user", "a"), ("assistant", 0)).replace(b"0}", b'0, "tool_calls": [{"name": "f"}]}'),  # type: ignore
        "message 2 (assistant): content must be a string, not a number"),
    "a private key": (CHAT % (b"-----BEGIN RSA PRIVATE KEY-----", b"b"), "a credential (Private Key)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_malformed_line_is_rejected_with_its_number_and_a_fix(name: str, store: DirectoryStore, tmp_path: Path) -> None:
    line, message = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + GOOD)
    with pytest.raises(ForgeError) as caught:
        prepare_file(path, store)
    assert f"{path}:2: " in caught.value.message
    assert "1 of 3 rows cannot be used" in caught.value.message
    assert "data.max_reject_fraction is 0.01" in caught.value.message
    assert message in caught.value.message
    assert SECRET not in caught.value.message, "messages must not leak credentials"
    assert not store.exists("datasets")


def parquet(columns: dict) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def arguments(value: object, kind: pa.DataType | None = None) -> Callable[[Path], object]:
    """A Parquet file with a call that has an argument."""
    values = pa.array([value], kind)
    function = pa.StructArray.from_arrays(
        [pa.array(["f"]), pa.StructArray.from_arrays([values], ["x"])], ["name", "arguments"]
    )
    calls = pa.ListArray.from_arrays([0, 0, 1], function)
    turns = pa.StructArray.from_arrays(
        [pa.array(["user", "assistant"]), pa.array(["a", None], pa.string()), calls], ["role", "content", "tool_calls"]
    )
    return parquet({"messages": pa.ListArray.from_arrays([0, 2], turns)})


def damaged_parquet(path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), path)
    path.write_bytes(path.read_bytes()[:-20])


def doubled_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text"] * 2), path)


FILES = {  # a whole file: its name, its content, and the error message
    "empty": ("rows.jsonl", b"", "the file is empty; fill it or remove it"),
    "an empty array": ("rows.json", b"[]", "the file holds no rows"),
    "an array truncated": ("rows.json", b'[{"text": "a"},\n{"text": "b"', "rows.json:2: not valid JSON"),
    "an array without an end": ("rows.json", b'[{"text": "a"}', "the array does not end; the file is truncated"),
    "text after the array": ("rows.json", b'[{"text": "a"}]\n[1]', "more after the end of the array"),
    "an array that is not UTF-8": ("rows.json", b'[{"text": "\xe9"}]', "not UTF-8 text"),
    "not a gzip": ("rows.jsonl.gz", GOOD, "cannot be read as jsonl (gzip)"),
    "a gzip truncated": ("rows.jsonl.gz", gzip.compress(GOOD * 999)[:-9], "cannot be read as jsonl (gzip)"),
    "not a zstd": ("rows.jsonl.zst", GOOD, "cannot be read as jsonl (zstd)"),
    "a zstd truncated": (
        "rows.jsonl.zst", pa.compress(GOOD * 999, "zstd", asbytes=True)[:-9], "cannot be read as jsonl (zstd)"),
    "not a Parquet": ("rows.parquet", GOOD, "cannot be read as parquet"),
    "a Parquet truncated": ("rows.parquet", damaged_parquet, "cannot be read as parquet"),
    "a Parquet without rows": ("rows.parquet", parquet({"text": pa.array([], pa.string())}), "the file holds no rows"),
    "a Parquet row": (
        "rows.parquet", parquet({"prompt": ["a", None], "completion": ["b", "c"]}), "rows.parquet:2: no conversation"),
    "a number in Parquet": ("rows.parquet", parquet({"text": [1]}), "rows.parquet:1: text must be a string, not a"),
    "a timestamp out of range": (
        "rows.parquet", parquet({"text": ["a"], "at": pa.array([2**62], pa.timestamp("us"))}), "a value that cannot"),
    "a Parquet column twice": ("rows.parquet", doubled_parquet, "two columns have the same name"),
    "an array with an endless number": ("rows.json", b"[" + b"9" * 5000 + b"]", "not valid JSON (a number"),
    "lone surrogate in a function call": (
        "rows.jsonl", b'{"conversations": [{"from": "function_call", "value": "\\ud83d"}]}\n',
        ":1: message 1 (function_call): value holds half a character"),
    "a CSV that is not UTF-8": ("rows.csv", b"prompt,completion\na,\xe9\n", "not UTF-8 text"),
    "a CSV with a byte order mark": ("rows.csv", b"\xef\xbb\xbfprompt,completion\na,b\n", "byte order mark"),
    "a CSV without a header": ("rows.csv", b",b\n1,2\n", "the first line must name each column once"),
    "a column twice": ("rows.csv", b"prompt,prompt\na,b\n", "the first line must name each column once"),
    "an unclosed quote": ("rows.csv", b'prompt,completion\na,"b\n', "not valid CSV"),
    "too many fields": ("rows.csv", b"prompt,completion\na,b,c\n", "rows.csv:2: 3 fields, but the header has 2"),
    "an empty field": ("rows.tsv", b"prompt\tcompletion\na\t\n", "rows.tsv:2: no conversation"),
    "history that is no pair": (
        "rows.jsonl", b'{"instruction": "a", "output": "b", "history": [["c"]]}\n',
        ":1: history, entry 1: must be a list of a question and its answer"),
    "history that is a number": (
        "rows.jsonl", b'{"instruction": "a", "output": "b", "history": 5}\n', ":1: history must be a list of pairs"),
    "messages in CSV that are not JSON": ("rows.csv", b"messages\n[1\n", "rows.csv:2: messages: not valid JSON"),
    "too many fields, by tabs": (
        "rows.tsv", b"prompt\tcompletion\na\tb\tc\n", "header has 2; quote texts that contain a tab or a line break"),
    "a CSV that starts with an empty line": (
        "rows.csv", b"\nprompt,completion\na,b\n", "rows.csv:1: the first line must name each column once; it is []"),
    "not a number, in Parquet": (
        "rows.parquet", arguments(float("nan")), ":1: message 2: the arguments of f must not hold nan"),
    "infinity in Parquet": ("rows.parquet", arguments(float("inf")), "the arguments of f must not hold inf"),
    "a date in Parquet": ("rows.parquet", arguments(date(2024, 1, 1)), "f must not hold a value of type date"),
    "bytes in Parquet": ("rows.parquet", arguments(b"a"), "f must not hold a value of type bytes; write it as text"),
    "a decimal in Parquet": ("rows.parquet", arguments(Decimal("1.5")), "f must not hold a value of type Decimal"),
    "a map with numbers as keys": (
        "rows.parquet", arguments([(1, "a")], pa.map_(pa.int64(), pa.string())), "must have keys that are strings"),
    "a text that is a date": (
        "rows.parquet", parquet({"text": [date(2024, 1, 1)]}), ":1: text must be a string, not a value of type date"),
    "a text that is bytes": ("rows.parquet", parquet({"text": [b"a"]}), ":1: text must be a string, not a value of"),
    "a column that is not UTF-8": (
        "rows.parquet", parquet({"text": ["a"], "note": pa.array([b"\xff"]).view(pa.string())}),
        ":1: the column note holds bytes that are not UTF-8"),
    "ShareGPT with two contents": (
        "rows.jsonl", b'{"conversations": [{"from": "human", "value": "a", "content": "b"}]}\n',
        ":1: message 1 (human): value and content differ; remove one"),
    "ShareGPT with two roles": (
        "rows.jsonl", b'{"conversations": [{"from": "human", "value": "a", "role": "assistant"}]}\n',
        ":1: message 1: from and role differ; remove one"),
    "ShareGPT without a value": (
        "rows.jsonl", b'{"conversations": [{"from": "human"}]}\n', ":1: message 1 (human): value must be a string"),
    "history beside messages": (
        "rows.jsonl", b'{"prompt": [{"role": "user", "content": "a"}], "completion": [{}], "history": [["a", "b"]]}\n',
        ":1: prompt is a list of messages, and so is history; write them as one"),
    "a pipe": ("rows.jsonl", os.mkfifo, "not a plain file; copy its rows to a file"),
    "an unknown suffix": ("rows.txt", GOOD, "unknown file type"),
    "two row formats": (
        "rows.jsonl", GOOD + b'{"prompt": "a", "completion": "b"}\n',
        "rows.jsonl:2 is prompt, and {path}:1 is chat (it has messages); put them in separate sources"),
    "an unknown speaker": (
        "rows.jsonl", b'{"conversations": [{"from": "narrator", "value": "a"}]}\n', "message 1: from is 'narrator'"),
    "Alpaca without an answer": ("rows.jsonl", b'{"instruction": "a", "output": ""}\n', "output must not be empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_malformed_file_is_one_error(name: str, store: DirectoryStore, tmp_path: Path) -> None:
    file, content, message = FILES[name]
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises(ForgeError) as caught:
        prepare_file(path, store)
    assert str(path) in caught.value.message
    assert message.format(path=path) in caught.value.message
    assert not store.exists("datasets")


# Near-rows and arbitrary bytes.
ATOMS = st.sampled_from(
    [line for line, _ in LINES.values()] + [GOOD, b"{", b'"', b"\\u", b"\xff", b",", b"[", b"]", b"\r"]
)
BYTES = st.lists(st.one_of(ATOMS, st.binary(max_size=40)), max_size=8).map(b"".join)
NAMES = st.sampled_from(
    ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.csv.zst", "r.ndjson", "r.JSONL"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES, name=NAMES, compressed=st.booleans(), good=st.integers(0, 3))
def test_any_bytes_give_a_data_set_or_a_clear_error(
    content: bytes, name: str, compressed: bool, good: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("bytes")
    content = CHAT * good % tuple(f"{n}".encode() for n in range(2 * good)) + content
    path = directory / name
    path.write_bytes(gzip.compress(content) if compressed and name.endswith(".gz") else content)
    store = DirectoryStore(directory / "store")
    try:
        dataset = prepare_file(path, store, max_reject_fraction=0.9, near_duplicates=0.8)
    except ForgeError as error:
        assert str(path) in error.message
        assert not store.exists("datasets")
    else:
        card = card_of(dataset, store)
        assert card["documents"] == {"train": dataset.train_rows, "heldout": dataset.heldout_rows}
        left_out = sum(card["rejected"].values()) + sum(card["removed"].values())
        assert card["rows"] == sum(card["documents"].values()) + left_out
    assert list((directory / "store").glob(".staging/*")) == [], "nothing half-finished is left"
