import ast
import errno
import io
from pathlib import Path

import pytest

from export import spreadsheet
from export.spreadsheet import read_rows, save_rows, write_rows

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


@pytest.mark.parametrize("text", ["=x", "'=x", "''=x", "'x", "'", "''", "", "' =x", "'\t", "x'", "-1"])
def test_reading_gives_what_was_written(text, tmp_path):
    save_rows(tmp_path / "a.csv", [("name", "other"), (text, "x")])
    assert [row for _, row in read_rows((tmp_path / "a.csv").read_text())] == [{"name": text, "other": "x"}]
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    save_rows(tmp_path / "a.csv", [("name",), ("old",)])

    def full(file, rows):
        file.write("name\nhalf")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spreadsheet, "write_rows", full)
    for name in ("a.csv", "b.csv"):
        with pytest.raises(OSError, match="No space left"):
            save_rows(tmp_path / name, [("name",), ("new",)])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "name\nold\n"}


def test_a_link_and_a_device_are_written_through(tmp_path):
    (tmp_path / "file.csv").write_text("old")
    for name, target in (("link", tmp_path / "file.csv"), ("device", Path("/dev/null"))):
        (tmp_path / name).symlink_to(target)
        save_rows(tmp_path / name, [("new",)])
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "file.csv").read_text() == "new\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file.csv", "link", "device"} and Path("/dev/null").exists()


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
