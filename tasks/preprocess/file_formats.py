"""The file formats that rows come in, read in blocks of bounded size: JSONL, JSON, CSV, TSV, Parquet; gzip or zstd."""

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
from tasks.preprocess.rows import EXAMPLE, Invalid, parse, without_nulls

BLOCK = 4 << 20  # bytes of text in a block, roughly
MAX_ROW = 64 << 20  # bytes
TAB = "\t"
TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (*TEXT, *(text + packed for text in TEXT for packed in COMPRESSIONS), ".parquet")


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file of raw rows: the name that users know, and the local path."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a file: lines of JSON, (line number, value or Invalid) pairs, or a Parquet batch.

    `first` is the number of the first line (in Parquet, row), from 1; `order` is the block's index in the source. Each
    row of a file has its own number.
    """

    order: int
    name: str
    first: int
    rows: bytes | list[tuple[int, Any]] | pa.RecordBatch

    def values(self) -> Iterator[tuple[int, Any]]:
        """Each row's number and its value, or an Invalid that says why it has none."""
        if isinstance(self.rows, list):
            for number, value in self.rows:
                yield number, _parse(value) if isinstance(value, bytes) else value
        elif isinstance(self.rows, bytes):
            lines = self.rows.split(b"\n")
            if not lines[-1]:
                lines.pop()
            for number, line in enumerate(lines, self.first):
                yield number, _parse(line)
        else:
            for index in range(len(self.rows)):
                yield self.first + index, _batch_row(self.rows, index)


def _parse(line: bytes) -> Any:
    try:
        return parse(line)
    except Invalid as invalid:
        return invalid


def _batch_row(batch: pa.RecordBatch, index: int) -> Any:
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[index].as_py(maps_as_pydicts="strict")
        except UnicodeDecodeError:
            return Invalid("not UTF-8", f"the column {name} holds bytes that are not UTF-8; write the file again")
        except (ValueError, TypeError, OverflowError, LookupError, pa.ArrowException) as error:  # such as a late date
            first = str(error).partition("\n")[0]
            return Invalid(
                "unreadable value", f"the column {name} holds a value that cannot be read ({first}); write it as text"
            )
    try:
        return without_nulls(row)
    except Invalid as invalid:
        return invalid


def read_blocks(files: list[RawFile]) -> Iterator[Block]:
    """The rows of the files, one file after another, in blocks.

    Raises ForgeError if a file as a whole cannot be read: damaged, no header, a line without end.
    """
    order = 0
    for file in files:
        empty = True
        for first, rows in _read(file):
            yield Block(order, file.name, first, rows)
            order, empty = order + 1, False
        if empty:
            raise _error(file, "the file holds no rows", fix=f"add rows such as {EXAMPLE}")


def _error(file: RawFile, what: str, line: int | None = None, fix: str = "") -> ForgeError:
    where = f"data {file.name}" if line is None else f"data {file.name}:{line}"
    return ForgeError(what, where=where, fix=fix)


def _read(file: RawFile) -> Iterator[tuple[int, Any]]:
    name = file.path.name.lower()
    packed = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    kind, compression = f".{name.removesuffix(packed).rpartition('.')[2]}", COMPRESSIONS.get(packed)
    try:
        if kind == ".parquet":
            yield from _parquet(file)
            return
        with pa.input_stream(str(file.path), compression=compression) as stream:
            if kind in (".csv", ".tsv"):
                yield from _csv(file, stream, TAB if kind == ".tsv" else ",")
            elif kind == ".json":
                yield from _json(file, stream)
            else:
                yield from _lines(file, stream)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _error(
            file,
            f"cannot be read as {kind[1:]}{f' ({compression})' if compression else ''}: {reason}",
            fix="the file is damaged or has the wrong suffix; create it again",
        ) from None


def _lines(file: RawFile, stream: Any, rest: bytes = b"") -> Iterator[tuple[int, bytes]]:
    first = 1
    while chunk := stream.read(BLOCK):
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            rest += chunk
            if len(rest) > MAX_ROW:
                raise _error(
                    file, f"a line of more than {MAX_ROW >> 20} MiB", first, fix="write each row in a line of its own"
                )
            continue
        block = rest + chunk[:cut]
        yield first, block
        first += block.count(b"\n")
        rest = chunk[cut:]
    if rest:
        yield first, rest


def _json(file: RawFile, stream: Any) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON array (or lines of JSON), read without loading the whole array."""
    chunk = stream.read(BLOCK)
    if not chunk.lstrip().startswith(b"["):
        yield from _lines(file, stream, chunk)
        return
    array = _JSONArray(file)
    while not array.ended:
        if rows := array.feed(chunk):
            yield rows[0][0], rows
        chunk = stream.read(BLOCK)
    if (array.rest + chunk.decode("utf-8", "replace")).strip():
        raise _error(file, "there is more after the end of the array", array.line, fix="keep one array in a file")


class _JSONArray:
    """Finds the objects of a JSON array in chunks of its text, and their numbers.

    The number is that of the line it begins in, but each has its own: an array in one line is numbered by its objects.
    """

    def __init__(self, file: RawFile) -> None:
        self.file, self.line = file, 1
        self.number = 0  # of the last row
        self.rest = ""  # text after the last complete object
        self.started = self.ended = False
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._scan = json.JSONDecoder().raw_decode

    def feed(self, chunk: bytes) -> list[tuple[int, bytes]]:
        """The objects that this chunk completes; an empty chunk is the end of the file."""
        last = not chunk
        try:
            text = self.rest + self._decode(chunk, last)
        except UnicodeDecodeError:
            raise _error(
                self.file, f"not UTF-8 text (after line {self.line})", fix="convert the file to UTF-8"
            ) from None
        rows: list[tuple[int, bytes]] = []
        at = self._skip(text, 0)
        while at < len(text) and text[at] != "]":
            end = self._object_end(text, at, last)
            if end is None:
                break
            self.number = max(self.line, self.number + 1)
            rows.append((self.number, text[at:end].encode("utf-8", "surrogatepass")))
            self.line += text.count("\n", at, end)
            at = self._skip(text, end)
        if text[at : at + 1] == "]":
            self.ended, at = True, at + 1
        elif last:
            raise _error(self.file, "the array does not end", self.line, fix="the file is truncated; create it again")
        self.rest = text[at:]
        return rows

    def _skip(self, text: str, at: int) -> int:
        """The place after white space, the opening bracket and commas."""
        start = at
        while at < len(text) and text[at] in " \t\r\n" + ("," if self.started else "["):
            self.started = self.started or text[at] == "["
            at += 1
        self.line += text.count("\n", start, at)
        return at

    def _object_end(self, text: str, at: int, last: bool) -> int | None:
        """Where the value that begins here ends; None if more text is needed."""
        try:
            return self._scan(text, at)[1]
        except (ValueError, RecursionError) as error:
            if not last and len(text) - at <= MAX_ROW:
                return None
            reason = getattr(error, "msg", "a number too long, or nesting too deep")
            raise _error(
                self.file, f"not valid JSON ({reason})", self.line, fix="the file must be one array of objects"
            ) from None


def _csv(file: RawFile, stream: Any, delimiter: str) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Any]] = []
    size = 0
    try:
        header = next(reader, [])
        _check_header(file, header)
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                rows.append((line, {name: field for name, field in zip(header, fields, strict=True) if field}))
            elif fields:
                message = (
                    f"{len(fields)} fields, but the header has {len(header)}; quote texts that contain a "
                    f"{'tab' if delimiter == TAB else 'comma'} or a line break"
                )
                rows.append((line, Invalid("wrong columns", message)))
            size += 64 + sum(map(len, fields))
            line = reader.line_num + 1
            if size > BLOCK:
                yield rows[0][0], rows
                rows, size = [], 0
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise _error(
            file, f"not UTF-8 text (after line {reader.line_num}, byte {byte:#x})", fix="convert the file to UTF-8"
        ) from None
    except csv.Error as error:
        raise _error(file, f"not valid CSV: {error}", reader.line_num, fix="fix the quotes there") from None
    if rows:
        yield rows[0][0], rows


def _check_header(file: RawFile, header: list[str]) -> None:
    if header and header[0].startswith("\ufeff"):
        raise _error(file, "starts with a byte order mark", fix="save it as UTF-8 without one")
    if not header or len(set(header)) != len(header) or "" in header:
        raise _error(file, f"the first line must name each column once; it is {header}", 1, fix="write the names there")


def _parquet(file: RawFile) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as opened:
        metadata, names = opened.metadata, opened.schema_arrow.names
        if len(set(names)) != len(names):
            raise _error(file, f"two columns have the same name, of {', '.join(names)}", fix="rename one")
        size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        rows_per_block = max(1, min(1024, BLOCK * metadata.num_rows // max(size, 1)))
        first = 1
        for batch in opened.iter_batches(batch_size=rows_per_block):
            yield first, batch
            first += len(batch)
