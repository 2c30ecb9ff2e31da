"""Tables of names and other texts of strangers as CSV, for spreadsheets too.

A spreadsheet runs a cell that begins with =, +, - or @ as a formula, also after white space and in their full-width
forms. Such a text gets an apostrophe before it.
"""

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

SIGNS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
BEGINNINGS = ("\t", "\r", "\n")


def write_rows(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    csv.writer(file).writerows([_not_a_formula(cell) for cell in row] for row in rows)


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
    return cell[1:] if cell.startswith("'") and _not_a_formula(cell[1:]) == cell else cell


def _not_a_formula(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and (cell.lstrip().startswith(SIGNS) or cell.startswith(BEGINNINGS))
    return f"'{cell}" if is_formula else cell
