import ast
import io
from pathlib import Path

import pytest

from export.spreadsheet import write_rows

ROOT = Path(__file__).parents[2]


def written(*cells) -> str:
    file = io.StringIO()
    write_rows(file, [cells])
    return file.getvalue()


@pytest.mark.parametrize("beginning", ["=", "+", "-", "@", "＝", "＋", "－", "＠", "\n=", " =", "\t", "\u3000@"])
def test_a_text_that_a_spreadsheet_would_run_gets_an_apostrophe(beginning):
    assert written(f"{beginning}cmd").strip('"\r\n') == f"'{beginning}cmd"


def test_line_ends_at_the_beginning_get_an_apostrophe():
    assert written("\rx") == '"\'\rx"\r\n'
    assert written("\nx") == '"\'\nx"\r\n'


def test_numbers_and_other_texts_stay_as_they_are():
    assert written(-0.5, -3, None, "a=b", "", "x-y", True) == "-0.5,-3,,a=b,,x-y,True\r\n"


def test_every_table_of_texts_is_written_by_this_function():
    """Tables of numbers only, and the built-in set's own names, need none of it."""
    allowed = {"export/spreadsheet.py", "training/run_folder.py", "training/data/shapes.py"}
    using = set()
    for folder in ("export", "serving", "training", "ui"):
        for file in (ROOT / folder).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)]
            if any(ast.unparse(node) in ("csv.writer", "csv.DictWriter") for node in calls):
                using.add(file.relative_to(ROOT).as_posix())
    assert using == allowed
