"""Malformed inputs of all kinds: each has one clear message, with the file, the row and the mend."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.core.contracts import Base, Dataset, Source
from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.core.settings import Settings
from forge.storage import DirectoryStore
from tasks.preprocess.prepare import prepare
from tasks.preprocess.sources import digest_source

CHAT = b'{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}\n'
GOOD = CHAT % (b"a", b"b")


def prepare_file(path: Path, store: DirectoryStore, **options: object) -> Dataset:
    """Prepare a file of rows as the pipeline does."""
    recipe = DataRecipe.model_validate({"source": str(path), "max_seq_len": 128, "heldout_fraction": 0.5, **options})
    source = Source(uri=path.as_uri(), digest=digest_source(recipe), store=store.identity)
    return prepare(source, recipe, Base(), store, Settings())


def messages(*pairs: tuple[str, object], **more: object) -> bytes:
    """A row of JSON, of messages given as role and content."""
    return json.dumps({"messages": [{"role": role, "content": said} for role, said in pairs], **more}).encode() + b"\n"


def call(**function: object) -> bytes:
    """A row whose assistant makes a tool call."""
    said = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    return json.dumps({"messages": [{"role": "user", "content": "x"}, said]}).encode() + b"\n"


SECRET = "AKIA" + "IOSFODNN7EXAMPLE"
LINES = {  # a line among good ones, and what is said of it
    "not JSON": (b"not json\n", "not valid JSON (Expecting value at column 1)"),
    "cut off": (b'{"messages": [\n', "not valid JSON"),
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
    "NaN": (GOOD.replace(b"]}", b'], "score": NaN}'), "NaN is no JSON"),
    "Infinity": (GOOD.replace(b"]}", b'], "score": -Infinity}'), "-Infinity is no JSON"),
    "duplicate key": (GOOD.replace(b'{"role"', b'{"role": "user", "role"', 1), "the key 'role' is there twice"),
    "a list": (b'["a"]\n', "a row must be a JSON object"),
    "a text": (b'"a"\n', "a row must be a JSON object"),
    "null": (b"null\n", "a row must be a JSON object"),
    "no known column": (b'{"question": "a"}\n', "the columns are question; a row must have messages (chat)"),
    "null messages": (b'{"messages": null}\n', "a row must have messages (chat)"),
    "messages no list": (b'{"messages": {}}\n', "must hold a list of messages"),
    "no messages": (b'{"messages": []}\n', "must hold a list of messages"),
    "a message that is a text": (b'{"messages": ["a"]}\n', "message 1: role is None"),
    "unknown role": (messages(("human", "a"), ("assistant", "b")), "role is 'human'; it must be one of"),
    "role no text": (messages((1, "a")), "role is 1"),  # type: ignore[arg-type]
    "content a number": (messages(("user", 1)), "message 1 (user): content must be a text, not a number"),
    "content null": (messages(("user", "a"), ("assistant", None)), "content must be a text, not missing"),
    "content blank": (messages(("user", " \n"), ("assistant", "b")), "must be a text that is not empty"),
    "an image": (messages(("user", [{"type": "image", "url": "x"}])), "a part that is no text"),
    "no assistant": (messages(("user", "a")), "no assistant turn: there is nothing to learn"),
    "system alone": (messages(("system", "a")), "no assistant turn"),
    "assistant first": (messages(("assistant", "a")), "message 1 (assistant): user should speak here"),
    "the user last": (messages(("user", "a"), ("assistant", "b"), ("user", "c")), "the assistant last; add the"),
    "the user twice": (messages(("user", "a"), ("user", "b"), ("assistant", "c")), "message 2 (user): assistant"),
    "system late": (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "may only come first; move it"),
    "a tool nobody called": (messages(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 2 (tool)"),
    "a call without a name": (call(arguments={}), 'a tool call must be {"function"'),
    "arguments no object": (call(name="f", arguments=[1]), "the arguments of f must be a JSON object"),
    "arguments no JSON": (call(name="f", arguments="{"), "not valid JSON"),
    "arguments too large a number": (call(name="f", arguments={"n": 2**70}), "cannot be kept"),
    "a call by the user": (
        b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}\n', "only an assistant may have"),
    "a turn not to be trained": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n',
        "message 2 has weight 0, and every assistant's turn is trained"),
    "a call that the template leaves out": (call(name="f", arguments={}), "leaves out the row's tool calls"),
    "tools that the template leaves out": (
        messages(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}]), "leaves out the row's tools"),
    "half a character in a column's name": (b'{"\\ud83d": 1}\n', "the columns are \\ud83d"),
    "tools no list": (messages(("user", "a"), ("assistant", "b"), tools={"a": 1}), "tools must be a list"),
    "group a list": (messages(("user", "a"), ("assistant", "b"), group=["x"]), "group must be a text or a whole"),
    "slice a fraction": (messages(("user", "a"), ("assistant", "b"), slice=0.5), "slice must be a text or a whole"),
    "too long": (
        CHAT % (b"x" * 200, b"y"), "205 tokens long, and data.max_seq_len is 128; shorten it, raise the limit",
    ),
    "a control token": (CHAT % (b"a<|end|>", b"b"), "control token <|end|>, which it would not read as text"),
    "a cloud key": (CHAT % (SECRET.encode(), b"b"), "holds a credential (AWS Access Key); take it out"),
    "a key in the system's words": (
        messages(("system", SECRET), ("user", "a"), ("assistant", "b")), "holds a credential (AWS Access Key)"),
    "a password in a URL": (CHAT % (b"postgres://me:hunter2@db/x", b"b"), "a credential (Basic Auth Credentials)"),
    "a private key": (CHAT % (b"-----BEGIN RSA PRIVATE KEY-----", b"b"), "a credential (Private Key)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_cannot_be_used(name: str, store: DirectoryStore, tmp_path: Path) -> None:
    line, says = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + GOOD)
    with pytest.raises(ForgeError) as caught:
        prepare_file(path, store)
    assert f"{path}:2: " in caught.value.message
    assert "1 of 3 rows cannot be used" in caught.value.message
    assert "data.max_reject_fraction is 0.01" in caught.value.message
    assert says in caught.value.message
    assert SECRET not in caught.value.message, "a credential is never repeated"
    assert not store.exists("datasets")


def parquet(columns: dict) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def damaged_parquet(path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), path)
    path.write_bytes(path.read_bytes()[:-20])


def doubled_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text"] * 2), path)


FILES = {  # a whole file: its name, what is in it, and what is said
    "empty": ("rows.jsonl", b"", "the file is empty; fill it or remove it"),
    "an empty array": ("rows.json", b"[]", "the file holds no rows"),
    "an array cut off": ("rows.json", b'[{"text": "a"},\n{"text": "b"', "rows.json:2: not valid JSON"),
    "an array without an end": ("rows.json", b'[{"text": "a"}', "the array does not end; the file is cut off"),
    "more than an array": ("rows.json", b'[{"text": "a"}]\n[1]', "more after the end of the array"),
    "an array that is not UTF-8": ("rows.json", b'[{"text": "\xe9"}]', "not UTF-8 text"),
    "a gzip that is none": ("rows.jsonl.gz", GOOD, "cannot be read as jsonl (gzip)"),
    "a gzip cut off": ("rows.jsonl.gz", gzip.compress(GOOD * 999)[:-9], "cannot be read as jsonl (gzip)"),
    "a zstd that is none": ("rows.jsonl.zst", GOOD, "cannot be read as jsonl (zstd)"),
    "a zstd cut off": (
        "rows.jsonl.zst", pa.compress(GOOD * 999, "zstd", asbytes=True)[:-9], "cannot be read as jsonl (zstd)"),
    "a Parquet that is none": ("rows.parquet", GOOD, "cannot be read as parquet"),
    "a Parquet cut off": ("rows.parquet", damaged_parquet, "cannot be read as parquet"),
    "a Parquet without rows": ("rows.parquet", parquet({"text": pa.array([], pa.string())}), "the file holds no rows"),
    "a Parquet row": (
        "rows.parquet", parquet({"prompt": ["a", None], "completion": ["b", "c"]}), "rows.parquet:2: no conversation"),
    "a number in Parquet": ("rows.parquet", parquet({"text": [1]}), "rows.parquet:1: text must be a text, not a"),
    "a time that no clock shows": (
        "rows.parquet", parquet({"text": ["a"], "at": pa.array([2**62], pa.timestamp("us"))}), "a value that cannot"),
    "a Parquet column twice": ("rows.parquet", doubled_parquet, "two columns have one name"),
    "an array with an endless number": ("rows.json", b"[" + b"9" * 5000 + b"]", "not valid JSON (a number"),
    "half a character said by a function": (
        "rows.jsonl", b'{"conversations": [{"from": "function_call", "value": "\\ud83d"}]}\n', ":1: not UTF-8"),
    "a CSV that is not UTF-8": ("rows.csv", b"prompt,completion\na,\xe9\n", "not UTF-8 text"),
    "a CSV with a byte order mark": ("rows.csv", b"\xef\xbb\xbfprompt,completion\na,b\n", "byte order mark"),
    "a CSV without a header": ("rows.csv", b",b\n1,2\n", "the first line must name each column once"),
    "a column twice": ("rows.csv", b"prompt,prompt\na,b\n", "the first line must name each column once"),
    "a quote that does not end": ("rows.csv", b'prompt,completion\na,"b\n', "not valid CSV"),
    "too many fields": ("rows.csv", b"prompt,completion\na,b,c\n", "rows.csv:2: 3 fields, and the first line names 2"),
    "an empty field": ("rows.tsv", b"prompt\tcompletion\na\t\n", "rows.tsv:2: no conversation"),
    "messages in CSV that are no JSON": ("rows.csv", b"messages\n[1\n", "rows.csv:2: not valid JSON"),
    "an unknown ending": ("rows.txt", GOOD, "the name does not say what it is"),
    "two shapes": (
        "rows.jsonl", GOOD + b'{"prompt": "a", "completion": "b"}\n',
        "rows.jsonl:2 is prompt, and {path}:1 is chat (it has messages); separate them"),
    "a speaker nobody knows": (
        "rows.jsonl", b'{"conversations": [{"from": "narrator", "value": "a"}]}\n', "message 1: from is 'narrator'"),
    "Alpaca without an answer": ("rows.jsonl", b'{"instruction": "a", "output": ""}\n', "output must be a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used(name: str, store: DirectoryStore, tmp_path: Path) -> None:
    file, content, says = FILES[name]
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises(ForgeError) as caught:
        prepare_file(path, store)
    assert str(path) in caught.value.message
    assert says.format(path=path) in caught.value.message
    assert not store.exists("datasets")


def test_there_are_forty_and_more() -> None:
    assert len(LINES) + len(FILES) >= 40


# Bytes that are nearly rows, and bytes that are anything.
ATOMS = st.sampled_from(
    [line for line, _ in LINES.values()] + [GOOD, b"{", b'"', b"\\u", b"\xff", b",", b"[", b"]", b"\r"]
)
BYTES = st.lists(st.one_of(ATOMS, st.binary(max_size=40)), max_size=8).map(b"".join)
NAMES = st.sampled_from(
    ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.csv.zst", "r.ndjson", "r.JSONL"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES, name=NAMES, compressed=st.booleans(), good=st.integers(0, 3))
def test_whatever_the_bytes_the_stage_ends_in_a_card_or_a_clear_error(
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
        card = json.loads((store.path(dataset.uri) / "dataset.json").read_text())
        assert card["documents"] == {"train": dataset.train_rows, "heldout": dataset.heldout_rows}
        left_out = sum(card["rejected"].values()) + sum(card["removed"].values())
        assert card["rows"] == sum(card["documents"].values()) + left_out
    assert list((directory / "store").glob(".staging/*")) == [], "nothing half done is left"
