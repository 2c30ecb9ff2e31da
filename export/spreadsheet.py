"""Tables of names and other texts of strangers as CSV, for spreadsheets too.

A spreadsheet runs a cell that begins with =, +, - or @ as a formula, also after white space and in their full-width
forms. Such a text gets an apostrophe before it.
"""

import csv
import io
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

SIGNS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
BEGINNINGS = ("\t", "\r", "\n")


def write_rows(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    csv.writer(file).writerows([_not_a_formula(cell) for cell in row] for row in rows)


def save_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write or replace a file, in UTF-8. Without room for all of it, what was there stays. Raises OSError.

    A link keeps pointing to its file. What is no file, such as /dev/stdout, is written to.
    """
    is_file = path.is_file() or not path.exists()
    path = path.resolve() if is_file else path
    new = path.with_name(f"{path.name}.new") if is_file else path
    try:
        with open(new, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            write_rows(file, rows)
        if is_file:
            os.replace(new, path)
    except BaseException:
        if is_file:
            new.unlink(missing_ok=True)
        raise


def read_rows(text: str) -> list[tuple[int, dict[str, str]]]:
    """Returns the number of the line at which each row ends, and its cells by their column.

    The inverse of `write_rows`. Semicolons and tabs separate cells too, as spreadsheets write them in many countries. A
    cell that is missing at the end of a row is empty.
    """
    head = text.lstrip("\ufeff").partition("\n")[0]
    reader = csv.reader(io.StringIO(text.lstrip("\ufeff"), newline=""), delimiter=max(",;\t", key=head.count))
    columns = [column.strip() for column in next(reader, [])]
    return [
        (reader.line_num, dict(itertools.zip_longest(columns, map(_plain, row[: len(columns)]), fillvalue="")))
        for row in reader
    ]


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _not_a_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell


def _is_formula(cell: str) -> bool:
    """Also behind apostrophes, so that reading takes away no other one than writing has put there."""
    text = cell.lstrip("'")
    return text.lstrip().startswith(SIGNS) or text.startswith(BEGINNINGS)
