"""Reads CSV and TSV, plain or compressed (.gz, .bz2, .zst), with a header line."""

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv

from llmrec.data.columns import require_columns
from llmrec.errors import DataError

_BLOCK = 16 * 1024 * 1024  # bytes; a line must fit into one


def read_delimited(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    required: Sequence[str] = (),
    text_columns: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str = "utf-8",
) -> pa.Table:
    """Reads a file of delimited values; a byte order mark is no part of the first column's name.

    Args:
        path: The file; its suffix tells compression, and .tsv or .txt that tabs separate the values.
        columns: Columns to read where they exist; None reads all.
        required: Columns that must exist.
        text_columns: Columns that are read as text whatever they look like, so that "007" stays "007".
        delimiter: One character; None follows the suffix.
        encoding: Of the text.

    Raises:
        DataError: The file is empty, not in this encoding, not a table, or lacks a column.
    """
    source = Path(path)
    if delimiter is None:
        delimiter = "\t" if {".tsv", ".txt"} & set(source.suffixes) else ","
    if len(delimiter) != 1:
        raise DataError(f"the delimiter is {delimiter!r}: it must be one character")
    reading = csv.ReadOptions(encoding=encoding, block_size=_BLOCK)
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        with csv.open_csv(source, read_options=reading, parse_options=parsing) as reader:
            names = reader.schema.names
        require_columns(names, required, str(source))
        chosen = names if columns is None else [name for name in names if name in columns]
        converting = csv.ConvertOptions(
            include_columns=chosen,
            column_types={name: pa.string() for name in text_columns},
            strings_can_be_null=True,
            null_values=[""],
        )
        return csv.read_csv(source, read_options=reading, parse_options=parsing, convert_options=converting)
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeError, LookupError) as error:
        raise _explain(source, error, delimiter, encoding) from error


def check_encoding(path: Path, encoding: str = "utf-8") -> None:
    """Refuses a file that is not in this encoding.

    Raises:
        DataError: With the place of the first byte that is not.
    """
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise DataError(f"encoding is {encoding!r}: Python knows no such encoding") from None
    done = 0
    with pa.input_stream(str(path)) as stream:  # decompresses by suffix
        while True:
            chunk = stream.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = done - pending + error.start
                raise DataError(
                    f"{path} is not {encoding}: byte {error.object[error.start]:#04x} at offset {place} fits nowhere;"
                    " name its encoding with encoding=, often 'latin-1', 'cp1252' or 'utf-16'"
                ) from None
            if not chunk:
                return
            done += len(chunk)


def _explain(source: Path, error: Exception, delimiter: str, encoding: str) -> DataError:
    message = str(error).splitlines()[0]
    if "Empty CSV" in message or source.stat().st_size == 0:
        return DataError(f"{source} is empty")
    try:
        check_encoding(source, encoding)
    except DataError as found:
        return found
    with pa.input_stream(str(source)) as stream:
        if b"\0" in stream.read(1024) and "16" not in encoding:
            return DataError(f"{source} holds NUL bytes: it is UTF-16 (pass encoding='utf-16') or no text at all")
    return DataError(
        f"{source} can't be read as a table separated by {delimiter!r}: {message}; is the delimiter right?"
    )
