"""Rows that can't be used are refused, each with its file, its line and the mend."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ForgeError, Problems
from tasks.preprocess.rows import digest_source, read_rows
from tasks.recipe import DataRecipe
from tests.conftest import chat, write_jsonl

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def data(source: Path) -> DataRecipe:
    return DataRecipe(source=str(source), context=128)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"not json\n", "not valid JSON"),
        (b'{"messages": [\n', "not valid JSON"),
        (b"\n", "the line is empty"),
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
        (b"[" * 100_000 + b"\n", "cannot be read"),
        (b'{"messages": ' + b"9" * 5000 + b"}\n", "cannot be read"),
        (GOOD.replace(b'"b"', b'"\\ud83d"'), "lone surrogate"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
        (b'["a"]\n', "no conversation"),
        (b'{"text": "a"}\n', "no conversation"),
        (b'{"messages": []}\n', "no conversation"),
        (b'{"messages": ["a"]}\n', "message 1: role is None"),
        (b'{"messages": [{"role": "human", "content": "a"}]}\n', "role is 'human'"),
        (b'{"messages": [{"role": "user", "content": 1}]}\n', "content must be a text"),
        (b'{"messages": [{"role": "user", "content": " "}]}\n', "not empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "take turns"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "take turns"),
        (b'{"messages": [{"role": "system", "content": "a"}]}\n', "take turns"),
        (GOOD.replace(b"]}", b', {"role": "system", "content": "c"}]}'), "may only come first"),
        (GOOD.replace(b"]}", b'], "group": ["x"]}'), "group must be a text"),
    ],
)
def test_a_row_that_is_no_conversation(line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + GOOD)
    with pytest.raises(Problems) as caught:
        list(read_rows(data(path)))
    assert f"{path}:2: " in caught.value.message
    assert says in caught.value.message
    assert "1 of 3 rows" in caught.value.message


def test_all_findings_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x\n" * 25)
    with pytest.raises(Problems) as caught:
        list(read_rows(data(path)))
    assert "25 of 25 rows" in caught.value.message
    assert "and 15 more" in caught.value.message


@pytest.mark.parametrize("what", ["missing", "empty", "no-jsonl", "s3"])
def test_a_source_that_holds_nothing(what: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "no-jsonl").mkdir()
    source = "s3://bucket/rows" if what == "s3" else str(tmp_path / what)
    with pytest.raises(ForgeError, match="data") as caught:
        list(read_rows(DataRecipe(source=source, context=128)))
    assert source in caught.value.message


def test_columns_are_optional(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("One  TWO", "b"), chat("c", "d", group="g", slice="s")])
    first, second = read_rows(data(path))
    assert (first.group, first.slice) == ("one two", "all")
    assert (second.group, second.slice) == ("g", "s")


def test_the_source_s_identity_is_its_files_contents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "1.jsonl", [chat("a", "b")])
    write_jsonl(tmp_path / "a" / "2.jsonl", [chat("c", "d")])
    before = digest_source(data(tmp_path / "a"))
    write_jsonl(tmp_path / "b" / "x.jsonl", [chat("c", "d")])
    write_jsonl(tmp_path / "b" / "y.jsonl", [chat("a", "b")])
    assert digest_source(data(tmp_path / "b")) == before
    write_jsonl(tmp_path / "a" / "2.jsonl", [chat("c", "e")])
    assert digest_source(data(tmp_path / "a")) != before


@given(st.lists(st.one_of(st.just(GOOD), st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"") + b"\n"))))
def test_whatever_the_bytes_there_are_rows_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"
    path.write_bytes(b"".join(lines))
    try:
        assert len(list(read_rows(data(path)))) == len(lines)
    except ForgeError as error:
        assert str(path) in error.message
