"""Labels from CSV files, such as those of `twinview pick` and of the page: columns `label`, and `path` or `name`.

A row without a label stands for a picture that has none yet.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.paths import at_home, valid_text
from export.spreadsheet import read_rows, save_rows
from training.data.sources import DataError, Source, SourcePicture

NEXT_COLUMNS = ("name", "path", "label", "suggestion", "margin")
NAMED = 3  # most pictures that an error names


def relabel(source: Source, files: Sequence[str]) -> Source:
    """The source with the labels in the files. Its other training pictures have none, whatever their folders are
    called; its test pictures keep those that are in the files too.

    files   paths of CSV files; a row names a picture by its path, or else by its name in the source
    raises  DataError: a file cannot be read, has other columns, or names a picture that the source does not have; two
            rows give a picture different labels; there are fewer than two labels
    """
    pictures = list(source.pictures)
    rows_of = _rows_by_name(pictures)
    found: dict[int, tuple[str, str]] = {}  # row: label, and where it stands
    unknown: list[str] = []
    for file in files:
        for line, cells in _read(file):
            if not (label := cells["label"].strip()):
                continue
            names = [cells[column] for column in ("path", "name") if cells.get(column)]
            row = next((rows_of[name] for name in names if name in rows_of), None)
            if row is None:
                unknown.append(f"{names[0] if names else repr('')} (line {line} of {file})")
                continue
            other, where = found.setdefault(row, (label, f"line {line} of {file}"))
            if other != label:
                raise DataError(
                    f"--labels: {pictures[row].name} is {other} in {where} and {label} in line {line} of {file}"
                )
    if unknown:
        more = f", and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
        raise DataError(f"--labels: {source.name} has no picture {', '.join(unknown[:NAMED])}{more}")
    labels = {row: label for row, (label, _) in found.items()}
    classes = set(labels.values())
    if len(classes) < 2:
        what = f"only the label {classes.pop()}" if classes else "no label"
        raise DataError(f"--labels: {' and '.join(files)} has {what}; two or more are needed in the column label")
    tested = {row: picture.label for row, picture in enumerate(pictures) if picture.split == "test" and picture.label}
    if left_out := set(tested.values()) - classes:
        print(f"note: the test pictures of {', '.join(sorted(left_out))} are left out, since no label is called so")
    labels = {row: label for row, label in tested.items() if label in classes} | labels
    return replace(source, pictures=[replace(picture, label=labels.get(row)) for row, picture in enumerate(pictures)])


def _rows_by_name(pictures: Sequence[SourcePicture]) -> dict[str, int]:
    """The row of each picture by its name and by its path. Where these are not UTF-8, also as tables write them: an
    index replaces such bytes, and a CSV file has them escaped. What two pictures would be called then names none."""
    exact: dict[str, int] = {}
    written: dict[str, set[int]] = {}
    for row, picture in enumerate(pictures):
        for name in (picture.name, *([str(picture.path)] if picture.path else [])):
            exact[name] = row
            try:
                name.encode()
            except UnicodeEncodeError:
                for form in (valid_text(name), name.encode(errors="backslashreplace").decode()):
                    written.setdefault(form, set()).add(row)
    return {form: rows.pop() for form, rows in written.items() if len(rows) == 1} | exact


def write_next(
    file: Path, pictures: Sequence[SourcePicture], suggestions: Sequence[str], margins: Sequence[float]
) -> None:
    """Write a CSV file in which the next labels can be filled in.

    margins  difference between the probabilities of the likeliest label, which is the suggestion, and the next
    """
    rows = [
        (picture.name, picture.path or "", "", suggestion, f"{margin:.3f}")
        for picture, suggestion, margin in zip(pictures, suggestions, margins, strict=True)
    ]
    save_rows(file, [NEXT_COLUMNS, *rows])


def _read(file: str) -> list[tuple[int, dict[str, str]]]:
    try:
        rows = read_rows(Path(at_home(file)).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--labels: {file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--labels: {file} is not a CSV file in UTF-8: {error}") from error
    columns = rows[0][1].keys() if rows else set()
    if not rows or "label" not in columns or not columns & {"path", "name"}:
        raise DataError(f"--labels: {file} needs the columns label, and path or name, and a row for each picture")
    return rows
