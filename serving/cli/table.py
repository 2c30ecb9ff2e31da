"""The CSV file that a command writes."""

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from export.spreadsheet import save_rows
from serving.collection.problems import IndexProblem


def refuse_existing(output: Path) -> None:
    """Raises IndexProblem, before a long computation, if there is a file at `--output` already."""
    if output.exists():
        raise IndexProblem(f"--output: {output} exists; name another file")


def write_table(output: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], replace: bool = False) -> None:
    """Writes the file, and its folder if there is none. Raises IndexProblem, also for a file that exists, unless it is
    to be replaced."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        save_rows(output, [columns, *rows])
    except OSError as error:
        raise IndexProblem(f"--output: {output} cannot be written: {error.strerror}") from error
