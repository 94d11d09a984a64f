"""The files that rows come in, read in blocks of bounded size: JSONL, JSON, CSV, TSV and Parquet, gzip or zstd."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forge.core.errors import ForgeError
from tasks.preprocess.rows import EXAMPLE, Invalid, parse

BLOCK = 4 << 20  # bytes of text in a block, about
LONGEST = 64 << 20  # bytes in a row
TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (*TEXT, *(text + packed for text in TEXT for packed in COMPRESSIONS), ".parquet")


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file of raw rows: what users know it as, and where it is."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a file: lines of JSON, (line number, value or Invalid) pairs, or a Parquet batch.

    `first` is the number of the first line (of Parquet, row), from 1; `order` is the block's place in the source.
    """

    order: int
    name: str
    first: int
    rows: bytes | list[tuple[int, Any]] | pa.RecordBatch

    def values(self) -> Iterator[tuple[int, Any]]:
        """Each row's number and its value, or the Invalid that says why it has none."""
        if isinstance(self.rows, list):
            for number, value in self.rows:
                yield number, _parsed(value) if isinstance(value, bytes) else value
        elif isinstance(self.rows, bytes):
            lines = self.rows.split(b"\n")
            if not lines[-1]:
                lines.pop()
            for number, line in enumerate(lines, self.first):
                yield number, _parsed(line)
        else:
            for at in range(len(self.rows)):
                yield self.first + at, _batch_row(self.rows, at)


def _parsed(line: bytes) -> Any:
    try:
        return parse(line)
    except Invalid as reason:
        return reason


def _batch_row(batch: pa.RecordBatch, at: int) -> Any:
    try:
        return _without_nulls({name: batch.column(name)[at].as_py() for name in batch.schema.names})
    except UnicodeDecodeError:
        return Invalid("not UTF-8", "a text column holds bytes that are not UTF-8; write the file again")
    except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:  # such as a time out of range
        return Invalid("unreadable value", f"a column holds a value that cannot be read ({error}); write it as text")


def _without_nulls(value: Any) -> Any:
    """Parquet gives each message every key that any message has."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def read_blocks(files: list[RawFile]) -> Iterator[Block]:
    """The files' rows, in blocks; the files one after another.

    Raises ForgeError where a file as a whole cannot be read: damaged, without a header, holding an endless line.
    """
    order = 0
    for file in files:
        empty = True
        for first, rows in _read(file):
            yield Block(order, file.name, first, rows)
            order, empty = order + 1, False
        if empty:
            raise ForgeError(f"data {file.name}: the file holds no rows; it must hold rows such as {EXAMPLE}")


def _read(file: RawFile) -> Iterator[tuple[int, Any]]:
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2 if compression else -1]
    try:
        if kind == ".parquet":
            yield from _parquet(file)
            return
        with pa.input_stream(str(file.path), compression=compression) as stream:
            if kind in (".csv", ".tsv"):
                yield from _csv(file, stream, "\t" if kind == ".tsv" else ",")
            elif kind == ".json":
                yield from _json(file, stream)
            else:
                yield from _lines(file, stream)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ForgeError(
            f"data {file.name}: cannot be read as {kind[1:]}{f' ({compression})' if compression else ''}: {reason}; "
            "it is damaged or not what its name says; make the file again"
        ) from None


def _lines(file: RawFile, stream: Any, rest: bytes = b"") -> Iterator[tuple[int, bytes]]:
    first = 1
    while chunk := stream.read(BLOCK):
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            rest += chunk
            if len(rest) > LONGEST:
                raise ForgeError(f"data {file.name}:{first}: a line of more than {LONGEST >> 20} MiB; is this JSONL?")
            continue
        block = rest + chunk[:cut]
        yield first, block
        first += block.count(b"\n")
        rest = chunk[cut:]
    if rest:
        yield first, rest


def _json(file: RawFile, stream: Any) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON array (or lines of JSON), without reading the whole array at once."""
    head = stream.read(BLOCK)
    if not head.lstrip().startswith(b"["):
        yield from _lines(file, stream, head)
        return
    decode, scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, at, line, found, ended = "", 0, 1, [], False
    chunk, started = head, False
    while not ended:
        last = not chunk
        try:
            text = text[at:] + decode.decode(chunk, last)
        except UnicodeDecodeError:
            raise ForgeError(
                f"data {file.name}: not UTF-8 text (after line {line}); convert the file to UTF-8"
            ) from None
        at = 0
        while True:
            start = at
            while at < len(text) and text[at] in " \t\r\n" + ("," if started else "["):
                started = started or text[at] == "["
                at += 1
            line += text.count("\n", start, at)
            if at == len(text):
                break
            if text[at] == "]":
                ended = True
                break
            try:
                _, end = scan(text, at)
            except (ValueError, RecursionError) as error:
                if last or len(text) - at > LONGEST:
                    reason = getattr(error, "msg", "a number too long, or nesting too deep")
                    raise ForgeError(
                        f"data {file.name}:{line}: not valid JSON ({reason}); the file must be one array of objects"
                    ) from None
                break
            found.append((line, text[at:end].encode("utf-8", "surrogatepass")))
            line += text.count("\n", at, end)
            at = end
        if last and not ended:
            raise ForgeError(f"data {file.name}:{line}: the array does not end; the file is cut off; make it again")
        if found:
            yield found[0][0], found
            found = []
        chunk = stream.read(BLOCK)
    if (text[at + 1 :] + chunk.decode("utf-8", "replace")).strip():
        raise ForgeError(f"data {file.name}:{line}: there is more after the end of the array; keep one array a file")


def _csv(file: RawFile, stream: Any, delimiter: str) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    csv.field_size_limit(LONGEST)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""), delimiter=delimiter, strict=True)
    found: list[tuple[int, Any]] = []
    size = 0
    try:
        header = next(reader, [])
        if header and header[0].startswith("\ufeff"):
            raise ForgeError(f"data {file.name}: starts with a byte order mark; save it as UTF-8 without one")
        if len(set(header)) != len(header) or "" in header:
            raise ForgeError(f"data {file.name}:1: the first line must name each column once; it is {header}")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                found.append((line, {name: field for name, field in zip(header, fields, strict=True) if field}))
            elif fields:
                refusal = f"{len(fields)} fields, and the first line names {len(header)}; quote texts that hold a comma"
                found.append((line, Invalid("wrong columns", refusal)))
            size += 64 + sum(map(len, fields))
            line = reader.line_num + 1
            if size > BLOCK:
                yield found[0][0], found
                found, size = [], 0
    except UnicodeDecodeError as error:
        raise ForgeError(
            f"data {file.name}: not UTF-8 text (after line {reader.line_num}, byte {error.object[error.start]:#x}); "
            "convert the file to UTF-8"
        ) from None
    except csv.Error as error:
        raise ForgeError(f"data {file.name}:{reader.line_num}: not valid CSV: {error}; mend the quotes there") from None
    if found:
        yield found[0][0], found


def _parquet(file: RawFile) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as opened:
        facts, names = opened.metadata, opened.schema_arrow.names
        if len(set(names)) != len(names):
            raise ForgeError(f"data {file.name}: two columns have one name, of {', '.join(names)}; rename one")
        size = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
        a_block = max(1, min(1024, BLOCK * facts.num_rows // max(size, 1)))
        first = 1
        for batch in opened.iter_batches(batch_size=a_block):
            yield first, batch
            first += len(batch)
