"""The same rows give the same data set by whatever door they come: file formats, directories, globs, URIs, buckets."""

import csv
import gzip
import io
import json
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from forge.core.contracts import Base
from forge.core.recipe import DataRecipe
from forge.core.settings import load_settings
from forge.models.chat_format import chat_format
from forge.storage import DirectoryStore
from tasks.preprocess.prepare import prepare
from tasks.preprocess.row_formats import find_row_format
from tasks.preprocess.sources import blocks_of
from tasks.preprocess.worker import ReadJob, Worker
from tests.conftest import write_jsonl
from tests.models.families import tokenizer_of
from tests.preprocess.datasets import card_of, prepare_file, source_of
from tests.preprocess.fuzzing import fuzz
from tests.storage.servers import KEY, SECRET, client_of, shared_server

Rows = list[dict[str, Any]]

# Rows as JSON has them. A row's keys come in one order, since the columns of Parquet do.
ANY = st.text("aé\u2028\u0085\r\n\t\"'\\,;{[0 🚆ß中\x00\x1a", max_size=6)
TEXT = st.one_of(*[ANY.map("w".__add__)] * 9, ANY)  # seldom empty
MAYBE = st.none() | ANY
NAME = st.sampled_from(["clock", "get weather"])


def objects(always: dict[str, Any], sometimes: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects whose other keys may be absent, in the order given here."""
    order = [*always, *sometimes]
    return st.fixed_dictionaries(always, optional=sometimes).map(
        lambda value: {key: value[key] for key in order if key in value}
    )


ARGUMENTS = objects(
    {},
    {
        "text": MAYBE,
        "whole": st.none() | st.integers(-(2**63), 2**63 - 1),
        "real": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "list": st.lists(st.none() | st.integers(-9, 9), max_size=3),
        "inner": st.none() | objects({}, {"x": MAYBE}),
    },
)
TEXTS = st.dictionaries(ANY, MAYBE, max_size=3)  # arguments that a map can hold


def user() -> st.SearchStrategy[dict[str, Any]]:
    return objects({"role": st.just("user"), "content": TEXT}, {"name": MAYBE})


def answer() -> st.SearchStrategy[dict[str, Any]]:
    return objects(
        {"role": st.just("assistant"), "content": TEXT},
        {"weight": st.sampled_from([None, 0, 1, 1]), "reasoning_content": MAYBE},
    )


def turns(arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Rows]:
    """Conversations, most of which are valid."""
    function = objects({"name": NAME}, {"arguments": st.none() | arguments})
    calls = st.lists(objects({}, {"id": st.sampled_from(["c1", None]), "function": function}), min_size=1, max_size=2)
    call = objects({"role": st.just("assistant"), "content": MAYBE, "tool_calls": calls}, {})
    tool = objects({"role": st.just("tool"), "content": TEXT}, {"tool_call_id": st.just("c1")})
    system = objects({"role": st.sampled_from(["system", "developer"]), "content": TEXT}, {})
    orders = ([user(), answer()] * 2, [user(), call, tool, answer()], [system, user(), answer()], [user(), call])
    return st.one_of(*(st.tuples(*order).map(list) for order in orders))


TOOL = objects(
    {"type": st.just("function")},
    {"function": objects({"name": NAME}, {"description": MAYBE, "parameters": objects({}, {"type": ANY})})},
)
COLUMNS = {
    "system": MAYBE,
    "tools": st.none() | st.lists(TOOL, max_size=2),
    "group": MAYBE,
    "slice": st.sampled_from([None, "", "a", "b"]),
    "check": st.sampled_from([None, "", "exact", '{"kind": "number", "tolerance": 0.5}', "fuzzy"]),
    "note": MAYBE,
}
HISTORY = {"history": st.none() | st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=2)}


def speaker(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return objects({"from": st.sampled_from(names), "value": TEXT}, {"weight": st.sampled_from([0, None])})


SHAREGPT = st.tuples(speaker("human"), speaker("gpt", "gpt", "function_call"), speaker("human"), speaker("gpt"))
FORMATS = [
    objects({"messages": turns(ARGUMENTS)}, COLUMNS),
    objects({"conversations": SHAREGPT.map(list)}, COLUMNS),
    objects({"prompt": TEXT, "completion": TEXT}, HISTORY | COLUMNS),
    objects({"prompt": st.tuples(user()).map(list), "completion": st.tuples(answer()).map(list)}, COLUMNS),
    objects({"instruction": TEXT, "output": TEXT}, {"input": ANY} | HISTORY | COLUMNS),
    objects({"text": TEXT}, {"group": MAYBE}),
]
ROWS = st.one_of(*(st.lists(row, min_size=1, max_size=4) for row in FORMATS))
MAPPED = st.lists(objects({"messages": turns(TEXTS)}, COLUMNS), min_size=1, max_size=4)


# Doors: each writes rows below a directory and returns the source to read.
STRING = pa.string()
FILES = 4  # that rows are spread over


STRUCT = pa.struct(
    [
        ("text", STRING),
        ("whole", pa.int64()),
        ("real", pa.float64()),
        ("flag", pa.bool_()),
        ("list", pa.list_(pa.int64())),
        ("inner", pa.struct([("x", STRING)])),
    ]
)
FUNCTION = pa.struct([("name", STRING), ("description", STRING), ("parameters", pa.struct([("type", STRING)]))])
NESTED = {
    "tools": pa.list_(pa.struct([("type", STRING), ("function", FUNCTION)])),
    "conversations": pa.list_(pa.struct([("from", STRING), ("value", STRING), ("weight", pa.int64())])),
    "history": pa.list_(pa.list_(STRING)),
}


def messages_type(arguments: pa.DataType) -> pa.DataType:
    """A list of structs that have all keys that any message has, in another order than the rows have them."""
    call = pa.struct([("function", pa.struct([("arguments", arguments), ("name", STRING)])), ("id", STRING)])
    names = ("tool_call_id", "reasoning_content", "content", "name", "role")
    texts = [(name, STRING) for name in names]
    return pa.list_(pa.struct([("weight", pa.int64()), ("tool_calls", pa.list_(call)), *texts]))


def jsonl(path: Path, rows: Rows) -> Path:
    return write_jsonl(path / "r.jsonl", rows)


def escaped_jsonl(path: Path, rows: Rows) -> Path:
    (path / "r.ndjson").write_bytes("".join(json.dumps(row) + "\r\n" for row in rows).encode())
    return path / "r.ndjson"


def array(path: Path, rows: Rows) -> Path:
    (path / "r.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8", newline="")
    return path / "r.json"


def array_in_a_line(path: Path, rows: Rows) -> Path:
    (path / "r.json").write_text(json.dumps(rows, separators=(",", ":")), encoding="utf-8")
    return path / "r.json"


def packed(path: Path, rows: Rows) -> Path:
    data = jsonl(path, rows).read_bytes()
    (path / "r.jsonl").unlink()
    (path / "r.JSONL.gz").write_bytes(gzip.compress(data[:9]) + gzip.compress(data[9:]))
    return path / "r.JSONL.gz"


def packed_zst(path: Path, rows: Rows) -> Path:
    data = jsonl(path, rows).read_bytes()
    (path / "r.jsonl").unlink()
    (path / "r.jsonl.zst").write_bytes(
        b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:9], data[9:]))
    )
    return path / "r.jsonl.zst"


def as_texts(rows: Rows) -> Rows:
    """Rows whose lists are JSON text."""
    return [
        {name: json.dumps(entry) if isinstance(entry, list) else entry for name, entry in row.items()} for row in rows
    ]


def names_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def table(path: Path, rows: Rows, delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names_of(rows), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(as_texts(rows))
    return path


def comma_separated(path: Path, rows: Rows) -> Path:
    return table(path / "r.csv", rows, ",")


def tab_separated(path: Path, rows: Rows) -> Path:
    return table(path / "r.tsv", rows, "\t")


def parquet(path: Path, rows: Rows, arguments: pa.DataType = STRUCT) -> Path:
    """Structs, as pandas and Arrow write rows."""
    lists = {name for row in rows for name, entry in row.items() if isinstance(entry, list)}
    nested = {name: NESTED.get(name, messages_type(arguments)) for name in lists}
    schema = pa.schema([(name, nested.get(name, STRING)) for name in names_of(rows)])
    pq.write_table(pa.Table.from_pylist(rows, schema), path / "r.parquet")
    return path / "r.parquet"


def parquet_map(path: Path, rows: Rows) -> Path:
    """Arguments as a map, from which Arrow reads pairs."""
    return parquet(path, rows, pa.map_(STRING, STRING))


def parquet_of_texts(path: Path, rows: Rows) -> Path:
    """Lists as JSON text."""
    schema = pa.schema([(name, STRING) for name in names_of(rows)])
    pq.write_table(pa.Table.from_pylist(as_texts(rows), schema), path / "r.parquet")
    return path / "r.parquet"


def parquet_of_lists(path: Path, rows: Rows) -> Path:
    """Lists of JSON text, as Hugging Face's datasets write them."""

    def written(entry: Any) -> Any:
        return [json.dumps(part) if isinstance(part, dict) else part for part in entry] if listed(entry) else entry

    def listed(entry: Any) -> bool:
        return isinstance(entry, list)

    lists = {name for row in rows for name, entry in row.items() if listed(entry)}
    types = {name: pa.list_(STRING) for name in lists} | {"history": NESTED["history"]}
    schema = pa.schema([(name, types.get(name, STRING)) for name in names_of(rows)])
    written_rows = [{name: written(entry) for name, entry in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(written_rows, schema), path / "r.parquet")
    return path / "r.parquet"


def directory(path: Path, rows: Rows) -> Path:
    """Several files, in directories, with links to one of them and to the directory itself."""
    (path / "deep" / "[a] b%20").mkdir(parents=True)
    for number in range(min(FILES, len(rows))):
        folder = path / "deep" / "[a] b%20" if number % 2 else path
        write_jsonl(folder / f"{number}.jsonl", rows[number::FILES])
    (path / "0-link.jsonl").symlink_to(path / "0.jsonl")
    (path / "deep" / "loop").symlink_to(path)
    (path / "_notes.jsonl").write_text("not read")
    return path


def linked_directory(path: Path, rows: Rows) -> Path:
    (path / "real").mkdir()
    directory(path / "real", rows)
    (path / "link").symlink_to(path / "real")
    return path / "link"


def pattern(path: Path, rows: Rows) -> Path:
    (path / "[b]").mkdir()
    directory(path / "[b]", rows)
    return path / "[b]/**/*[0-9].jsonl"


def pattern_of_directories(path: Path, rows: Rows) -> Path:
    (path / "part-1").mkdir()
    directory(path / "part-1", rows)
    return path / "part-*"


def uri(path: Path, rows: Rows) -> str:
    (path / "a%20b [c] #?é").mkdir()
    return jsonl(path / "a%20b [c] #?é", rows).as_uri()


def bucket(path: Path, rows: Rows) -> str:
    server = client_of(shared_server("moto"))
    name = f"doors-{uuid.uuid4().hex[:12]}"
    server.make_bucket(name)
    for number in range(FILES):
        data = "".join(json.dumps(row) + "\n" for row in rows[number::FILES]).encode()
        server.put_object(name, f"a b/[c]/{number}%20é.jsonl", io.BytesIO(data), len(data))
    return f"s3://{name}/a b"


Door = Callable[[Path, Rows], Path | str]
WRITERS: list[Door] = [
    escaped_jsonl, array, array_in_a_line, packed, packed_zst, comma_separated, tab_separated, parquet,
    parquet_of_texts, parquet_of_lists, directory,
]  # fmt: skip
PLACES: list[Door] = [linked_directory, pattern, pattern_of_directories, uri, bucket]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    recipe = DataRecipe(max_seq_len=4096)
    form = chat_format(tokenizer_of("qwen-3"), "base model test")
    return Worker(ReadJob(recipe, form, "base model test", tmp_path_factory.mktemp("spills")))


Read = tuple[list[Any], Counter[tuple[str, str]], Counter[str], Counter[str]]


def read(worker: Worker, source: Path | str, directory: Path) -> Read:
    """The documents of a source, its rejected rows, the unused columns, and the changed or untrained messages."""
    recipe = worker.job.recipe
    blocks, row_format, _ = find_row_format(recipe, blocks_of(recipe, str(source), directory))
    documents: list[Any] = []
    rejected: Counter[tuple[str, str]] = Counter()
    ignored: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for block in blocks:
        result = worker.read(block, row_format, "both")
        assert result.other_shape is None
        found = result.documents[["key", "content", "heldout", "scorable", "length", "trained"]].tolist()
        documents += zip(found, [result.slices[number] for number in result.documents["slice"]], strict=True)
        rejected.update((reason, message) for _, reason, message in result.rejected)
        ignored += result.ignored
        changed += result.turns
    return sorted(documents), rejected, ignored, changed


def check_doors(worker: Worker, rows: Rows, doors: list[Door], folder: Path) -> None:
    (folder / "jsonl").mkdir()
    expected = read(worker, jsonl(folder / "jsonl", rows), folder)
    for door in doors:
        (folder / door.__name__).mkdir()
        assert read(worker, door(folder / door.__name__, rows), folder) == expected, door.__name__


def test_any_rows_are_the_same_by_every_door(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> None:
    fuzz(lambda rows: check_doors(worker, rows, WRITERS, tmp_path_factory.mktemp("doors")), ROWS, 20)


def test_any_arguments_are_the_same_as_a_map(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> None:
    doors = [parquet_map, parquet_of_lists, comma_separated]
    fuzz(lambda rows: check_doors(worker, rows, doors, tmp_path_factory.mktemp("doors")), MAPPED, 12)


def conversation(number: int) -> dict[str, Any]:
    """A row with a call, some of which are rejected, and with columns of all kinds."""
    call = {"function": {"name": "clock", "arguments": {"text": f"{number}\u2028", "whole": 2**60, "real": 1.0}}}
    return {
        "messages": [
            {"role": "user", "content": f"What time is it in 東京 {number}?\r\n"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "10:42" if number % 7 else ""},
            {"role": "assistant", "content": f"10:42, {number} 🚆" + "?" * (2000 if number == 5 else 0), "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "clock"}}],
        "slice": str(number % 2),
        "check": "exact",
        "note": "not read",
    }


CONVERSATIONS = [conversation(number) for number in range(40)]
OPTIONS = {"max_seq_len": 1024, "max_reject_fraction": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("base")
    tokenizer_of("qwen-3").save_pretrained(directory)
    return Base(location=directory.as_uri())


@pytest.fixture(scope="module")
def expected(base: Base, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the data set of the rows as JSONL."""
    folder = tmp_path_factory.mktemp("jsonl")
    store = DirectoryStore(folder / "store")
    dataset = prepare_file(jsonl(folder, CONVERSATIONS), store, base, **OPTIONS)
    card = card_of(dataset, store)
    assert card["rejected"] == {"empty content": 6, "over the context": 1}
    assert card["ignored_columns"].keys() == {"note"}
    return dataset.digest


@pytest.mark.parametrize("door", [*WRITERS, *PLACES], ids=lambda door: door.__name__)
def test_the_data_set_is_the_same_by_every_door(
    door: Door, base: Base, expected: str, store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ENDPOINT": shared_server("moto"), "ACCESS_KEY": KEY, "SECRET_KEY": SECRET}.items():
        monkeypatch.setenv(f"FORGE_S3_{name}", value)
    source = door(tmp_path, CONVERSATIONS)
    uri = source if isinstance(source, str) else source.as_uri()
    recipe = DataRecipe.model_validate({"source": uri, "heldout_fraction": 0.5, **OPTIONS})
    dataset = prepare(source_of(recipe, store), recipe, base, store, load_settings())
    assert dataset.digest == expected
